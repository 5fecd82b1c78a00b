"""The training loop: collect whole trials, update, now and then log, evaluate, save."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any, get_args

import numpy as np
import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler
from torchrl import logger as torchrl_logger
from torchrl.collectors import BaseCollector
from torchrl.data import ReplayBuffer
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.record.loggers import Logger

from torchrl_amago import _files as files
from torchrl_amago._facts import differences
from torchrl_amago._signals import on_signals
from torchrl_amago._state_file import load_state
from torchrl_amago._validation import check_counts
from torchrl_amago.data.mixture import TrialMixture, online_part
from torchrl_amago.evaluation import Evaluator, Results, evaluation_metrics, run_evaluator
from torchrl_amago.scaling import BatchFeed, Outcome, Ranks, WorkerPool
from torchrl_amago.trainers import checkpoint as saving
from torchrl_amago.trainers._components import Components, Counts, Intervals, Rollouts
from torchrl_amago.trainers.hooks import TrialMonitor
from torchrl_amago.trainers.nonfinite import explain_nonfinite_inputs
from torchrl_amago.trainers.optim import FiniteOptimizationStepper, OptimizerState
from torchrl_amago.trainers.report import RunReport


@dataclass(eq=False, repr=False)
class AMAGOTrainer:
    """Loop that collects whole trials and makes ``updates_per_round`` updates, again and again.

    `docs/training.md` describes files, signals, loggers, resuming, and what may change on resume.

    Args:
        collector: writes to the replay buffer and yields nothing.
        loss_module: called on ``[B, T]`` slices; see :class:`FiniteOptimizationStepper`.
        replay_buffer: sampled with its own batch size, once ``can_sample()`` is True. Of a
            :class:`~torchrl_amago.data.TrialMixture`, only the buffer ``online`` is saved.
        total_updates: end of the run; the collector's ``total_frames`` may end it earlier.
        updates_per_round: updates after each batch of the collector.
        run_dir: folder for everything the run writes.
        target_updater, scheduler: stepped after every update.
        exploration: module whose ``step(frames)`` follows the collected frames.
        policy: the policy whose weights are written; by default the collector's.
        evaluator: called without arguments; returns numbers by name or ``TrialResults``.
        keep_checkpoints: number of checkpoints that stay.
        online_after: updates on the buffer's content before anything is collected.
        loggers: ``"tensorboard"``, ``"wandb"`` or TorchRL loggers, besides the table.
        progress_bar: a bar on a terminal, lines elsewhere; False for neither.
        success_threshold: an episode succeeds if its return is larger.
        seed: seeds torch, numpy, python and the environment when a new run starts.
        settings: values by name that must not change on resume, as those of policy and loss.
        options: values by name whose change is logged on resume.
        components: further parts by name, with ``state_dict`` and ``load_state_dict``.
        ranks: processes that make each update together; the first does all else but callbacks.
        callbacks: called with the trainer after every update; means of what they return by name
            join the next row.

    Example:
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_amago import MetaFrozenLake, TrialCollector, amago_loss, make_optimizer
        >>> from torchrl_amago import make_policy, make_trial_buffer, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(8,)), episodes=2)
        >>> policy = make_policy(env, context_length=18, seq_model_options={"d_model": 16})
        >>> loss = amago_loss(policy)
        >>> rb = make_trial_buffer(1000, slice_length=18, batch_size=4, warn_short=False)
        >>> collector = TrialCollector(env, policy, frames_per_batch=8 * 18, replay_buffer=rb)
        >>> parts = (collector, loss, make_optimizer(loss), rb)
        >>> options = dict(total_updates=4, updates_per_round=2, run_dir="run")
        >>> AMAGOTrainer(*parts, **options, target_updater=SoftUpdate(loss, tau=0.003)).train()
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
    ranks: Ranks = Ranks()
    callbacks: Sequence[Callable[[AMAGOTrainer], Mapping[str, float] | None]] = ()

    def __post_init__(self) -> None:
        check_counts(total_updates=self.total_updates, updates_per_round=self.updates_per_round)
        self.run_dir = run_dir = Path(self.run_dir).absolute()
        self.online_buffer = buffer = online_part(self.replay_buffer)
        ranks, self._keeps_replay = self.ranks, getattr(self.collector, "keeps_replay", False)
        mixture = self.replay_buffer if isinstance(self.replay_buffer, TrialMixture) else None
        self.callbacks = list(self.callbacks)
        if mixture is not None:
            self.callbacks.append(lambda _: mixture.metrics())
        if isinstance(self.collector, WorkerPool):
            self.callbacks.append(self.collector.after_update)
        self.stepper.dump_dir = self.stepper.dump_dir or ranks.folder(run_dir)
        # Several ranks check their batches together, in the stepper.
        check = self.stepper.check if ranks.size == 1 else None
        self._feed = BatchFeed(lambda: ranks.sample(self.replay_buffer), self.loss_module, check)
        if self.policy is None:
            self.policy = getattr(self.collector, "policy", None)
        self.checkpoints = saving.CheckpointStore(run_dir, self.keep_checkpoints)
        self.policy_files = saving.PolicyFiles(run_dir, self.policy)
        self.report = RunReport(run_dir, self.loggers, self.progress_bar)
        self.monitor = TrialMonitor(buffer, self.report.window, run_dir, self.success_threshold)
        self._rollouts = Rollouts(self.collector, self.loss_module, self.monitor)
        self.counts = Counts(updates=0, frames=0, updates_left=0, evaluated_at=-1)
        # Everything in a checkpoint but the replay, in the order of loading.
        parts = {
            "report": self.report if ranks.is_first else None,
            "mixture": mixture,
            "loss": self.loss_module,
            "optimizer": OptimizerState(self.optimizer, self.scheduler),
            "target_updater": self.target_updater,
            "exploration": self.exploration,
            "counts": self.counts,
            "monitor": self.monitor,
            "policy_files": self.policy_files,
            "sampler": buffer.sampler if self._keeps_replay else None,
            "rollouts": self._rollouts,
        }
        parts = {name: part for name, part in parts.items() if part is not None}
        self.components = Components(**parts, **self.components)
        self._saved_at = -1  # update of the last checkpoint
        self._is_resumed = self._stop = self._has_lock = False
        self._outcome: Outcome = "finished"
        self._lock = contextlib.ExitStack()
        is_written = self.total_updates > self.online_after
        ranks.check(self.replay_buffer.batch_size, buffer, is_written)

    def train(self) -> Outcome:
        """Run to the end, or until a signal; the collector and loggers are closed then.

        Raises:
            FileExistsError: if ``run_dir`` holds a run and :meth:`resume` was not called.
            BlockingIOError: if another process trains in ``run_dir``.
            NonFiniteError: for NaN or infinity in data or loss; the weights stay as they were.
        """
        counts, every, ranks = self.counts, self.intervals, self.ranks
        with self._session():
            ranks.on_first(self._begin)
            ranks.start(self.loss_module, self.replay_buffer, counts.updates)
            ranks.copy_trials(self.online_buffer)
            batches = iter(self.collector)
            while not self._is_asked_to_stop() and counts.updates < self.total_updates:
                if not counts.updates_left:
                    goes_on, known = ranks.on_first(lambda: (self._collect(batches), vars(counts)))
                    vars(counts).update(known)
                    ranks.copy_trials(self.online_buffer)
                    if not goes_on:
                        break
                    continue
                # A batch drawn ahead would miss new trials, and be missing after a resume.
                rests = [(counts.updates + 1) % n == 0 for n in (every.evaluate, every.checkpoint)]
                batch = self._feed.sample(ahead=counts.updates_left > 1 and not any(rests))
                metrics = self.stepper.step(self, batch)
                for following in (self.scheduler, self.target_updater):
                    if following is not None:
                        following.step()
                counts.updates += 1
                counts.updates_left -= 1
                self.report.add_update(metrics)
                for callback in self.callbacks:
                    self.report.window.add_scalars(callback(self) or {})
                if not ranks.is_first:
                    continue
                evaluation = self._evaluate() if counts.updates % every.evaluate == 0 else {}
                if evaluation or counts.updates % every.log == 0:
                    self._write_row(evaluation)
                if counts.updates % every.checkpoint == 0:
                    self._checkpoint()
            self._outcome = ranks.on_first(self._end)
        return self._outcome

    def request_stop(self, outcome: Outcome | None = None) -> None:
        """End the run after the running update, by default as if that had been the last one."""
        # Ctrl-C after a preemption is pressed by a person who doesn't want to wait.
        self._outcome, self._stop = outcome or self._outcome, True
        if isinstance(self.collector, WorkerPool):
            self.collector.request_stop()

    def resume(self, path: str | Path | None = None, *, missing_ok: bool = False) -> AMAGOTrainer:
        """Go back to a checkpoint; :meth:`train` continues from there.

        Args:
            path: a run's folder (for its last checkpoint) or one checkpoint's folder. Default:
                ``run_dir``. From another run, that run's rows up to the checkpoint are copied.
            missing_ok: start anew where there is no checkpoint.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            FileExistsError: if it is another run's, and ``run_dir`` holds one already.
            BlockingIOError: if another process trains in ``run_dir``.
            DamagedError: if it is damaged; the message names the newest intact one.
            ValueError: if architecture, settings or parts differ. In each case nothing has changed.
        """
        checkpoint = self.ranks.on_first(lambda: self._resume(path, missing_ok))
        if checkpoint is not None and not self.ranks.is_first:
            self.components.load_state_dict(load_state(checkpoint / saving.STATE))
            if (checkpoint / saving.REPLAY).exists():
                self.ranks.load_trials(self.online_buffer, checkpoint / saving.REPLAY)
        return self

    def _resume(self, path: str | Path | None, missing_ok: bool) -> Path | None:
        self._acquire_lock()
        with self._lock:  # an error releases it
            checkpoint = None
            if not missing_ok or saving.CheckpointStore(path or self.run_dir).latest() is not None:
                checkpoint = self.checkpoints.find(path)
                self._load(checkpoint)
            self._lock = self._lock.pop_all()
        return checkpoint

    def _load(self, checkpoint: Path) -> None:
        if checkpoint.parents[1].resolve() != self.run_dir.resolve():
            saving.check_no_existing_run(self.run_dir)
        metadata, own = saving.run_metadata(self), self.components.state_dict()
        state = self.checkpoints.load(checkpoint, own, metadata["settings"])
        if (checkpoint / saving.REPLAY).exists():
            self.online_buffer.loads(checkpoint / saving.REPLAY)
        self.components.load_state_dict(state)
        saved = files.read_manifest(checkpoint)["options"]
        for name, (old, new) in differences(saved, metadata["options"]).items():
            torchrl_logger.info(f"resumed with {name}={new} instead of {old}")
        self._is_resumed, self._saved_at = True, self.counts.updates

    def _is_asked_to_stop(self) -> bool:
        """Return whether any rank was asked to stop; all of them end with its outcome."""
        outcome = self.ranks.agree(self._outcome if self._stop else None, get_args(Outcome))
        self._outcome = outcome or self._outcome
        return outcome is not None

    def _begin(self) -> None:
        if not self._is_resumed:
            saving.check_no_existing_run(self.run_dir)
        metadata, update = saving.run_metadata(self), self.counts.updates
        self.report.open(self.total_updates, update, metadata["settings"] | metadata["options"])
        weights = [p for group in self.optimizer.param_groups for p in group["params"]]
        verb, size = "goes on" if self._is_resumed else "begins", sum(p.numel() for p in weights)
        where = f"in {self.run_dir}, update {update} of {self.total_updates}"
        self.report.log_line(f"{verb} {where}: {size} parameters on {weights[0].device}")
        self._rollouts.sync_policy()
        if self._is_resumed:
            self._rollouts.resume()
            # A replay buffer of another folder may have fewer steps.
            self.monitor.seen = min(self.monitor.seen, self.online_buffer.write_count)
            # A crash may have come between a checkpoint and its policy's file.
            self.policy_files.save_last()
            return
        self.monitor.skip_existing()
        if self.seed is not None:
            torch.manual_seed(self.seed)
            np.random.seed(self.seed % 2**32)
            random.seed(self.seed)
        self._rollouts.begin()
        self._checkpoint()  # a run that dies early can be resumed, too

    def _collect(self, batches: Iterator[None]) -> bool:
        """Collect a batch and set the number of its updates; return False at the last batch."""
        counts, offline_left = self.counts, self.online_after - self.counts.updates
        if offline_left > 0:
            counts.updates_left = min(self.updates_per_round, offline_left)
            return True
        self._rollouts.sync_policy()
        with explain_nonfinite_inputs(self.policy, self.run_dir):
            if next(batches, self) is self:
                return False  # the collector's own total_frames
        before = self.monitor.seen
        self.monitor.update()
        frames = self._rollouts.frames_per_batch or self.monitor.seen - before
        counts.frames += frames
        if self.exploration is not None:
            self.exploration.step(frames)
        buffer, capacity = self.online_buffer, self.online_buffer.storage.max_size
        if self.replay_buffer.can_sample():
            counts.updates_left = self.updates_per_round
        elif not buffer.can_sample() and self.monitor.seen >= 2 * capacity:  # it would wait forever
            raise RuntimeError(
                "the replay buffer must hold min_trials="
                f"{getattr(buffer.sampler, 'min_trials', 1)} trials before the first update, and "
                f"one of {capacity} steps does not. Raise its capacity."
            )
        return True

    def _evaluate(self) -> Results:
        if self.evaluator is None:
            return {}
        with self.report.timed("evaluation"):
            results = run_evaluator(self.evaluator)
        self.counts.evaluated_at = self.counts.updates
        self._rollouts.sync_policy()
        self.policy_files.save_if_best(evaluation_metrics(results))
        return results

    def _write_row(self, evaluation: Results) -> None:
        counts, rate = self.counts, float(self.optimizer.param_groups[0]["lr"])
        extra = {"trials": self.monitor.trials, "learning_rate": rate}
        self.report.write_row(counts.updates, counts.frames, extra, evaluation)

    def _checkpoint(self, goes_on: bool = True) -> None:
        with self.report.timed("checkpoint"):
            self._rollouts.capture()
            state, updates = self.components.state_dict(), self.counts.updates
            metadata = {**saving.run_metadata(self), "frames": self.counts.frames}
            buffer = None if self._keeps_replay else self.online_buffer
            self.checkpoints.save(updates, state, buffer, metadata)
            self._saved_at = updates
            self._rollouts.sync_policy()
            self.policy_files.save_last()
            if goes_on:
                self._rollouts.go_on()

    def _end(self) -> Outcome:
        updates, evaluated_at = self.counts.updates, self.counts.evaluated_at
        if self._outcome != "interrupted" and self._saved_at != updates:
            self._checkpoint(goes_on=False)
        if self._outcome == "finished" and self.evaluator is not None and evaluated_at != updates:
            self._write_row(self._evaluate())
        return self._outcome

    @contextlib.contextmanager
    def _session(self) -> Iterator[None]:
        """Hold the lock, handle signals, and close everything at the end."""
        self.ranks.on_first(self._acquire_lock)
        self.ranks.attach(self.loss_module)
        try:
            # torchrun passes on signals that batch systems send to every process, too.
            with on_signals(self.request_stop, may_repeat=self.ranks.size > 1):
                yield
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
            self._lock.close()
            Ranks().attach(self.loss_module)
        if self._outcome != "finished" and self.ranks.is_first:
            torchrl_logger.warning(
                f"{self._outcome.capitalize()} at update {self.counts.updates}. Last checkpoint: "
                f"{self.checkpoints.latest()}. To go on: resume() and train()."
            )

    def _acquire_lock(self) -> None:
        """Lock the run's folder, and remove what dead processes left there."""
        if self._has_lock:
            return
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._lock.enter_context(files.lock(self.run_dir / ".lock", wait=False))
        self._lock.callback(vars(self).update, _has_lock=False)
        self._has_lock = True
        for folder in (self.run_dir, self.checkpoints.folder):
            files.recover(folder)
