"""The loop: order of an update's steps, rounds, rows, stops, and errors."""

from __future__ import annotations

import logging
import signal

import numpy as np
import pytest
import torch
from torchrl import logger as torchrl_logger
from torchrl.collectors import Collector
from torchrl.objectives import SoftUpdate

from tests.data.trials import content_of
from tests.trainers.tiny import GuessTask, make_trainer, stop_at
from torchrl_amago.trainers import CLOCK_COLUMNS, AMAGOTrainer, Intervals, read_progress
from torchrl_amago.trainers.optim import FiniteOptimizationStepper, make_optimizer


@pytest.mark.parametrize("clip_each", [False, True])
def test_one_update_by_hand(tmp_path, clip_each):
    """Clip, optimiser, warm-up, targets, in this order, against the same steps written out."""
    stepper = FiniteOptimizationStepper(0.1, clip_each=clip_each)
    options = {"total_updates": 1, "warmup_updates": 4, "min_trials": 2}
    trainer = make_trainer(tmp_path / "a", stepper=stepper, **options)
    seen, step = {}, stepper.step

    def remember(trainer, batch):
        seen["rng"], seen["batch"] = torch.get_rng_state(), batch.clone()
        seen["loss"] = {k: v.clone() for k, v in trainer.loss_module.state_dict().items()}
        return step(trainer, batch)

    stepper.step = remember
    trainer.train()

    loss = make_trainer(tmp_path / "b", **options).loss_module
    updater = SoftUpdate(loss, tau=0.1)
    loss.load_state_dict(seen["loss"])
    optimizer = make_optimizer(loss, learning_rate=1e-2 / 4)
    torch.set_rng_state(seen["rng"])
    out = loss(seen["batch"])
    (out["loss_actor"] + out["loss_qvalue"]).backward()
    networks = (loss.actor_network_params, loss.critic_network_params) if clip_each else (loss,)
    norms = [torch.nn.utils.clip_grad_norm_(part.parameters(), 0.1) for part in networks]
    assert max(norms) > 0.1
    optimizer.step()
    updater.step()
    torch.testing.assert_close(trainer.loss_module.state_dict(), loss.state_dict())
    # The first step of Adam is the same for gradients of any scale; its moments are not.
    moments = [[s["exp_avg"] for s in o.state.values()] for o in (trainer.optimizer, optimizer)]
    torch.testing.assert_close(*moments)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(1e-2 * 2 / 4)


def test_rows(tmp_path):
    trainer = make_trainer(tmp_path, total_updates=12, evaluator=lambda: {"x": 7.0})
    trainer.train()
    rows = read_progress(tmp_path)
    assert rows["update"].tolist() == [4, 6, 8, 12]
    np.testing.assert_array_equal(rows["eval/x"], [np.nan, 7, np.nan, 7])
    assert set(CLOCK_COLUMNS) <= rows.keys()
    assert {"loss_actor", "loss_qvalue", "td_error", "grad_norm", "learning_rate"} <= rows.keys()
    assert rows["frames"][-1] == trainer.counts.frames == trainer.exploration.frames
    assert rows["trials"][-1] == trainer.monitor.trials
    assert (np.diff(rows["seconds_training"]) > 0).all()


def updates_by_batch(trainer):
    """Train; return the number of updates before each batch that was collected."""
    batches, update = [], trainer.monitor.update
    trainer.monitor.update = lambda: batches.append(trainer.counts.updates) or update()
    trainer.train()
    return batches


def test_rounds(tmp_path):
    # 4 steps in a batch are 1 step of each of the 4 rows: no trial ends in the first 3 batches.
    waiting = make_trainer(tmp_path / "a", total_updates=4, frames_per_batch=4, min_trials=9)
    batches = updates_by_batch(waiting)
    assert len(batches) > 8
    assert set(batches) == {0}
    assert waiting.monitor.trials >= 9
    trainer = make_trainer(tmp_path / "b", total_updates=9, updates_per_round=2)
    assert updates_by_batch(trainer)[-5:] == [0, 2, 4, 6, 8]
    assert waiting.counts.updates == 4  # trainers share no counters


def test_total_frames_end_the_run(tmp_path):
    trainer = make_trainer(tmp_path, total_updates=10_000, total_frames=48)
    assert trainer.train() == "finished"
    assert trainer.counts.frames == 48
    assert trainer.counts.updates % 4 == 0


def test_a_buffer_too_small_for_min_trials_is_explained(tmp_path):
    trainer = make_trainer(tmp_path, total_updates=4, capacity=30, min_trials=9, total_frames=408)
    with pytest.raises(RuntimeError, match="must hold min_trials=9 .* one of 30 steps .* capacity"):
        trainer.train()


def test_callbacks_and_request_stop(tmp_path):
    evaluations = []

    def callback(trainer):
        if trainer.counts.updates == 8:
            trainer.request_stop()
        return {"parity": trainer.counts.updates % 2}

    evaluator = lambda: evaluations.append(1) or {"x": 0.0}  # noqa: E731
    trainer = make_trainer(tmp_path, total_updates=100, callbacks=[callback], evaluator=evaluator)
    assert trainer.train() == "finished"
    assert trainer.counts.updates == 8
    rows = read_progress(tmp_path)
    # The last update is evaluated too, and no update twice.
    assert rows["update"].tolist() == [4, 6, 8, 8]
    assert len(evaluations) == 2
    assert rows["parity"][:3].tolist() == [0.5, 0.5, 0.5]
    assert trainer.checkpoints.latest().name == "update_0000008"


def test_bf16_precision(tmp_path):
    stepper, dtypes = FiniteOptimizationStepper(precision="bf16"), set()
    trainer = make_trainer(tmp_path, total_updates=2, stepper=stepper)
    compute = trainer.loss_module.forward

    def spy(batch):
        dtypes.add(torch.nn.functional.linear(torch.ones(1, 1), torch.ones(1, 1)).dtype)
        return compute(batch)

    trainer.loss_module.forward = spy
    trainer.train()
    assert dtypes == {torch.bfloat16}
    assert {p.dtype for p in trainer.loss_module.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("number", "outcome", "saved_at"),
    [
        (signal.SIGINT, "interrupted", 6),
        (signal.SIGTERM, "preempted", 9),
        (signal.SIGHUP, "preempted", 9),
        (signal.SIGUSR1, "preempted", 9),
    ],
)
def test_signals_stop_in_good_order(tmp_path, caplog, number, outcome, saved_at):
    stop = stop_at(9, lambda: signal.raise_signal(number))
    trainer = make_trainer(tmp_path, total_updates=100, callbacks=[stop], loggers=["tensorboard"])
    handler = signal.getsignal(number)
    torchrl_logger.addHandler(caplog.handler)
    assert trainer.train() == outcome
    torchrl_logger.removeHandler(caplog.handler)
    (message,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING]
    latest = tmp_path / f"checkpoints/update_{saved_at:07d}"
    assert message == (
        f"{outcome.capitalize()} at update 9. Last checkpoint: {latest}. "
        "To go on: resume() and train()."
    )
    assert trainer.collector.closed
    assert not trainer.report.loggers[0].is_alive
    assert signal.getsignal(number) is handler
    assert trainer.checkpoints.latest() == latest


def test_ctrl_c_twice_stops_at_once(tmp_path):
    after = []

    def press_twice(_):
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        after.append(1)

    trainer = make_trainer(tmp_path, total_updates=100, callbacks=[press_twice])
    assert trainer.train() == "interrupted"
    assert not after
    assert trainer.collector.closed


def test_a_folder_with_a_run_is_refused(tmp_path):
    make_trainer(tmp_path, total_updates=4).train()
    before = content_of(tmp_path)
    with pytest.raises(FileExistsError, match="holds progress.csv"):
        make_trainer(tmp_path, total_updates=4).train()
    make_trainer(tmp_path / "b", total_updates=8).resume(tmp_path).train()
    with pytest.raises(FileExistsError, match="holds progress.csv"):
        make_trainer(tmp_path, total_updates=8).resume(tmp_path / "b")
    assert before.items() <= content_of(tmp_path).items()


def test_a_refused_resume_changes_nothing_and_releases_the_lock(tmp_path):
    make_trainer(tmp_path, total_updates=4).train()
    csv = (tmp_path / "progress.csv").read_text()
    for options, match in (
        ({"hidden_size": 16}, r"actor_network_params.module.0.weight: 8x3 float32 there"),
        ({"capacity": 50}, "differ in 1 entries: capacity: 100 there, 50 here"),
    ):
        other = make_trainer(tmp_path, **options)
        before = {k: v.clone() for k, v in other.loss_module.state_dict().items()}
        with pytest.raises(ValueError, match=match):
            other.resume()
        assert all(torch.equal(v, before[k]) for k, v in other.loss_module.state_dict().items())
        assert (other.counts.updates, len(other.replay_buffer)) == (0, 0)
    assert (tmp_path / "progress.csv").read_text() == csv
    assert make_trainer(tmp_path, total_updates=6).resume().train() == "finished"


@pytest.mark.parametrize(
    ("make_collector", "problem"),
    [
        (lambda **_: [], "a list with replay_buffer=NoneType"),
        (lambda replay_buffer, **options: Collector(**options), "a Collector .*=NoneType"),
        (Collector, "a Collector .* and trajs_per_batch=None"),
    ],
)
def test_collector_must_fit(tmp_path, make_collector, problem):
    good = make_trainer(tmp_path)
    rb = good.replay_buffer
    options = {"frames_per_batch": 4, "total_frames": -1, "replay_buffer": rb}
    collector = make_collector(create_env_fn=GuessTask(), **options)
    parts = (collector, good.loss_module, good.optimizer, rb)
    with pytest.raises(ValueError, match=f"whole trials to the trainer's .*, got {problem}"):
        AMAGOTrainer(*parts, total_updates=1, updates_per_round=1, run_dir=tmp_path)
    if isinstance(collector, Collector):
        collector.shutdown()


@pytest.mark.parametrize("name", ["log", "evaluate", "checkpoint"])
def test_intervals_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name}_interval must be at least 1, got 0"):
        Intervals(**{name: 0})


@pytest.mark.gpu
def test_policy_copy_on_another_device_follows(tmp_path):
    trainer = make_trainer(tmp_path, total_updates=8, device="cuda")
    policy = trainer.collector.policy
    assert {p.device.type for p in policy.parameters()} == {"cpu"}
    trainer.train()
    weights = dict(trainer.loss_module.actor_network_params.flatten_keys(".").items())
    for name, value in policy[0].state_dict().items():
        torch.testing.assert_close(weights[name].cpu(), value)
