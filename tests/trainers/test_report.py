from __future__ import annotations

import importlib.util
import time

import numpy as np
import pytest
import torch
from torchrl.record.loggers import CSVLogger, TensorboardLogger

from torchrl_amago._files import DamagedError
from torchrl_amago._state_file import load_state, save_state
from torchrl_amago.evaluation import TrialResults
from torchrl_amago.progress import MetricWindow
from torchrl_amago.trainers import ProgressTable, read_progress
from torchrl_amago.trainers.report import RunReport, evaluation_metrics, make_logger

RESULTS = TrialResults(
    episode_return=torch.tensor([[0.0, 2.0], [1.0, 1.0]]),
    episode_success=torch.tensor([[False, True], [True, True]]),
    trial_return=torch.tensor([2.0, 2.0]),
    trial_length=torch.tensor([4, 6]),
)


def test_rows_are_on_disk_and_columns_may_come_late(tmp_path):
    table = ProgressTable(tmp_path / "progress.csv")
    assert not table.path.exists()
    table.append({"update": 1, "loss": 0.1})
    assert table.path.read_text() == "update,loss\n1,0.1\n"
    table.append({"late": 2.0})
    table.append({"update": 3, "loss": 1 / 3, "late": 4.0})
    assert table.path.read_text().splitlines()[-1] == f"3,{1 / 3!r},4.0"
    progress = read_progress(tmp_path)
    np.testing.assert_array_equal(progress["update"], [1, np.nan, 3])
    np.testing.assert_array_equal(progress["late"], [np.nan, 2, 4])


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (b"2,0.25", b"2,0.75"),
        (b"0.25", b"0.2\xff"),
        (b"0.25", b"0.2\x00"),
        (b"1,0.5\n", b""),
        (b"2,0.25\n", b"2,0.25\n3,"),
    ],
)
def test_a_resumed_run_has_the_rows_of_its_checkpoint(tmp_path, old, new):
    """And neither later rows and columns, nor damage."""
    table = ProgressTable(tmp_path / "progress.csv")
    table.append({"a": 1, "b": 0.5})
    table.append({"a": 2, "b": 0.25})
    state, content = table.state_dict(), table.path.read_bytes()
    table.append({"a": 3, "late": 5})
    table.path.write_bytes(table.path.read_bytes().replace(old, new))
    again = ProgressTable(table.path)
    again.load_state_dict(state)
    assert table.path.read_bytes() == content
    again.append({"a": 7})
    assert read_progress(tmp_path)["a"].tolist() == [1, 2, 7]
    ProgressTable(table.path).load_state_dict(ProgressTable(table.path).state_dict())
    assert not table.path.exists()


@pytest.mark.parametrize("content", [b"a\n0.2\xff\n", b"a\nx\n"])
def test_a_table_that_cannot_be_read(tmp_path, content):
    with pytest.raises(FileNotFoundError, match="progress.csv"):
        read_progress(tmp_path)
    (tmp_path / "progress.csv").write_bytes(content)
    with pytest.raises(DamagedError, match=r"progress\.csv must be a table of numbers, but"):
        read_progress(tmp_path)


def test_evaluation_metrics():
    assert evaluation_metrics({"score": torch.tensor(2.0)}) == {"eval/score": 2.0}
    metrics = evaluation_metrics(RESULTS)
    names = ("trial_return", "trial_length", "success_first", "success_last")
    assert [metrics[f"eval/{name}"] for name in names] == [2.0, 5.0, 0.5, 1.0]


def test_window_means():
    window, value = MetricWindow(), torch.tensor(1.0)
    window.add_scalars({"loss": value, "norm": torch.tensor(3.0).bfloat16()})
    value.fill_(100.0)  # the caller's tensor
    for number in (2.0, 6.0):
        window.add_scalars({"loss": torch.tensor(number)})
    window.add("return", total=10.0, count=4)
    window.add("return", total=2.0, count=2)
    other = MetricWindow()
    other.load_state_dict(window.state_dict())
    assert window.means() == other.means() == {"loss": 3.0, "norm": 3.0, "return": 2.0}
    assert window.means() == {}


@pytest.mark.parametrize(("bar", "is_terminal"), [(True, False), (True, True), (False, False)])
def test_a_bar_on_a_terminal_else_lines(tmp_path, monkeypatch, capsys, bar, is_terminal):
    lines = []
    monkeypatch.setattr("torchrl_amago.trainers.report.torchrl_logger.info", lines.append)
    monkeypatch.setattr("sys.stderr.isatty", lambda: is_terminal, raising=False)
    report = RunReport(tmp_path, progress_bar=bar)
    report.open(total_updates=10, update=4, hparams={})
    with report.timed("evaluation"):
        time.sleep(0.05)
    assert report.seconds["evaluation"] >= 0.05 > report.seconds["training"]
    report.write_row(5, 40, {"loss_actor": float("nan")}, {"success_last": 0.96})
    report.add_update({})
    report.close()
    out, shown = capsys.readouterr()
    assert out == ""
    assert ("5/10" in shown and "last=0.96, frames/s=" in shown) == is_terminal
    assert "actor" not in shown  # NaN
    assert len(lines) == (bar and not is_terminal)
    if lines:
        assert lines[0].startswith("update 5/10, 40 frames: last 0.96, frames/s")


def test_lines_if_the_error_stream_is_closed(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("torchrl_amago.trainers.report.torchrl_logger.info", lines.append)
    monkeypatch.setattr("sys.stderr", None)
    report = RunReport(tmp_path)
    report.open(total_updates=10, update=4, hparams={})
    report.add_update({})
    report.write_row(5, 40, {}, {"success_last": 0.5})
    report.close()
    (line,) = lines
    assert line.startswith("update 5/10, 40 frames: last 0.5")


class ListLogger(CSVLogger):
    """Remembers everything that is logged."""

    def __init__(self, folder):
        super().__init__("list", str(folder))
        self.logged, self.pictures = [], []
        self.experiment.add_image = lambda name, *_, **options: self.pictures.append(name)

    def log_scalar(self, name, value, step=None):
        self.logged.append((name, value, step))

    def log_hparams(self, cfg):
        self.logged.append(("hparams", cfg))


def test_loggers_get_settings_rows_and_the_evaluation_by_episode(tmp_path, monkeypatch):
    monkeypatch.setattr("torchrl_amago.plots._DPI", 20)  # drawing takes most of the time
    logger = ListLogger(tmp_path)
    report = RunReport(tmp_path / "run", [logger], progress_bar=False)
    report.open(10, 0, {"tau": 0.01, "discounts": (0.9, 0.99)})
    report.write_row(update=5, frames=40, extra={}, evaluation=RESULTS)
    report.close()
    assert logger.logged[0] == ("hparams", {"tau": 0.01, "discounts": "(0.9, 0.99)"})
    assert {("frames", 40, 5), ("eval/trial_return", 2.0, 5)} <= set(logger.logged[1:])
    by_episode = {("eval_episode_1/success", 0.5, 5), ("eval_episode_2/return", 1.5, 5)}
    assert by_episode <= set(logger.logged[1:])
    assert logger.pictures == ["eval/adaptation_curve"]


def test_a_resumed_run_goes_on_in_the_same_wandb_run(tmp_path, monkeypatch):
    """Checked with wandb itself, offline, where it is installed."""
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = []
    for update in (5, 6):
        report = RunReport(tmp_path, ["wandb"], progress_bar=False)
        if ids:
            report.load_state_dict(load_state(tmp_path / "report.npz"))
        report.open(10, update, {"tau": 0.01})
        report.write_row(update=update, frames=40, extra={"loss": 0.5}, evaluation={})
        save_state(tmp_path / "report.npz", report.state_dict())
        ids.append(wandb.run.id)
        assert wandb.run.config["tau"] == 0.01
        report.close()
        wandb.finish()
    assert ids[0] == ids[1]


class FakeWandb(ListLogger):
    """Goes on with the run whose id it is given."""

    def __init__(self, exp_name, save_dir, id=None):
        super().__init__(save_dir)
        self.id = id or "new-run"

    def _checkpoint_state(self):
        return {"id": self.id}

    def _load_checkpoint_state(self, state):
        assert state["id"] == self.id


def test_the_id_of_a_logger_s_run_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr("torchrl.record.loggers.WandbLogger", FakeWandb)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: True)
    first, second = (RunReport(tmp_path, ["wandb"], progress_bar=False) for _ in range(2))
    first.open(10, 0, {})
    first.loggers[0].id = "a-run"
    save_state(tmp_path / "report.npz", first.state_dict())
    first.close()
    second.load_state_dict(load_state(tmp_path / "report.npz"))
    second.open(10, 5, {"learning_rate": 1.0})
    assert second.loggers[0].id == "a-run"
    # Settings that changed replace the old ones there.
    assert second.loggers[0].logged == [("hparams", {"learning_rate": 1.0})]
    second.close()


def test_loggers_by_name(tmp_path):
    logger = make_logger("tensorboard", tmp_path)
    assert isinstance(logger, TensorboardLogger)
    logger.log_scalar("loss", 1.0, step=3)
    logger.shutdown()
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert make_logger(logger, tmp_path) is logger
    with pytest.raises(ValueError, match=r"must be one of 'tensorboard', 'wandb', got 'mlflow'"):
        make_logger("mlflow", tmp_path)


@pytest.mark.parametrize(("name", "flag"), [("tensorboard", "_has_tb"), ("wandb", "_has_wandb")])
def test_a_logger_s_missing_package_is_named_with_its_extra(tmp_path, monkeypatch, name, flag):
    monkeypatch.setattr(f"torchrl.record.loggers.{name}.{flag}", False)
    with pytest.raises(ImportError, match=rf'pip install "torchrl-amago\[{name}\]"'):
        make_logger(name, tmp_path)
