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


def signal_at(trainer, update, number=signal.SIGINT):
    """Send a signal, by default Ctrl-C, while this update runs."""
    step = trainer.stepper.step

    def sending(*args):
        if trainer.counts.updates == update - 1:
            signal.raise_signal(number)
        return step(*args)

    trainer.stepper.step = sending


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
    batch = trainer.replay_buffer.sample()
    out |= {f"next.{k}": v for k, v in batch.items(True, True)}
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
            assert value.dtype == b[key].dtype, key
            assert torch.equal(value, b[key]), key
        else:
            assert value == b[key], key
    assert_same_rows(run_a, run_b)


def assert_same_rows(one, other):
    a, b = read_progress(one), read_progress(other)
    assert list(a) == list(b)
    for name in a.keys() - set(CLOCK_COLUMNS):
        np.testing.assert_array_equal(a[name], b[name], err_msg=name)


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory):
    torch.manual_seed(0)
    run_dir = tmp_path_factory.mktemp("run") / "whole"
    return finish(make_trainer(run_dir, total_updates=TOTAL, evaluator=noisy_evaluator))


@pytest.mark.parametrize("end", [6, 12])
def test_finished_then_resumed(uninterrupted, tmp_path, end):
    # 6 falls between two of the 4 updates of a collected batch.
    first = make_trainer(tmp_path / "run", total_updates=end, evaluator=noisy_evaluator)
    first.train()
    torch.manual_seed(999)
    second = make_trainer(
        tmp_path / "run", total_updates=TOTAL, weights_seed=1, evaluator=noisy_evaluator
    )
    assert_same_run(uninterrupted, finish(second.resume()))


def test_interrupted_then_resumed(uninterrupted, tmp_path):
    options = {"total_updates": TOTAL, "evaluator": noisy_evaluator}
    for number, stop in enumerate([8, 13, 14, 23]):
        trainer = make_trainer(tmp_path / "run", weights_seed=number, **options)
        trainer.resume(missing_ok=True)
        signal_at(trainer, stop)
        assert trainer.train() == "interrupted"
        assert trainer.counts.updates == stop
    last = make_trainer(tmp_path / "run", weights_seed=9, **options)
    assert_same_run(uninterrupted, finish(last.resume()))


def test_killed_then_resumed(uninterrupted, tmp_path):
    class Killed(BaseException):
        pass

    def kill():
        if trainer.counts.updates == 12:
            raise Killed
        return noisy_evaluator()

    trainer = make_trainer(tmp_path / "run", total_updates=TOTAL, evaluator=kill)
    with pytest.raises(Killed):
        trainer.train()
    # What a death in the middle of a write would leave.
    (tmp_path / "run/checkpoints/.update_0000012.partial/replay").mkdir(parents=True)
    (tmp_path / "run/.policy.npz.partial").write_text("half")
    with (tmp_path / "run/progress.csv").open("a") as file:
        file.write("12,48,")
    resumed = make_trainer(tmp_path / "run", total_updates=TOTAL, evaluator=noisy_evaluator)
    assert_same_run(uninterrupted, finish(resumed.resume()))
    assert [path.name for path in (tmp_path / "run").rglob(".*")] == [".lock"]


def test_the_seed_decides_the_run(uninterrupted, tmp_path):
    torch.manual_seed(123)
    same = make_trainer(tmp_path / "a", total_updates=TOTAL, evaluator=noisy_evaluator)
    assert_same_run(uninterrupted, finish(same))
    other = make_trainer(tmp_path / "b", total_updates=TOTAL, evaluator=noisy_evaluator, seed=4)
    with pytest.raises(AssertionError):
        assert_same_run(uninterrupted, finish(other))


def test_evaluating_changes_no_training(uninterrupted, tmp_path):
    other = make_trainer(tmp_path / "run", total_updates=TOTAL)
    a, b = uninterrupted[0], finish(other)[0]
    a, b = ({k: v for k, v in x.items() if not k.startswith("report.")} for x in (a, b))
    assert a.keys() == b.keys()
    assert all(torch.equal(v, b[k]) for k, v in a.items() if isinstance(v, torch.Tensor))


def test_resume_from_a_chosen_checkpoint_into_another_folder(uninterrupted, tmp_path):
    make_trainer(tmp_path / "a", total_updates=12, evaluator=noisy_evaluator).train()
    before = (tmp_path / "a/progress.csv").read_text()
    for number, path in enumerate(["a", "a/checkpoints/update_0000006"]):
        fork = make_trainer(tmp_path / f"{number}", total_updates=TOTAL, evaluator=noisy_evaluator)
        assert_same_run(uninterrupted, finish(fork.resume(tmp_path / path)))
    assert (tmp_path / "a/progress.csv").read_text() == before


@pytest.mark.parametrize(("end", "fraction"), [(6, 0.7), (12, 1.0)])
def test_resuming_takes_the_learning_rate_it_is_given(tmp_path, end, fraction):
    # Within the rise over 10 updates, and after it.
    make_trainer(tmp_path / "run", total_updates=end, learning_rate=1e-2).train()
    resumed = make_trainer(tmp_path / "run", total_updates=end + 4, learning_rate=1e-3).resume()
    groups = resumed.optimizer.param_groups
    assert [group["lr"] for group in groups] == pytest.approx([1e-3 * fraction] * len(groups))
    assert resumed.scheduler.get_last_lr() == [group["lr"] for group in groups]
    resumed.train()
    assert groups[0]["lr"] == pytest.approx(1e-3)


def test_resuming_with_more_updates_goes_on_along_the_longer_schedule(tmp_path):
    options = dict(warmup_updates=2, final_lr_fraction=0.0)
    make_trainer(tmp_path / "run", total_updates=6, **options).train()
    resumed = make_trainer(tmp_path / "run", total_updates=10, **options).resume()
    # Four of the eight updates of the fall from 1e-2 to 0 are over.
    assert resumed.optimizer.param_groups[0]["lr"] == pytest.approx(5e-3)


def test_off_interval_end_may_be_resumed(tmp_path):
    make_trainer(tmp_path / "run", total_updates=7).train()
    longer = make_trainer(tmp_path / "run", total_updates=15).resume()
    assert longer.train() == "finished"
    names = [path.name for path in longer.checkpoints.paths()]
    assert names == ["update_0000015", "update_0000012"]
