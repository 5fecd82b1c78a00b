"""The trainer: whole trials in, a fixed number of updates per collected batch, exact resume."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import nn
from torch.optim import Optimizer
from torchrl import logger as torchrl_logger
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import Collector
from torchrl.data import ReplayBuffer
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.record.loggers import Logger
from torchrl.trainers import LRSchedulerHook, TargetNetUpdaterHook, Trainer, UpdateWeights

from torchrl_amago.choice import check_counts
from torchrl_amago.data.collector import TrialCollector
from torchrl_amago.data.mixture import TrialMixture, online_part
from torchrl_amago.evaluation import TrialResults
from torchrl_amago.trainers import run_state
from torchrl_amago.trainers.checkpoint import CheckpointStore, refuse_existing_run
from torchrl_amago.trainers.hooks import (
    AMAGOOptimizationStepper,
    TrialMonitor,
    evaluation_metrics,
)
from torchrl_amago.trainers.interrupt import on_interrupt
from torchrl_amago.trainers.nonfinite import blame_inputs, check_data
from torchrl_amago.trainers.optim import make_schedule
from torchrl_amago.trainers.policy_files import PolicyFiles
from torchrl_amago.trainers.report import RunReport

Evaluator = Callable[[], "Mapping[str, float] | TrialResults"]
Outcome = Literal["finished", "interrupted"]


class AMAGOTrainer(Trainer):
    """Collect whole trials, update ``updates_per_round`` times, again and again.

    One update: sample slices, loss, backward, clip, optimiser, learning-rate warm-up, targets (soft
    update after the step). All of :class:`torchrl.trainers.Trainer`'s hook stages run where they
    do there, except those of epochs; :meth:`request_stop` works.

    **Files** in ``run_dir``: ``progress.csv`` (one row per ``log_interval`` updates and per
    evaluation; means since the last row), ``checkpoints/``, and ``nonfinite_batch/`` if NaN or
    infinity stopped the run.

    **Exact resume.** No environment can be saved in mid-trial in general, so writing a checkpoint
    ends the trials in progress: at every ``checkpoint_interval`` updates the trainer draws a new
    environment seed from torch's generator, saves everything, seeds the environment with it and
    resets the collector. The uninterrupted run does the same as the resumed one, so both are equal
    bit for bit (weights, targets, optimiser, statistics, exploration, replay, next batch, and
    ``progress.csv`` but for its clock columns), on a CPU, for every environment that its seed
    determines and a buffer that doesn't prefetch. A run that was killed or interrupted repeats what came after its last checkpoint;
    rows logged after it are dropped. A run whose ``total_updates`` is not a multiple of
    ``checkpoint_interval`` may be resumed with more updates too, but ends trials where a longer run
    wouldn't have. Environment transforms with running statistics are saved with the collector. The
    learning rate and its schedule are those of the trainer that resumes, not of the checkpoint.

    **Offline.** With ``online_after``, the first updates are made on what the buffer holds already, and
    nothing is collected; then rounds of collecting begin, in the same run. A
    :class:`~torchrl_amago.data.TrialMixture` keeps data and experience apart: what is collected goes
    into its buffer ``online``, which alone is part of the checkpoints.

    **The policy's weights** are written into ``run_dir`` as well, ``policy.pt`` with each checkpoint and
    ``best_policy.pt`` with the best evaluation (mean return per trial), for :func:`load_policy`.

    **Ctrl-C** stops after the running update, closes everything and tells how to resume. No
    checkpoint is written then unless there is none yet, so that the resumed run stays equal to the
    uninterrupted one. Press twice to stop at once.

    Args:
        collector: ``Collector(env, policy, frames_per_batch=..., trajs_per_batch=1,
            replay_buffer=replay_buffer)``; it writes whole trials and yields nothing.
        loss_module: called on ``[B, T]`` slices; the entries of its output that begin with ``loss``
            are added up, the others are metrics.
        optimizer: see :func:`~torchrl_amago.trainers.make_optimizer`.
        replay_buffer: sampled with its own batch size, once ``can_sample()`` says so; a buffer, or a
            mixture of several. With ``draw="priority"`` it is told the slices' errors.
        total_updates: updates at which the run ends.
        updates_per_round: updates after each batch the collector gathers.
        run_dir: folder for everything the run writes.
        target_updater: stepped after every update, such as ``SoftUpdate(loss_module, tau=0.003)``.
        exploration: module whose ``step(frames)`` follows the collected frames; saved.
        evaluator: called without arguments; gives named numbers or ``TrialResults``. Make it seed
            its environment, so that every evaluation sees the same held-out tasks.
        eval_interval: updates between evaluations; there is one at the end in any case.
        checkpoint_interval: updates between checkpoints; there is one at the end in any case.
        keep_checkpoints: number of them kept.
        total_frames: environment steps at which the run ends, if earlier; None, or a negative number as
            TorchRL has it, for no limit.
        online_after: updates before anything is collected; ``total_updates`` or more never collects.
        clip_norm: largest norm of the gradient, more than 0; None does not clip.
        warmup_updates: updates over which the learning rate rises from 1/n of its value to all.
        final_lr_share: share of the learning rate left at ``total_updates``, to which it falls
            linearly after the rise; 1 keeps it constant.
        precision: ``"bf16"`` for bfloat16 autocast in forward and loss; weights stay float32.
        log_interval: updates between rows of ``progress.csv``.
        loggers: ``"tensorboard"``, ``"wandb"`` or torchrl loggers, besides the table.
        progress_bar: False to hide it; without a terminal it never shows.
        success_threshold: an attempt succeeds if its return is larger.
        seed: seeds torch, numpy, python and the environment when a new run starts.
        task: what the environment was made with, by name. Part of a checkpoint's architecture: a run
            of another task can't resume from it.
        resume_command: what to tell the user to run after an interruption.

    Raises:
        TypeError: for a collector of several processes.
        ValueError: for a collector that doesn't write whole trials to ``replay_buffer``, intervals
            smaller than 1, or a ``clip_norm`` that isn't positive.

    Example:
        >>> import tempfile
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_amago.data import make_trial_buffer
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> from torchrl_amago.modules import make_policy
        >>> from torchrl_amago.objectives import amago_loss
        >>> from torchrl_amago.trainers import make_optimizer
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(8,)), episodes=2)
        >>> small = {"d_model": 16, "num_heads": 2, "num_layers": 1}
        >>> policy = make_policy(env, context_length=18, seq_model_options=small, exploration={})
        >>> loss = amago_loss(policy)
        >>> rb = make_trial_buffer(1000, slice_length=18, batch_size=4, warn_short=False)
        >>> collector = Collector(env, policy, frames_per_batch=8 * 18, total_frames=-1,
        ...                       trajs_per_batch=1, replay_buffer=rb)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     trainer = AMAGOTrainer(
        ...         collector=collector, loss_module=loss, optimizer=make_optimizer(loss),
        ...         replay_buffer=rb, total_updates=4, updates_per_round=2, run_dir=folder,
        ...         target_updater=SoftUpdate(loss, tau=0.003), exploration=policy.exploration)
        ...     trainer.train()
        'finished'
    """

    def __init__(
        self,
        *,
        collector: Collector,
        loss_module: nn.Module,
        optimizer: Optimizer,
        replay_buffer: ReplayBuffer | TrialMixture,
        total_updates: int,
        updates_per_round: int,
        run_dir: str | Path,
        target_updater: TargetNetUpdater | None = None,
        exploration: nn.Module | None = None,
        evaluator: Evaluator | None = None,
        eval_interval: int = 500,
        checkpoint_interval: int = 500,
        keep_checkpoints: int = 2,
        total_frames: int | None = None,
        online_after: int = 0,
        clip_norm: float | None = 1.0,
        warmup_updates: int = 500,
        final_lr_share: float = 1.0,
        precision: Literal["fp32", "bf16"] = "fp32",
        log_interval: int = 50,
        loggers: Sequence[str | Logger] = (),
        progress_bar: bool = True,
        success_threshold: float = 0.0,
        seed: int | None = None,
        task: Mapping[str, object] | None = None,
        resume_command: str = "trainer.resume(); trainer.train()",
    ) -> None:
        self.online_buffer = online_part(replay_buffer)
        _check_collector(collector, self.online_buffer)
        if precision not in ("fp32", "bf16"):
            raise ValueError(f"precision must be 'fp32' or 'bf16', got {precision!r}.")
        check_counts(
            "Give a larger number.",
            total_updates=total_updates,
            updates_per_round=updates_per_round,
            eval_interval=eval_interval,
            checkpoint_interval=checkpoint_interval,
            log_interval=log_interval,
        )
        # `not >`, since NaN is neither.
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(
                f"clip_norm must be larger than 0, got {clip_norm}. It is the largest norm that a "
                "gradient keeps; None does not clip."
            )
        no_limit = total_frames is None or total_frames < 0
        self.run_dir = Path(run_dir)
        super().__init__(
            collector=collector,
            total_frames=float("inf") if no_limit else total_frames,
            frame_skip=1,
            optim_steps_per_batch=updates_per_round,
            loss_module=loss_module,
            optimizer=optimizer,
            optimization_stepper=AMAGOOptimizationStepper(clip_norm, precision, self.run_dir),
            replay_buffer=replay_buffer,
            target_net_updater=target_updater,
            clip_norm=clip_norm,
            progress_bar=False,  # TorchRL's counts frames
            log_interval=log_interval,
        )
        self.seed, self.resume_command = seed, resume_command
        self.task = dict(task or {})
        self.total_updates = total_updates
        self.online_after = online_after
        self.exploration, self.evaluator = exploration, evaluator
        self.eval_interval, self.checkpoint_interval = eval_interval, checkpoint_interval
        self.collected_frames = self._optim_count = 0  # TorchRL keeps them on the class
        self.checkpoints = CheckpointStore(self.run_dir, keep_checkpoints)
        self.report = RunReport(self.run_dir, loggers, progress_bar)
        self.monitor = TrialMonitor(
            self.online_buffer, self.report.window, self.run_dir, success_threshold
        )
        self.scheduler = make_schedule(optimizer, warmup_updates, total_updates, final_lr_share)
        self.policy_files = PolicyFiles(self.run_dir, collector.policy)
        self._device = next(loss_module.parameters()).device
        self._sync_weights = _needs_weight_sync(collector, self._device)
        self._updates_left = 0  # of the batch collected last
        self._written_before = 0  # steps in the buffer's history when the loop began
        self._evaluated_at = self._saved_at = -1
        self._resumed: dict[str, Any] | None = None
        self._interrupted = False
        self._register_hooks()

    def _register_hooks(self) -> None:
        self.register_op("process_optim_batch", self._sample)
        LRSchedulerHook(self.scheduler, interval="optim").register(self)
        if self.target_net_updater is not None:
            self.register_op("post_optim", TargetNetUpdaterHook(self.target_net_updater))
        if self._sync_weights:
            UpdateWeights(self.collector, update_weights_interval=1).register(self)
        if isinstance(self.replay_buffer, TrialMixture):
            self.register_op("post_optim_log", lambda batch: self.replay_buffer.metrics())

    # -- the loop ------------------------------------------------------------------------------

    def train(self) -> Outcome:
        """Run to the end, or until interrupted; the collector and loggers are closed then.

        Returns:
            ``"finished"`` or ``"interrupted"``.

        Raises:
            FileExistsError: if ``run_dir`` holds a run and :meth:`resume` was not called.
            NonFiniteError: for NaN or infinity in data or loss; the weights stay as they were.
        """
        if self._resumed is None:
            refuse_existing_run(self.run_dir)
        try:
            with on_interrupt(self._stop_on_interrupt):
                self._begin()
                self._loop()
                self._end()
        except KeyboardInterrupt:
            self._interrupted = True
        except Exception as error:
            # Ctrl-C reaches worker processes too: what their death raises here is no news.
            if not self._interrupted:
                raise
            torchrl_logger.debug(f"after the interruption: {error!r}")
        finally:
            self.report.close()
            self.collector.shutdown(raise_on_error=not self._interrupted)
        if not self._interrupted:
            return "finished"
        self._tell_interruption()
        return "interrupted"

    def _begin(self) -> None:
        self.report.open(self.total_updates, self._optim_count)
        if self._resumed is None:
            if self.seed is not None:
                torch.manual_seed(self.seed)
                np.random.seed(self.seed % 2**32)
                random.seed(self.seed)
            self.monitor.skip_existing()
            seed, collector = run_state.draw_seed(), run_state.collector_state(self.collector)
        else:
            GlobalRNGState().load_state_dict(self._resumed["rng"])
            seed, collector = self._resumed["env_seed"], self._resumed["collector"]
        if self._sync_weights:
            self.collector.update_policy_weights_()
        run_state.restart_trials(self.collector, seed, collector)
        self._written_before = self.online_buffer.write_count
        self.report.stopwatch.start()

    def _loop(self) -> None:
        self._setup_hook()
        batches = iter(self.collector)
        collected = self._updates_left > 0  # a checkpoint fell between two updates of a batch
        while not self._is_done():
            if not collected and not self._collect(batches):
                break
            collected = False
            self.optim_steps(None)
            self._post_steps_hook()
            self._post_steps_log_hook(None)
        self._shutdown_hook()

    def _collect(self, batches: Iterator[None]) -> bool:
        offline_left = self.online_after - self._optim_count
        if offline_left > 0:
            if not self.replay_buffer.can_sample():
                raise RuntimeError(
                    f"the first online_after={self.online_after} updates need trials in the replay "
                    "buffer, and there is none. Load some, or set online_after to 0."
                )
            self._updates_left = min(self.optim_steps_per_batch, offline_left)
            return True
        with blame_inputs(self.collector.policy, self.run_dir):
            if next(batches, self) is self:
                return False  # the collector's own total_frames
        frames = self.collector.requested_frames_per_batch
        self.collected_frames += frames
        if self.exploration is not None:
            self.exploration.step(frames)
        self.monitor()
        self._pre_steps_log_hook(None)
        if self.replay_buffer.can_sample():
            self._updates_left = self.optim_steps_per_batch
        else:
            self._check_capacity()
        return True

    def _check_capacity(self) -> None:
        """Stop a run that would wait for ever: its buffer was filled twice with too few trials."""
        buffer = self.online_buffer
        capacity, written = buffer.capacity, buffer.write_count - self._written_before
        if buffer.can_sample() or written < 2 * capacity:
            return
        raise RuntimeError(
            f"the replay buffer must hold min_trials={buffer.sampler.min_trials} trials before the "
            f"first update, got one of {capacity} steps, which holds {buffer.num_trials} of those "
            "that are collected. Raise its capacity (make_trainer's capacity), or lower "
            "min_trials."
        )

    def optim_steps(self, batch: TensorDictBase | None) -> None:
        """The updates that are due since the last collected batch."""
        self._pre_optim_hook()
        while self._updates_left and not self._is_done():
            sub_batch = self._process_optim_batch_hook(batch)
            metrics = self.optimization_stepper.step(self, sub_batch)
            if "priority_weight" in sub_batch.keys():  # noqa: SIM118 - not a dict
                self.replay_buffer.update_priority(sub_batch)
            self._optim_count += 1
            self._updates_left -= 1
            self._post_optim_hook()
            self._post_optim_log(sub_batch)
            self.report.window.add_scalars(metrics)
            self._after_update()

    def _sample(self, _: TensorDictBase | None) -> TensorDictBase:
        batch = self.replay_buffer.sample()
        check_data(batch, self.run_dir, "observations and rewards of a training batch")
        return batch if self._device.type == "cpu" else batch.to(self._device)

    def _after_update(self) -> None:
        update = self._optim_count
        self.report.tick()
        evaluation = self._evaluate() if update % self.eval_interval == 0 else {}
        if evaluation or update % self._log_interval == 0:
            self._write_row(evaluation)
        if update % self.checkpoint_interval == 0:
            self._checkpoint(restart=True)

    def _is_done(self) -> bool:
        return (
            self._stop_training
            or self._optim_count >= self.total_updates
            or (self.collected_frames >= self.total_frames and not self._updates_left)
        )

    def _end(self) -> None:
        if self._interrupted:
            if self.checkpoints.latest() is None:
                self._checkpoint(restart=False)
            return
        if self._saved_at != self._optim_count:
            self._checkpoint(restart=False)
        if self.evaluator is not None and self._evaluated_at != self._optim_count:
            self._write_row(self._evaluate())

    # -- what is seen --------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        rng = GlobalRNGState()
        before = rng.state_dict()
        with self.report.stopwatch.apart("evaluation"):
            results = self.evaluator()
        rng.load_state_dict(before)  # evaluating more or less often must not change training
        self._evaluated_at = self._optim_count
        evaluation = evaluation_metrics(results)
        self._fresh_policy_files().offer(evaluation)
        return evaluation

    def _fresh_policy_files(self) -> PolicyFiles:
        if self._sync_weights:
            self.collector.update_policy_weights_()
        return self.policy_files

    def _write_row(self, evaluation: Mapping[str, float]) -> None:
        learning_rate = self.optimizer.param_groups[0]["lr"]
        extra = {"trials": self.monitor.trials, "learning_rate": learning_rate}
        self.report.row(self._optim_count, self.collected_frames, extra, evaluation)

    def _log(self, log_pbar: bool = False, **metrics: Any) -> None:
        # What TorchRL's logging hooks give joins the same table, as means over its rows.
        for name, value in metrics.items():
            if not isinstance(value, torch.Tensor) or value.numel() == 1:
                self.report.window.add(name, float(value))

    # -- checkpoints ---------------------------------------------------------------------------

    def _checkpoint(self, restart: bool) -> None:
        with self.report.stopwatch.apart("checkpoint"):
            seed, collector = run_state.draw_seed(), run_state.collector_state(self.collector)
            self._saved_at = self._optim_count
            self.checkpoints.save(
                self._optim_count,
                run_state.capture(self, seed, collector),
                self.online_buffer,
                run_state.architecture(self),
                self.collected_frames,
            )
            self._fresh_policy_files().save_last()
            if restart:
                run_state.restart_trials(self.collector, seed, collector)
                self.monitor.trials_restarted()

    def resume(self, path: str | Path | None = None) -> AMAGOTrainer:
        """Go back to a checkpoint; :meth:`train` continues from there.

        Args:
            path: a run's folder (its last checkpoint is taken) or one checkpoint's folder. Default:
                ``run_dir``. From another run, that run's rows up to the checkpoint are copied.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            FileExistsError: if it is another run's, and ``run_dir`` holds one already.
            RuntimeError: if it is damaged; the message names the newest intact one.
            ValueError: if it is of another architecture. In each case nothing has been changed.
        """
        found = self.checkpoints.find(path)
        source = found.parent.parent
        if source.resolve() != self.run_dir.resolve():
            refuse_existing_run(self.run_dir)
        state = self.checkpoints.load(found, run_state.architecture(self))
        self.checkpoints.load_replay(found, self.online_buffer)
        self.report.load_state_dict(state["report"], source)
        run_state.restore(self, state)
        self._resumed = {key: state[key] for key in ("rng", "env_seed", "collector")}
        return self

    def counters(self) -> dict[str, float | None]:
        """How far the run is, and the best evaluation so far."""
        return {
            "updates": self._optim_count,
            "frames": self.collected_frames,
            "updates_left": self._updates_left,
            "evaluated_at": self._evaluated_at,
            "best_evaluation": self.policy_files.best_value,
        }

    def set_counters(self, counters: Mapping[str, float | None]) -> None:
        """The inverse of :meth:`counters`."""
        self._optim_count = self._saved_at = counters["updates"]
        self.collected_frames = counters["frames"]
        self._updates_left = counters["updates_left"]
        self._evaluated_at = counters["evaluated_at"]
        self.policy_files.restore(counters["best_evaluation"])

    # -- interruption --------------------------------------------------------------------------

    def _stop_on_interrupt(self) -> None:
        self._interrupted = True
        self.request_stop("interrupted")

    def _tell_interruption(self) -> None:
        latest = self.checkpoints.latest()
        where = "No checkpoint was written." if latest is None else f"Last checkpoint: {latest}."
        how = "" if latest is None else f" To resume: {self.resume_command}"
        torchrl_logger.warning(f"Interrupted at update {self._optim_count}. {where}{how}")


def _needs_weight_sync(collector: Collector, device: torch.device) -> bool:
    # On the device of the loss the collector runs the policy itself, elsewhere a copy of it.
    policy = collector.policy
    weights = policy.parameters() if isinstance(policy, nn.Module) else ()
    return any(p.device != device for p in weights)


def _check_collector(collector: Collector, replay_buffer: ReplayBuffer) -> None:
    if not isinstance(collector, Collector):
        raise TypeError(
            "the collector must be a torchrl.collectors.Collector of this process, got "
            f"{type(collector).__name__}. To use several processes, give a Collector a ParallelEnv."
        )
    if getattr(collector, "replay_buffer", None) is not replay_buffer:
        raise ValueError(
            "the collector must write to the trainer's replay_buffer, got a collector with "
            f"replay_buffer={type(getattr(collector, 'replay_buffer', None)).__name__}. Make it "
            "with Collector(..., trajs_per_batch=1, replay_buffer=replay_buffer)."
        )
    writes_trials = isinstance(collector, TrialCollector) or collector.trajs_per_batch is not None
    if not writes_trials:
        raise ValueError(
            "the collector must write whole trials, got one with trajs_per_batch=None, which "
            "writes fragments. Make it with Collector(..., trajs_per_batch=1, "
            "replay_buffer=replay_buffer)."
        )
