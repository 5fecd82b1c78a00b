"""The trainer: collect whole trials, update a fixed number of times, now and then log, evaluate, save."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrl import logger as torchrl_logger
from torchrl.collectors import BaseCollector, Collector
from torchrl.data import ReplayBuffer
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.record.loggers import Logger

from torchrl_amago import _files as files
from torchrl_amago._validation import check_counts
from torchrl_amago.data import TrialCollector, TrialReplayBuffer
from torchrl_amago.data.mixture import TrialMixture, online_part
from torchrl_amago.trainers._parts import Components, Counts, Optimisation, Rollouts
from torchrl_amago.trainers._signals import on_signals
from torchrl_amago.trainers.checkpoint import (
    CheckpointStore,
    PolicyFiles,
    as_json,
    check_no_existing_run,
    describe_architecture,
    differences,
    policy_settings,
)
from torchrl_amago.trainers.hooks import Evaluator, TrialMonitor, evaluate_apart
from torchrl_amago.trainers.nonfinite import blame_inputs
from torchrl_amago.trainers.optim import FiniteOptimizationStepper
from torchrl_amago.trainers.report import Results, RunReport, evaluation_metrics

Outcome = Literal["finished", "interrupted", "preempted"]


@dataclass(frozen=True)
class Intervals:
    """Updates between rows of ``progress.csv``, evaluations and checkpoints, each at least 1."""

    log: int = 50
    evaluate: int = 500
    checkpoint: int = 500

    def __post_init__(self) -> None:
        named = {f"{name}_interval": value for name, value in asdict(self).items()}
        check_counts("It counts updates; give a larger number.", **named)


@dataclass(eq=False, repr=False)
class AMAGOTrainer:
    """Collect whole trials, update ``updates_per_round`` times, again and again.

    `docs/training.md` describes the files in ``run_dir``, signals, loggers, exact resuming and what may
    change between stop and resume.

    Args:
        collector: writes to the replay buffer and yields nothing.
        loss_module: called on ``[B, T]`` slices; the entries of its output that begin with ``loss``
            are added up, the others are metrics.
        replay_buffer: sampled with its own batch size, once ``can_sample()`` is True. Of a
            :class:`~torchrl_amago.data.TrialMixture`, only the buffer ``online`` is saved.
        total_updates: end of the run; the collector's ``total_frames`` may end it earlier.
        updates_per_round: updates after each batch of the collector.
        target_updater: stepped after every update, such as ``SoftUpdate(loss_module, tau=0.003)``.
        stepper: optimiser step; by default gradients are clipped at norm 1.
        exploration: module whose ``step(frames)`` follows the collected frames.
        policy: the policy whose weights are written; by default the collector's.
        evaluator: called without arguments; gives named numbers or ``TrialResults``. Make it seed
            its environment, so that every evaluation sees the same held-out tasks.
        intervals: updates between rows, evaluations and checkpoints.
        online_after: updates on what the buffer holds already, before anything is collected.
        loggers: ``"tensorboard"``, ``"wandb"`` or torchrl loggers, besides the table.
        progress_bar: a bar on a terminal, lines elsewhere; False for neither.
        success_threshold: an episode succeeds if its return is larger.
        seed: seeds torch, numpy, python and the environment when a new run starts.
        settings: values by name that a resumed run must agree with, besides the ``settings`` of
            policy and loss.
        options: values by name that a resumed run tells if they have changed.
        components: further parts by name, with ``state_dict`` and ``load_state_dict``.
        callbacks: called with the trainer after every update; numbers that they return by name join
            the next row as means.

    Example:
        >>> import tempfile
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_amago.data import TrialCollector, make_trial_buffer
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> from torchrl_amago.modules import make_policy
        >>> from torchrl_amago.objectives import amago_loss
        >>> from torchrl_amago.trainers import make_optimizer
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(8,)), episodes=2)
        >>> small = {"d_model": 16, "num_heads": 2, "num_layers": 1}
        >>> policy = make_policy(env, context_length=18, seq_model_options=small)
        >>> loss = amago_loss(policy)
        >>> rb = make_trial_buffer(1000, slice_length=18, batch_size=4, warn_short=False)
        >>> collector = TrialCollector(env, policy, frames_per_batch=8 * 18, replay_buffer=rb)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = AMAGOTrainer(
        ...         collector, loss, make_optimizer(loss), rb,
        ...         total_updates=4, updates_per_round=2, run_dir=folder, progress_bar=False,
        ...         target_updater=SoftUpdate(loss, tau=0.003))
        ...     trainer.train()
        'finished'
    """

    collector: BaseCollector
    loss_module: nn.Module
    optimizer: Optimizer
    replay_buffer: ReplayBuffer | TrialMixture
    _: KW_ONLY
    total_updates: int
    updates_per_round: int
    run_dir: str | Path
    target_updater: TargetNetUpdater | None = None
    scheduler: LRScheduler | None = None
    stepper: FiniteOptimizationStepper = field(default_factory=FiniteOptimizationStepper)
    exploration: nn.Module | None = None
    policy: nn.Module | None = None
    evaluator: Evaluator | None = None
    intervals: Intervals = Intervals()
    keep_checkpoints: int = 2
    online_after: int = 0
    loggers: Sequence[str | Logger] = ()
    progress_bar: bool = True
    success_threshold: float = 0.0
    seed: int | None = None
    settings: Mapping[str, object] = field(default_factory=dict)
    options: Mapping[str, object] = field(default_factory=dict)
    components: Mapping[str, Any] = field(default_factory=dict)
    callbacks: Sequence[Callable[[AMAGOTrainer], Mapping[str, float] | None]] = ()

    def __post_init__(self) -> None:
        check_counts("", total_updates=self.total_updates, updates_per_round=self.updates_per_round)
        self.online_buffer, self.run_dir = (
            online_part(self.replay_buffer),
            Path(self.run_dir).absolute(),
        )
        _check_collector(self.collector, self.online_buffer)
        mixture = self.replay_buffer if isinstance(self.replay_buffer, TrialMixture) else None
        self.callbacks = list(self.callbacks)
        if mixture is not None:
            self.callbacks.append(lambda _: mixture.metrics())
        if self.stepper.dump_dir is None:
            self.stepper.dump_dir = self.run_dir
        if self.policy is None:
            self.policy = getattr(self.collector, "policy", None)
        self.checkpoints = CheckpointStore(self.run_dir, self.keep_checkpoints)
        self.policy_files = PolicyFiles(self.run_dir, self.policy)
        self.report = RunReport(self.run_dir, self.loggers, self.progress_bar)
        self.monitor = TrialMonitor(
            self.online_buffer, self.report.window, self.run_dir, self.success_threshold
        )
        self.counts, self._rollouts = Counts(), Rollouts(self.collector)
        # All that a checkpoint holds besides the replay; loaded in this order.
        parts = {
            "report": self.report,
            "mixture": mixture,
            "loss": self.loss_module,
            "optimisation": Optimisation(self.optimizer, self.scheduler),
            "target_updater": self.target_updater,
            "exploration": self.exploration,
            "counts": self.counts,
            "monitor": self.monitor,
            "policy_files": self.policy_files,
            "rollouts": self._rollouts,
        }
        taken = parts.keys() & self.components.keys()
        if taken:
            raise ValueError(f"components must have names of their own, got {sorted(taken)}.")
        parts = {name: part for name, part in parts.items() if part is not None}
        self.components = Components(**parts, **self.components)
        self._sync_weights = _needs_weight_sync(self.collector, self.loss_module)
        self._written = 0  # steps in the buffer's history when frames were counted last
        self._saved_at = -1
        self._is_resumed = self._stop = self._has_lock = False
        self._outcome: Outcome = "finished"
        self._lock = contextlib.ExitStack()

    def train(self) -> Outcome:
        """Run to the end, or until a signal; the collector and loggers are closed then.

        Raises:
            FileExistsError: if ``run_dir`` holds a run and :meth:`resume` was not called.
            BlockingIOError: if another process trains in ``run_dir``.
            NonFiniteError: for NaN or infinity in data or loss; the weights stay as they were.
        """
        self._claim()
        try:
            if not self._is_resumed:
                check_no_existing_run(self.run_dir)
            with on_signals(self._stop_on_signal):
                self._begin()
                self._loop()
                self._end()
        except KeyboardInterrupt:
            self._outcome = "interrupted"
        except Exception as error:
            if self._outcome == "finished":
                raise
            # Signals reach worker processes too: errors from their death are expected.
            torchrl_logger.warning(f"after the signal: {error!r}")
        finally:
            self.report.close()
            self.collector.shutdown(raise_on_error=self._outcome == "finished")
            self._release()
        if self._outcome != "finished":
            torchrl_logger.warning(
                f"{self._outcome.capitalize()} at update {self.counts.updates}. Last checkpoint: "
                f"{self.checkpoints.latest()}. To go on: resume() and train()."
            )
        return self._outcome

    def _loop(self) -> None:
        """Collect and update; now and then write a row, evaluate, save."""
        counts, every, batches = self.counts, self.intervals, iter(self.collector)
        while not self.is_done:
            if not counts.updates_left and not self._collect(batches):
                break
            while counts.updates_left and not self.is_done:
                metrics = self.stepper.step(self, self.replay_buffer.sample())
                if self.scheduler is not None:
                    self.scheduler.step()
                if self.target_updater is not None:
                    self.target_updater.step()
                counts.updates += 1
                counts.updates_left -= 1
                self.report.tick()
                self.report.window.add_scalars(metrics)
                for callback in self.callbacks:
                    self.report.window.add_scalars(callback(self) or {})
                evaluation = self._evaluate() if counts.updates % every.evaluate == 0 else {}
                if evaluation or counts.updates % every.log == 0:
                    self._write_row(evaluation)
                if counts.updates % every.checkpoint == 0:
                    self._checkpoint()

    @property
    def is_done(self) -> bool:
        """True if no update is to follow."""
        return self._stop or self.counts.updates >= self.total_updates

    def request_stop(self) -> None:
        """End the run after the running update, as if that had been the last one."""
        self._stop = True

    def _begin(self) -> None:
        facts, groups = self._facts(), self.optimizer.param_groups
        options, num_done = facts["options"], self.counts.updates
        self.report.open(self.total_updates, num_done, facts["settings"] | options)
        self.report.say(
            f"{'goes on' if self._is_resumed else 'begins'} in {self.run_dir}, update {num_done} of "
            f"{self.total_updates}: {sum(p.numel() for g in groups for p in g['params'])} parameters "
            f"on {groups[0]['params'][0].device}, {options['num_envs']} environments, "
            f"{options['frames_per_batch']} steps and {self.updates_per_round} updates of "
            f"{options['batch_size']} slices a round"
        )
        if not self._is_resumed:
            self.monitor.skip_existing()
            if self.seed is not None:
                torch.manual_seed(self.seed)
                np.random.seed(self.seed % 2**32)
                random.seed(self.seed)
        self._sync()
        self._rollouts.begin()
        self._written = self.online_buffer.write_count
        if self._is_resumed:
            # A crash may have come between a checkpoint and its policy's file.
            self.policy_files.save_last()
        else:
            self._checkpoint()  # a run that dies early can be resumed, too

    def _collect(self, batches: Iterator[None]) -> bool:
        """Collect a batch and find how many updates follow; False at the collector's end."""
        counts, offline_left = self.counts, self.online_after - self.counts.updates
        if offline_left > 0:
            if not self.replay_buffer.can_sample():
                raise RuntimeError(
                    f"the first online_after={self.online_after} updates need trials in the replay "
                    "buffer, and there is none. Load some, or set online_after to 0."
                )
            counts.updates_left = min(self.updates_per_round, offline_left)
            return True
        self._sync()
        with blame_inputs(self.policy, self.run_dir):
            if next(batches, self) is self:
                return False  # the collector's own total_frames
        before, self._written = self._written, self.online_buffer.write_count
        is_local = isinstance(self.collector, Collector)
        frames = self.collector.requested_frames_per_batch if is_local else self._written - before
        counts.frames += frames
        if self.exploration is not None:
            self.exploration.step(frames)
        self.monitor.look()
        if self.replay_buffer.can_sample():
            counts.updates_left = self.updates_per_round
        elif not self.online_buffer.can_sample():
            self._check_capacity()
        return True

    def _check_capacity(self) -> None:
        """Stop a run that would wait for ever: its buffer was filled twice with too few trials."""
        buffer, capacity = self.online_buffer, self.online_buffer.storage.max_size
        if self._written >= 2 * capacity:
            raise RuntimeError(
                f"the replay buffer must hold min_trials={getattr(buffer.sampler, 'min_trials', 1)} "
                f"trials before the first update, got one of {capacity} steps, which holds "
                f"{getattr(buffer, 'num_trials', 'none')} of them. Raise its capacity."
            )

    def _sync(self) -> None:
        """Give the collector's copies of the policy the weights that the loss trains."""
        if self._sync_weights:
            self.collector.update_policy_weights_()

    def _end(self) -> None:
        if self._outcome == "interrupted":
            return
        if self._saved_at != self.counts.updates:
            self._checkpoint(goes_on=False)
        is_missing = self.evaluator is not None and self.counts.evaluated_at != self.counts.updates
        if self._outcome == "finished" and is_missing:
            self._write_row(self._evaluate())

    def _evaluate(self) -> Results:
        if self.evaluator is None:
            return {}
        with self.report.apart("evaluation"):
            results = evaluate_apart(self.evaluator)  # however often, it must not change training
        self.counts.evaluated_at = self.counts.updates
        self._sync()
        self.policy_files.offer(evaluation_metrics(results))
        return results

    def _write_row(self, evaluation: Results) -> None:
        rate = self.optimizer.param_groups[0]["lr"]
        extra = {"trials": self.monitor.trials, "learning_rate": rate}
        self.report.row(self.counts.updates, self.counts.frames, extra, evaluation)

    def _checkpoint(self, goes_on: bool = True) -> None:
        with self.report.apart("checkpoint"):
            self._rollouts.prepare()
            state, updates = self.components.state_dict(), self.counts.updates
            facts = {**self._facts(), "frames": self.counts.frames}
            self.checkpoints.save(updates, state, self.online_buffer, facts)
            self._saved_at = updates
            self._sync()
            self.policy_files.save_last()
            if goes_on and not self._rollouts.proceed():
                self.monitor.trials_restarted()

    def resume(self, path: str | Path | None = None, *, missing_ok: bool = False) -> AMAGOTrainer:
        """Go back to a checkpoint; :meth:`train` continues from there.

        Args:
            path: a run's folder (its last checkpoint is taken) or one checkpoint's folder. Default:
                ``run_dir``. From another run, that run's rows up to the checkpoint are copied.
            missing_ok: start anew where there is no checkpoint.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            FileExistsError: if it is another run's, and ``run_dir`` holds one already.
            BlockingIOError: if another process trains in ``run_dir``.
            DamagedError: if it is damaged; the message names the newest intact one.
            ValueError: if architecture or settings differ. In each case nothing has been changed.
        """
        self._claim()
        try:
            if missing_ok and CheckpointStore(path or self.run_dir).latest() is None:
                return self
            found = self.checkpoints.find(path)
            if found.parent.parent.resolve() != self.run_dir.resolve():
                check_no_existing_run(self.run_dir)
            facts = self._facts()
            state = self.checkpoints.load(found, facts)
            self.checkpoints.load_replay(found, self.online_buffer)
            self.components.load_state_dict(state)
        except BaseException:
            self._release()
            raise
        saved = files.read_manifest(found)["options"]
        for name, (there, here) in differences(saved, facts["options"]).items():
            torchrl_logger.info(f"resumed with {name}={here} instead of {there}")
        self._is_resumed, self._saved_at = True, self.counts.updates
        return self

    def _claim(self) -> None:
        """Lock the run's folder, and remove what dead processes left there."""
        if self._has_lock:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(files.lock(self.run_dir / ".lock", wait=False))
        self._has_lock = True
        for folder in (self.run_dir, self.checkpoints.folder):
            files.recover(folder)

    def _release(self) -> None:
        self._lock.close()
        self._has_lock = False

    def _stop_on_signal(self, outcome: Outcome) -> None:
        # Ctrl-C after a preemption is pressed by a person who doesn't want to wait.
        self._outcome, self._stop = outcome, True

    def _facts(self) -> dict[str, Any]:
        """What a resumed run must agree with, and options, which may change."""
        modules = {"loss": self.loss_module, "exploration": self.exploration}
        policy, loss = policy_settings(self.policy), getattr(self.loss_module, "settings", {})
        settings = {f"policy.{name}": value for name, value in policy.items()}
        settings |= {f"loss.{name}": value for name, value in loss.items()}
        tau, env = getattr(self.target_updater, "eps", None), getattr(self.collector, "env", None)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        options = {
            "total_updates": self.total_updates,
            "updates_per_round": self.updates_per_round,
            "online_after": self.online_after,
            **{f"{name}_interval": value for name, value in asdict(self.intervals).items()},
            "learning_rate": max(getattr(self.scheduler, "base_lrs", rates)),
            "clip_norm": self.stepper.clip_norm,
            "precision": self.stepper.precision,
            "tau": None if tau is None else round(1 - tau, 12),
            "batch_size": self.replay_buffer.batch_size,
            "num_envs": None if env is None else env.batch_size.numel(),
            "frames_per_batch": getattr(self.collector, "requested_frames_per_batch", None),
        }
        return {
            "architecture": describe_architecture(
                {name: module for name, module in modules.items() if module is not None},
                self.optimizer,
            ),
            "settings": as_json({**settings, **self.settings, "seed": self.seed}),
            "options": as_json({**options, **self.options}),
        }


def _needs_weight_sync(collector: BaseCollector, loss_module: nn.Module) -> bool:
    # On the device of the loss a local collector runs the policy itself, elsewhere a copy of it.
    if not isinstance(collector, Collector):
        return True
    policy, device = collector.policy, next(loss_module.parameters()).device
    weights = policy.parameters() if isinstance(policy, nn.Module) else ()
    return any(p.device != device for p in weights)


def _check_collector(collector: BaseCollector, replay_buffer: ReplayBuffer) -> None:
    own, problem = getattr(collector, "replay_buffer", None), None
    writes_pieces = isinstance(collector, Collector) and collector.trajs_per_batch is None
    if own is not replay_buffer:
        problem = f"a {type(collector).__name__} with replay_buffer={type(own).__name__}"
    elif (
        isinstance(replay_buffer, TrialReplayBuffer)
        and writes_pieces
        and not isinstance(collector, TrialCollector)
    ):
        problem = "one with trajs_per_batch=None, which writes fragments"
    if problem is not None:
        raise ValueError(
            f"the collector must write whole trials to the trainer's replay_buffer, got {problem}. "
            "Make it with TrialCollector(..., replay_buffer=replay_buffer)."
        )
