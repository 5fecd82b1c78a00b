"""The trainer: collect whole trials, update a fixed number of times, now and then log, evaluate, save."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
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

from torchrl_amago import files
from torchrl_amago.choice import check_counts
from torchrl_amago.data import TrialCollector, TrialReplayBuffer
from torchrl_amago.data.mixture import TrialMixture, online_part
from torchrl_amago.evaluation import TrialResults
from torchrl_amago.trainers.checkpoint import (
    CheckpointStore,
    as_json,
    describe_architecture,
    differing_entries,
    refuse_existing_run,
)
from torchrl_amago.trainers.hooks import Evaluator, TrialMonitor, evaluate_apart
from torchrl_amago.trainers.nonfinite import blame_inputs
from torchrl_amago.trainers.optim import FiniteOptimizationStepper, update_priorities
from torchrl_amago.trainers.parts import Components, Counts, Optimisation, RandomState, Rollouts
from torchrl_amago.trainers.policy_files import PolicyFiles, policy_settings
from torchrl_amago.trainers.report import RunReport, evaluation_metrics
from torchrl_amago.trainers.signals import on_signals

Outcome = Literal["finished", "interrupted", "preempted"]


@dataclass(frozen=True)
class Intervals:
    """Updates between rows of ``progress.csv``, evaluations and checkpoints.

    Raises:
        ValueError: for an interval smaller than 1.
    """

    log: int = 50
    evaluate: int = 500
    checkpoint: int = 500

    def __post_init__(self) -> None:
        named = {f"{name}_interval": value for name, value in asdict(self).items()}
        check_counts("It counts updates; give a larger number.", **named)


class AMAGOTrainer:
    """Collect whole trials, update ``updates_per_round`` times, again and again.

    `docs/training.md` describes the files in ``run_dir``, signals, loggers and what may change between
    stop and resume. A resumed run equals one that was never stopped, bit for bit, on a CPU, with a
    collector of this process and a buffer that doesn't prefetch. Native tasks under
    :class:`~torchrl_amago.data.TrialCollector` go on in mid-trial; other environments are seeded anew at
    each checkpoint, which ends the trials in progress.

    Args:
        collector: writes to the replay buffer and yields nothing. With several processes, frames
            are counted by the buffer's ``write_count``, and resuming is approximate.
        loss_module: called on ``[B, T]`` slices; the entries of its output that begin with ``loss``
            are added up, the others are metrics.
        optimizer: see :func:`~torchrl_amago.trainers.make_optimizer`.
        replay_buffer: sampled with its own batch size, once ``can_sample()`` is True. Of a
            :class:`~torchrl_amago.data.TrialMixture`, only the buffer ``online`` is saved.
        total_updates: end of the run; the collector's ``total_frames`` may end it earlier.
        updates_per_round: updates after each batch of the collector.
        run_dir: folder for everything the run writes.
        target_updater: stepped after every update, such as ``SoftUpdate(loss_module, tau=0.003)``.
        scheduler: stepped after every update, see :func:`~torchrl_amago.trainers.make_schedule`.
        stepper: optimiser step; by default gradients are clipped at norm 1.
        exploration: module whose ``step(frames)`` follows the collected frames.
        policy: the policy whose weights are written; by default the collector's.
        evaluator: called without arguments; gives named numbers or ``TrialResults``. Make it seed
            its environment, so that every evaluation sees the same held-out tasks.
        intervals: updates between rows, evaluations and checkpoints.
        keep_checkpoints: number of checkpoints kept.
        online_after: updates on what the buffer holds already, before anything is collected.
        loggers: ``"tensorboard"``, ``"wandb"`` or torchrl loggers, besides the table.
        progress_bar: a bar on a terminal, lines elsewhere; False for neither.
        success_threshold: an attempt succeeds if its return is larger.
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

    def __init__(
        self,
        collector: BaseCollector,
        loss_module: nn.Module,
        optimizer: Optimizer,
        replay_buffer: ReplayBuffer | TrialMixture,
        *,
        total_updates: int,
        updates_per_round: int,
        run_dir: str | Path,
        target_updater: TargetNetUpdater | None = None,
        scheduler: LRScheduler | None = None,
        stepper: FiniteOptimizationStepper | None = None,
        exploration: nn.Module | None = None,
        policy: nn.Module | None = None,
        evaluator: Evaluator | None = None,
        intervals: Intervals | None = None,
        keep_checkpoints: int = 2,
        online_after: int = 0,
        loggers: Sequence[str | Logger] = (),
        progress_bar: bool = True,
        success_threshold: float = 0.0,
        seed: int | None = None,
        settings: Mapping[str, object] | None = None,
        options: Mapping[str, object] | None = None,
        components: Mapping[str, Any] | None = None,
        callbacks: Sequence[Callable[[AMAGOTrainer], Mapping[str, float] | None]] = (),
    ) -> None:
        self.online_buffer = online_part(replay_buffer)
        _check_collector(collector, self.online_buffer)
        counts = dict(total_updates=total_updates, updates_per_round=updates_per_round)
        check_counts("Give a larger number.", **counts)
        self.collector, self.loss_module, self.optimizer = collector, loss_module, optimizer
        self.replay_buffer, self.run_dir = replay_buffer, Path(run_dir)
        self.total_updates, self.updates_per_round = total_updates, updates_per_round
        self.target_updater, self.scheduler = target_updater, scheduler
        self.stepper = FiniteOptimizationStepper() if stepper is None else stepper
        if self.stepper.dump_dir is None:
            self.stepper.dump_dir = self.run_dir
        self.exploration, self.evaluator = exploration, evaluator
        self.policy = getattr(collector, "policy", None) if policy is None else policy
        self.intervals = Intervals() if intervals is None else intervals
        self.online_after, self.callbacks = online_after, list(callbacks)
        self.seed, self.settings, self.options = seed, dict(settings or {}), dict(options or {})
        self.checkpoints = CheckpointStore(self.run_dir, keep_checkpoints)
        self.policy_files = PolicyFiles(self.run_dir, self.policy)
        self.report = RunReport(self.run_dir, loggers, progress_bar)
        self.monitor = TrialMonitor(
            self.online_buffer, self.report.window, self.run_dir, success_threshold
        )
        self.counts = Counts()
        self._rollouts, self._random = Rollouts(collector), RandomState()
        self.components = self._make_components(components or {})
        self._sync_weights = _needs_weight_sync(collector, loss_module)
        self._written = 0  # steps in the buffer's history when frames were counted last
        self._saved_at = -1
        self._is_resumed = self._stop = self._has_lock = False
        self._outcome: Outcome = "finished"
        self._lock = contextlib.ExitStack()

    def _make_components(self, own: Mapping[str, Any]) -> Components:
        """Collect everything that a checkpoint holds besides the replay; loaded in this order."""
        is_mixture = isinstance(self.replay_buffer, TrialMixture)
        parts = {
            "report": self.report,
            "mixture": self.replay_buffer if is_mixture else None,
            "loss": self.loss_module,
            "optimisation": Optimisation(self.optimizer, self.scheduler),
            "target_updater": self.target_updater,
            "exploration": self.exploration,
            "counts": self.counts,
            "monitor": self.monitor,
            "policy_files": self.policy_files,
            "rollouts": self._rollouts,
            "random": self._random,
        }
        taken = parts.keys() & own.keys()
        if taken:
            raise ValueError(f"components must have names of their own, got {sorted(taken)}.")
        return Components(**{k: part for k, part in parts.items() if part is not None}, **own)

    # -- the loop ------------------------------------------------------------------------------

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
                refuse_existing_run(self.run_dir)
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
                batch = self.stepper.prepare(self.replay_buffer.sample(), self.loss_module)
                metrics = self.stepper.update(self.loss_module, self.optimizer, batch)
                update_priorities(self.replay_buffer, batch)
                if self.scheduler is not None:
                    self.scheduler.step()
                if self.target_updater is not None:
                    self.target_updater.step()
                counts.updates += 1
                counts.updates_left -= 1
                self.report.window.add_scalars(metrics)
                self.report.tick()
                self._call_back()
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
        is_new, hparams = not self._is_resumed, {**self._settings(), **self._options()}
        self.report.open(self.total_updates, self.counts.updates, hparams)
        self.report.say(self._describe())
        if is_new and self.seed is not None:
            torch.manual_seed(self.seed)
            np.random.seed(self.seed % 2**32)
            random.seed(self.seed)
        if is_new:
            self.monitor.skip_existing()
        self._sync()
        self._random.begin()
        self._rollouts.begin()
        self._written = self.online_buffer.write_count
        if is_new:
            self._checkpoint()  # a run that dies early can be resumed, too
        else:
            # A crash may have come between a checkpoint and its policy's file.
            self.policy_files.save_last()
        self.report.stopwatch.start()

    def _collect(self, batches: Iterator[None]) -> bool:
        """Collect a batch and find how many updates follow; False at the collector's end."""
        counts = self.counts
        offline_left = self.online_after - counts.updates
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
        written, before = self.online_buffer.write_count, self._written
        is_local = isinstance(self.collector, Collector)
        frames = self.collector.requested_frames_per_batch if is_local else written - before
        self._written = written
        counts.frames += frames
        if self.exploration is not None:
            self.exploration.step(frames)
        self.monitor.look()
        if self.replay_buffer.can_sample():
            counts.updates_left = self.updates_per_round
        else:
            self._check_capacity()
        return True

    def _check_capacity(self) -> None:
        """Stop a run that would wait for ever: its buffer was filled twice with too few trials."""
        buffer = self.online_buffer
        capacity = buffer.storage.max_size
        if buffer.can_sample() or buffer.write_count < 2 * capacity:
            return
        raise RuntimeError(
            f"the replay buffer must hold min_trials={getattr(buffer.sampler, 'min_trials', 1)} "
            f"trials before the first update, got one of {capacity} steps, which holds "
            f"{getattr(buffer, 'num_trials', 'none')} of those that are collected. Raise its "
            "capacity (make_trainer's capacity), or lower min_trials."
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

    # -- rows, evaluations, checkpoints --------------------------------------------------------

    def _call_back(self) -> None:
        for callback in self.callbacks:
            for name, value in (callback(self) or {}).items():
                self.report.window.add(name, float(value))
        if isinstance(self.replay_buffer, TrialMixture):
            for name, value in self.replay_buffer.metrics().items():
                self.report.window.add(name, value)

    def _evaluate(self) -> Mapping[str, float] | TrialResults:
        if self.evaluator is None:
            return {}
        with self.report.stopwatch.apart("evaluation"):
            results = evaluate_apart(self.evaluator)  # however often, it must not change training
        self.counts.evaluated_at = self.counts.updates
        self._sync()
        self.policy_files.offer(evaluation_metrics(results))
        return results

    def _write_row(self, evaluation: Mapping[str, float] | TrialResults) -> None:
        learning_rate = self.optimizer.param_groups[0]["lr"]
        extra = {"trials": self.monitor.trials, "learning_rate": learning_rate}
        self.report.row(self.counts.updates, self.counts.frames, extra, evaluation)

    def _checkpoint(self, goes_on: bool = True) -> None:
        with self.report.stopwatch.apart("checkpoint"):
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
            source = found.parent.parent
            if source.resolve() != self.run_dir.resolve():
                refuse_existing_run(self.run_dir)
                self.report.source = source
            state = self.checkpoints.load(found, self._facts())
            self.checkpoints.load_replay(found, self.online_buffer)
            self.components.load_state_dict(state)
        except BaseException:
            self._release()
            raise
        self._tell_changes(files.read_manifest(found)["options"])
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

    # -- what a run is made of -----------------------------------------------------------------

    def _facts(self) -> dict[str, Any]:
        """Everything that a resumed run is compared with."""
        modules = {"loss": self.loss_module}
        if self.exploration is not None:
            modules["exploration"] = self.exploration
        return {
            "architecture": describe_architecture(modules, self.optimizer),
            "settings": as_json(self._settings()),
            "options": as_json(self._options()),
        }

    def _settings(self) -> dict[str, Any]:
        """Values that a resumed run must agree with."""
        loss = getattr(self.loss_module, "settings", {})
        parts = {"policy": policy_settings(self.policy), "loss": loss}
        own = {
            f"{part}.{k}": value for part, values in parts.items() for k, value in values.items()
        }
        return {**own, **self.settings, "seed": self.seed}

    def _options(self) -> dict[str, Any]:
        """Values that may change when a run is resumed."""
        scheduler, tau = self.scheduler, getattr(self.target_updater, "eps", None)
        rates = [group["lr"] for group in self.optimizer.param_groups]
        return {
            "total_updates": self.total_updates,
            "updates_per_round": self.updates_per_round,
            "online_after": self.online_after,
            **{f"{name}_interval": value for name, value in asdict(self.intervals).items()},
            "learning_rate": max(getattr(scheduler, "base_lrs", rates)),
            "clip_norm": self.stepper.clip_norm,
            "precision": self.stepper.precision,
            "tau": None if tau is None else round(1 - tau, 12),
            "batch_size": self.replay_buffer.batch_size,
            "num_envs": _num_envs(self.collector),
            "frames_per_batch": getattr(self.collector, "requested_frames_per_batch", None),
            **self.options,
        }

    def _tell_changes(self, saved: Mapping[str, Any]) -> None:
        here = as_json(self._options())
        for name in differing_entries(saved, here):
            torchrl_logger.info(
                f"resumed with {name}={here.get(name, 'nothing')} instead of {saved.get(name, 'nothing')}"
            )

    def _describe(self) -> str:
        parameters = sum(
            p.numel() for group in self.optimizer.param_groups for p in group["params"]
        )
        device = next(self.loss_module.parameters()).device
        options = self._options()
        return (
            f"{'goes on' if self._is_resumed else 'begins'} in {self.run_dir}, update "
            f"{self.counts.updates} of {self.total_updates}: {parameters} parameters on {device}, "
            f"{options['num_envs']} environments, {options['frames_per_batch']} steps and "
            f"{self.updates_per_round} updates of {options['batch_size']} slices a round"
        )


def _num_envs(collector: BaseCollector) -> int | None:
    env = getattr(collector, "env", None)
    return None if env is None else env.batch_size.numel()


def _needs_weight_sync(collector: BaseCollector, loss_module: nn.Module) -> bool:
    # On the device of the loss a local collector runs the policy itself, elsewhere a copy of it.
    if not isinstance(collector, Collector):
        return True
    policy, device = collector.policy, next(loss_module.parameters()).device
    weights = policy.parameters() if isinstance(policy, nn.Module) else ()
    return any(p.device != device for p in weights)


def _check_collector(collector: BaseCollector, replay_buffer: ReplayBuffer) -> None:
    if not isinstance(collector, BaseCollector):
        raise TypeError(
            f"the collector must be one of torchrl.collectors, got {type(collector).__name__}. "
            "Make a torchrl_amago.data.TrialCollector."
        )
    if getattr(collector, "replay_buffer", None) is not replay_buffer:
        raise ValueError(
            "the collector must write to the trainer's replay_buffer, got a collector with "
            f"replay_buffer={type(getattr(collector, 'replay_buffer', None)).__name__}. Make it "
            "with TrialCollector(..., replay_buffer=replay_buffer)."
        )
    writes_pieces = isinstance(collector, Collector) and collector.trajs_per_batch is None
    if (
        isinstance(replay_buffer, TrialReplayBuffer)
        and writes_pieces
        and not isinstance(collector, TrialCollector)
    ):
        raise ValueError(
            "the collector must write whole trials, got one with trajs_per_batch=None, which "
            "writes fragments. Make it with TrialCollector(..., replay_buffer=replay_buffer)."
        )
