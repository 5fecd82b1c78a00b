"""A run that was stopped and resumed equals the uninterrupted one, bit for bit."""

from __future__ import annotations

import signal

import numpy as np
import pytest
import torch

from tests.trainers.tiny import make_trainer
from torchrl_amago.trainers import CLOCK_COLUMNS, read_progress

TOTAL = 24


def noisy_evaluator():
    """Draws random numbers, as evaluating a stochastic policy does."""
    return {"score": float(torch.rand(()))}


def stop_by_signal(trainer, update, number=signal.SIGINT):
    """Train until a signal, by default Ctrl-C, that is sent while this update runs."""
    step = trainer.stepper.step

    def sending(*args):
        if trainer.counts.updates == update - 1:
            signal.raise_signal(number)
        return step(*args)

    trainer.stepper.step = sending
    assert trainer.train() == ("interrupted" if number == signal.SIGINT else "preempted")


def fingerprint(trainer):
    """Every tensor and number a run is made of, then the next batch it would draw."""
    state = trainer.components.state_dict()
    for clock in ("seconds", "last", "table"):
        state["report"].pop(clock)
    # Rollouts have other numbers in every process. What memory holds shows in the replay.
    out = {k: v for k, v in flatten(state) if "._stream" not in k and ".memories." not in k}
    buffer = trainer.online_buffer
    out |= {f"replay.{k}": v.clone() for k, v in buffer[:].items(True, True)}
    out["replay.written"] = buffer.write_count
    out |= {f"next.{k}": v for k, v in trainer.replay_buffer.sample().items(True, True)}
    return out


def flatten(value, prefix=""):
    if isinstance(value, dict):
        for key, item in value.items():
            yield from flatten(item, f"{prefix}{key}.")
    elif isinstance(value, (tuple, list)):
        yield from flatten(dict(enumerate(value)), prefix)
    else:
        yield prefix, value


def finish(trainer):
    """Train to the end and look at everything before another random number is drawn."""
    assert trainer.train() == "finished"
    return fingerprint(trainer), trainer.run_dir


def assert_same_run(one, other):
    (a, run_a), (b, run_b) = one, other
    assert a.keys() == b.keys()
    assert len(a) > 100
    for key, value in a.items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, b[key], rtol=0, atol=0, msg=key)
        else:
            assert value == b[key], key
    rows_a, rows_b = read_progress(run_a), read_progress(run_b)
    assert list(rows_a) == list(rows_b)
    for name in rows_a.keys() - set(CLOCK_COLUMNS):
        np.testing.assert_array_equal(rows_a[name], rows_b[name], err_msg=name)


def make_noisy(run_dir, total_updates=TOTAL, evaluator=noisy_evaluator, **options):
    return make_trainer(run_dir, total_updates=total_updates, evaluator=evaluator, **options)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.manual_seed(0)
    return finish(make_noisy(tmp_path_factory.mktemp("run") / "whole"))


# 6, unlike 12, falls between two of the 4 updates of a collected batch.
@pytest.mark.parametrize(("ends", "interrupts"), [([6], []), ([12], []), ([], [8, 13, 14, 23])])
def test_finished_or_interrupted_then_resumed(uninterrupted, tmp_path, ends, interrupts):
    for end in ends:
        assert make_noisy(tmp_path, end).train() == "finished"
    for number, stop in enumerate(interrupts):
        trainer = make_noisy(tmp_path, weights_seed=number).resume(missing_ok=True)
        stop_by_signal(trainer, stop)
        assert trainer.counts.updates == stop
    assert_same_run(uninterrupted, finish(make_noisy(tmp_path, weights_seed=9).resume()))


def test_killed_then_resumed(uninterrupted, tmp_path):
    class Killed(BaseException):
        pass

    def kill():
        if trainer.counts.updates == 12:
            raise Killed
        return noisy_evaluator()

    trainer = make_noisy(tmp_path, evaluator=kill)
    with pytest.raises(Killed):
        trainer.train()
    # What a death in the middle of a write, or of a checkpoint's replacement, would leave.
    (tmp_path / "checkpoints/.update_0000012.partial/replay").mkdir(parents=True)
    (tmp_path / ".policy.npz.partial").write_text("half")
    with (tmp_path / "progress.csv").open("a") as file:
        file.write("12,48,")
    path = trainer.checkpoints.latest()
    path.rename(path.with_name(f".{path.name}.previous"))
    path.with_name(f".{path.name}.partial").mkdir()
    assert_same_run(uninterrupted, finish(make_noisy(tmp_path).resume()))
    assert [path.name for path in tmp_path.rglob(".*")] == [".lock"]


def test_the_seed_decides_the_run(uninterrupted, tmp_path):
    torch.manual_seed(123)
    assert_same_run(uninterrupted, finish(make_noisy(tmp_path / "a")))
    other = finish(make_noisy(tmp_path / "b", seed=4))
    with pytest.raises(AssertionError):
        assert_same_run(uninterrupted, other)


def test_evaluating_changes_no_training(uninterrupted, tmp_path):
    a, b = uninterrupted[0], finish(make_trainer(tmp_path, total_updates=TOTAL))[0]
    a, b = ({k: v for k, v in x.items() if not k.startswith("report.")} for x in (a, b))
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[k]) for k, v in a.items() if isinstance(v, torch.Tensor))


def test_resume_from_a_chosen_checkpoint_into_another_folder(uninterrupted, tmp_path):
    make_noisy(tmp_path / "a", 12).train()
    before = (tmp_path / "a/progress.csv").read_text()
    for number, path in enumerate(["a", "a/checkpoints/update_0000006"]):
        fork = make_noisy(tmp_path / f"{number}").resume(tmp_path / path)
        assert_same_run(uninterrupted, finish(fork))
    assert (tmp_path / "a/progress.csv").read_text() == before


@pytest.mark.parametrize(
    ("end", "options", "rate", "rate_at_the_end"),
    [
        # Within the rise over 10 updates, and after it.
        (6, {"learning_rate": 1e-3}, 0.7e-3, 1e-3),
        (12, {"learning_rate": 1e-3}, 1e-3, 1e-3),
        # Four of the eight updates of the fall from 1e-2 to 0 are over.
        (6, {"warmup_updates": 2, "final_lr_fraction": 0.0}, 5e-3, 0.0),
    ],
)
def test_a_resumed_run_follows_its_own_schedule(tmp_path, end, options, rate, rate_at_the_end):
    make_trainer(tmp_path, total_updates=end, **{**options, "learning_rate": 1e-2}).train()
    resumed = make_trainer(tmp_path, total_updates=end + 4, **options).resume()
    groups = resumed.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([rate] * len(groups))
    assert resumed.scheduler.get_last_lr() == [group["lr"] for group in groups]
    resumed.train()
    assert groups[0]["lr"] == pytest.approx(rate_at_the_end)


def test_off_interval_end_may_be_resumed(tmp_path):
    with pytest.raises(FileNotFoundError, match="resuming needs a checkpoint"):
        make_trainer(tmp_path).resume()
    make_trainer(tmp_path, total_updates=7).train()
    longer = make_trainer(tmp_path, total_updates=15).resume()
    assert longer.train() == "finished"
    names = [path.name for path in longer.checkpoints.paths()]
    assert names == ["update_0000015", "update_0000012"]
