from __future__ import annotations

import importlib.util
import time

import numpy as np
import pytest
import torch
from torchrl.record.loggers import TensorboardLogger

from torchrl_amago.trainers import MetricWindow, ProgressTable, make_logger, read_progress
from torchrl_amago.trainers.logging import ProgressBar, Stopwatch


def test_table_is_on_disk_after_each_row(tmp_path):
    table = ProgressTable(tmp_path / "progress.csv")
    assert not table.path.exists()
    table.append({"update": 1, "loss": 0.1})
    assert table.path.read_text() == "update,loss\n1,0.1\n"
    table.append({"update": 2, "loss": 1 / 3})
    assert table.path.read_text().splitlines()[-1] == f"2,{1 / 3!r}"


def test_late_columns(tmp_path):
    table = ProgressTable(tmp_path / "progress.csv")
    table.append({"a": 1})
    table.append({"b": 2.0})
    table.append({"a": 3, "b": 4.0})
    progress = read_progress(tmp_path)
    np.testing.assert_array_equal(progress["a"], [1, np.nan, 3])
    np.testing.assert_array_equal(progress["b"], [np.nan, 2, 4])


def test_cut_back(tmp_path):
    table = ProgressTable(tmp_path / "progress.csv")
    table.append({"a": 1})
    state = table.state_dict()
    table.append({"a": 2, "late": 5})
    again = ProgressTable(tmp_path / "progress.csv")
    again.load_state_dict(state)
    assert table.path.read_text().split() == ["a", "1"]
    again.append({"a": 7})
    assert read_progress(tmp_path)["a"].tolist() == [1, 7]


def test_cut_back_needs_the_rows(tmp_path):
    table = ProgressTable(tmp_path / "progress.csv")
    with pytest.raises(RuntimeError, match=r"must hold the 3 rows written before .* got 0"):
        table.load_state_dict({"num_rows": 3, "columns": ["a"]})


def test_read_progress_of_no_run(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"progress\.csv does not exist"):
        read_progress(tmp_path)


def test_window_means():
    window = MetricWindow()
    for value in (1.0, 2.0, 6.0):
        window.add_scalars({"loss": torch.tensor(value), "norm": torch.tensor(value).bfloat16()})
    window.add("return", total=10.0, count=4)
    window.add("return", total=2.0, count=2)
    assert window.means() == {"loss": 3.0, "norm": 3.0, "return": 2.0}
    assert window.means() == {}


def test_window_with_changing_metrics():
    window = MetricWindow()
    window.add_scalars({"a": torch.tensor(1.0)})
    window.add_scalars({"a": torch.tensor(3.0), "b": torch.tensor(5.0)})
    assert window.means() == {"a": 2.0, "b": 5.0}


def test_window_goes_on():
    one, other = MetricWindow(), MetricWindow()
    one.add_scalars({"a": torch.tensor(0.1)})
    one.add("n", 3.0)
    other.load_state_dict(one.state_dict())
    one.add_scalars({"a": torch.tensor(0.7)})
    other.add_scalars({"a": torch.tensor(0.7)})
    assert one.means() == other.means() == {"n": 3.0, "a": pytest.approx(0.4)}


def test_window_does_not_hold_the_callers_tensors():
    window, value = MetricWindow(), torch.tensor(1.0)
    window.add_scalars({"a": value})
    value.fill_(100.0)
    assert window.means() == {"a": 1.0}


def test_stopwatch_keeps_activities_apart():
    watch = Stopwatch()
    watch.start()
    with watch.apart("evaluation"):
        time.sleep(0.05)
    seconds = watch.read()
    assert seconds["evaluation"] >= 0.05 > seconds["training"]
    watch.stop()
    before = watch.read()
    time.sleep(0.01)
    assert watch.read() == before


def test_bar_is_silent_without_terminal(capsys):
    bar = ProgressBar(10, 0, enabled=True)
    bar.update()
    bar.show({"loss_actor": 1.0})
    bar.close()
    assert capsys.readouterr() == ("", "")


def test_bar_shows_what_one_watches(monkeypatch, capsys):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    bar = ProgressBar(10, 4, enabled=True)
    bar.show({"eval/success_last": 0.96, "loss_actor": float("nan"), "frames_per_second": 1234.5})
    bar.update()
    bar.close()
    shown = capsys.readouterr().err
    assert "5/10" in shown
    assert "last=0.96, frames/s=1234" in shown
    assert "actor" not in shown


def test_tensorboard(tmp_path):
    logger = make_logger("tensorboard", tmp_path)
    assert isinstance(logger, TensorboardLogger)
    logger.log_scalar("loss", 1.0, step=3)
    logger.shutdown()
    assert list((tmp_path / "tensorboard").glob("events*"))
    assert make_logger(logger, tmp_path) is logger


def test_missing_logger_names_the_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install 'torchrl-amago\[wandb\]'"):
        make_logger("wandb", tmp_path)


def test_unknown_logger(tmp_path):
    with pytest.raises(ValueError, match=r"must be 'tensorboard', 'wandb' or .* got 'mlflow'"):
        make_logger("mlflow", tmp_path)
