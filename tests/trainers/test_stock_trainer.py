"""Our parts as hooks of TorchRL's own trainer, and TorchRL's parts in ours."""

from __future__ import annotations

import csv
from functools import partial

import numpy as np
import pytest
import torch
from torchrl.collectors import Collector, MultiCollector
from torchrl.objectives import SoftUpdate
from torchrl.record.loggers import CSVLogger, TensorboardLogger
from torchrl.trainers import ReplayBufferTrainer, TargetNetUpdaterHook, Trainer

from tests.data.trials import stock_buffer
from tests.processes import fork_workers
from tests.trainers.test_end_to_end import lake, small_policy
from torchrl_amago import HeldOutEvaluator, TrialCollector, amago_loss, make_trial_buffer
from torchrl_amago.trainers import AMAGOTrainer, Intervals, NonFiniteError, read_progress
from torchrl_amago.trainers.hooks import EvaluationHook, TrialMonitor
from torchrl_amago.trainers.optim import FiniteOptimizationStepper, make_optimizer


def make_parts(**buffer_options):
    env = lake(6)
    policy = small_policy(env, context_length=8, seq_model="gru")
    loss = amago_loss(policy, critic_options={"hidden_size": 16})
    rb = make_trial_buffer(500, slice_length=8, batch_size=4, warn_short=False, **buffer_options)
    return env, policy, loss, rb


def make_our_trainer(collector, loss, rb, run_dir, total_updates, **options):
    optimizer = make_optimizer(loss, learning_rate=1e-3)
    options |= {"updates_per_round": 2, "progress_bar": False, "seed": 0}
    options |= {"target_updater": SoftUpdate(loss, tau=0.01), "run_dir": run_dir}
    return AMAGOTrainer(collector, loss, optimizer, rb, total_updates=total_updates, **options)


def make_stock_trainer(folder, collector_class, logger, stepper=None, **buffer_options):
    env, policy, loss, rb = make_parts(**buffer_options)
    options = {"frames_per_batch": 6 * 8, "total_frames": 6 * 8 * 4, "replay_buffer": rb}
    options |= {"trajs_per_batch": 1} if collector_class is Collector else {}
    collector = collector_class(env, policy, **options)
    stepper = stepper or FiniteOptimizationStepper(dump_dir=folder)
    trainer = Trainer(
        collector=collector, replay_buffer=rb, total_frames=6 * 8 * 4, frame_skip=1,
        loss_module=loss, optimizer=make_optimizer(loss, learning_rate=1e-3),
        optimization_stepper=stepper, optim_steps_per_batch=3,
        logger=logger, log_interval=1, progress_bar=False,
    )  # fmt: skip
    trainer.register_op("process_optim_batch", ReplayBufferTrainer(rb, batch_size=4).sample)
    TargetNetUpdaterHook(SoftUpdate(loss, tau=0.01)).register(trainer, "targets")
    TrialMonitor(rb, run_dir=folder).register(trainer)
    held_out = HeldOutEvaluator(policy, lake(4))
    EvaluationHook(lambda: held_out.evaluate(4), interval=2).register(trainer)
    return trainer


@pytest.mark.parametrize("collector_class", [Collector, TrialCollector])
def test_a_stock_trainer_trains_and_logs(tmp_path, collector_class):
    trainer = make_stock_trainer(tmp_path, collector_class, CSVLogger("run", str(tmp_path)))
    before = {name: p.clone() for name, p in trainer.loss_module.named_parameters()}
    trainer.collector.shutdown, shutdown = lambda: None, trainer.collector.shutdown
    trainer.train()
    state = trainer.state_dict()
    shutdown()
    assert state["evaluation"] == {"batches": 4}
    assert state["trial_monitor"]["trials"] == trainer.replay_buffer.num_trials
    changed = [not torch.equal(p, before[n]) for n, p in trainer.loss_module.named_parameters()]
    assert sum(changed) > len(changed) / 2
    scalars = tmp_path / "run" / "scalars"
    names = {file.relative_to(scalars).as_posix() for file in scalars.rglob("*.csv")}
    for name in ("loss_actor", "grad_norm", "train/trial_return", "eval/success_last", "q_value/"):
        assert any(entry.startswith(name) for entry in names), (name, names)
    rows = list(csv.reader((scalars / "loss_qvalue.csv").read_text().splitlines()))
    assert len(rows) >= 2
    assert all(np.isfinite(float(row[1])) for row in rows)


def test_a_stock_trainer_with_tensorboard_and_priorities(tmp_path):
    logger = TensorboardLogger("run", str(tmp_path))
    trainer = make_stock_trainer(tmp_path, TrialCollector, logger, sample_by="priority")
    trainer.train()
    logger.experiment.flush()
    assert list(tmp_path.rglob("events*"))
    assert len(trainer.replay_buffer.sample()["priority_weight"].unique()) > 1  # set by the loss


def test_a_stock_trainer_stops_on_nan(tmp_path):
    class Spoilt(FiniteOptimizationStepper):
        def step(self, trainer, batch):
            batch["next", "reward"][0, 0] = torch.nan
            return super().step(trainer, batch)

    logger = CSVLogger("run", str(tmp_path))
    trainer = make_stock_trainer(tmp_path, TrialCollector, logger, Spoilt(dump_dir=tmp_path))
    with pytest.raises(NonFiniteError, match="training batch must be finite"):
        trainer.train()
    assert (tmp_path / "nonfinite_batch").is_dir()


@pytest.mark.parametrize(("kind", "whole_trials"), [("tensor", True), ("memmap", False)])
def test_our_trainer_takes_stock_buffers_and_collectors(tmp_path, kind, whole_trials):
    def make(total_updates):
        env, policy, loss, _ = make_parts()
        rb = stock_buffer(kind, 600, slice_length=8, batch_size=4)
        pieces = {"postproc": lambda batch: batch.reshape(-1)}
        options = {"frames_per_batch": 6 * 8, "total_frames": -1, "replay_buffer": rb}
        options |= {"trajs_per_batch": 1} if whole_trials else pieces
        collector = Collector(env, policy, **options)
        intervals = Intervals(log=2, checkpoint=4)
        return make_our_trainer(collector, loss, rb, tmp_path, total_updates, intervals=intervals)

    assert make(4).train() == "finished"
    resumed = make(8).resume()
    assert len(resumed.replay_buffer) > 0
    assert resumed.train() == "finished"
    rows = read_progress(tmp_path)
    assert rows["frames"].tolist() == [48.0 * n for n in range(1, 5)]
    assert np.isfinite(rows["loss_actor"]).all()
    assert rows["trials"][-1] > rows["trials"][1] > 0
    assert rows["train/trial_length"][-1] > 0


@pytest.mark.parametrize("sync", [True, False])
def test_our_trainer_takes_collectors_of_several_processes(tmp_path, sync, monkeypatch):
    fork_workers(monkeypatch)
    env, policy, loss, rb = make_parts(path=tmp_path / "replay")
    env.close()
    collector = MultiCollector(
        [partial(lake, 6)] * 2, policy, sync=sync, collector_class=TrialCollector,
        frames_per_batch=2 * 6 * 8, total_frames=-1, replay_buffer=rb,
    )  # fmt: skip
    options = {"exploration": policy.exploration, "policy": policy}
    options["intervals"] = Intervals(log=2, checkpoint=2)  # and the workers go on
    trainer = make_our_trainer(collector, loss, rb, tmp_path / "run", 4, **options)
    assert trainer.train() == "finished"
    rows = read_progress(tmp_path / "run")
    # Asynchronous workers go on writing.
    assert 0 < rows["frames"][-1] <= rb.write_count
    assert rows["trials"][-1] > 0
    assert (tmp_path / "run" / "policy.npz").exists()
