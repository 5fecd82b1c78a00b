"""The trainer: whole trials in, a fixed number of updates per collected batch, exact resume."""

from __future__ import annotations

import contextlib
import random
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict import TensorDictBase
from torch import nn
from torch.optim import Optimizer
from torchrl._utils import logger as torchrl_logger
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import BaseCollector
from torchrl.data import ReplayBuffer
from torchrl.objectives.utils import TargetNetUpdater
from torchrl.record.loggers import Logger
from torchrl.trainers import LRSchedulerHook, TargetNetUpdaterHook, Trainer

from torchrl_amago.evaluation import TrialResults
from torchrl_amago.trainers.checkpoint import (
    CHECKPOINTS_FOLDER,
    CheckpointStore,
    describe_architecture,
)
from torchrl_amago.trainers.hooks import AMAGOOptimizationStepper, TrialMonitor
from torchrl_amago.trainers.logging import (
    PROGRESS_FILE,
    MetricWindow,
    ProgressBar,
    ProgressTable,
    Stopwatch,
    make_logger,
)
from torchrl_amago.trainers.nonfinite import check_data
from torchrl_amago.trainers.optim import make_warmup

Evaluator = Callable[[], "Mapping[str, float] | TrialResults"]
Outcome = Literal["finished", "interrupted"]


class AMAGOTrainer(Trainer):
    """Collect whole trials, update ``updates_per_batch`` times, again and again.

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
    determines. A run that was killed or interrupted repeats what came after its last checkpoint;
    rows logged after it are dropped. A run whose ``total_updates`` is not a multiple of
    ``checkpoint_interval`` may be resumed with more updates too, but ends trials where a longer run
    wouldn't have. Environment transforms with running statistics are saved with the collector.

    **Ctrl-C** stops after the running update, closes everything and tells how to resume. No
    checkpoint is written then unless there is none yet, so that the resumed run stays equal to the
    uninterrupted one. Press twice to stop at once.

    Args:
        collector: ``Collector(env, policy, frames_per_batch=..., trajs_per_batch=1,
            replay_buffer=replay_buffer)``; it writes whole trials and yields nothing.
        loss_module: called on ``[B, T]`` slices; the entries of its output that begin with ``loss``
            are added up, the others are metrics.
        optimizer: see :func:`~torchrl_amago.trainers.make_optimizer`.
        replay_buffer: sampled with its own batch size.
        total_updates: updates at which the run ends.
        updates_per_batch: updates after each batch the collector gathers.
        run_dir: folder for everything the run writes.
        target_updater: stepped after every update, such as ``SoftUpdate(loss_module, tau=0.003)``.
        exploration: module whose ``step(frames)`` follows the collected frames; saved.
        evaluator: called without arguments; gives named numbers or ``TrialResults``. Make it seed
            its environment, so that every evaluation sees the same held-out tasks.
        eval_interval: updates between evaluations; there is one at the end in any case.
        checkpoint_interval: updates between checkpoints; there is one at the end in any case.
        keep_checkpoints: number of them kept.
        total_frames: environment steps at which the run ends, if earlier; None for no limit.
        min_trials: complete trials to wait for before the first update.
        clip_norm: largest norm of the gradient; None does not clip.
        warmup_updates: updates over which the learning rate rises from 1/n of its value to all.
        autocast: bfloat16 autocast in forward and loss.
        log_interval: updates between rows of ``progress.csv``.
        loggers: ``"tensorboard"``, ``"wandb"`` or torchrl loggers, besides the table.
        progress_bar: False to hide it; without a terminal it never shows.
        success_threshold: an attempt succeeds if its return is larger.
        seed: seeds torch, numpy, python and the environment when a new run starts.
        resume_command: what to tell the user to run after an interruption.

    Raises:
        ValueError: for a collector that doesn't write whole trials to ``replay_buffer``, or
            intervals smaller than 1.

    Example:
        >>> trainer = AMAGOTrainer(  # doctest: +SKIP
        ...     collector=collector, loss_module=loss, optimizer=make_optimizer(loss),
        ...     replay_buffer=rb, total_updates=1000, updates_per_batch=10, run_dir="runs/lake",
        ...     target_updater=SoftUpdate(loss, tau=0.003), exploration=policy.exploration)
        >>> trainer.train()  # doctest: +SKIP
        'finished'
    """

    def __init__(
        self,
        *,
        collector: BaseCollector,
        loss_module: nn.Module,
        optimizer: Optimizer,
        replay_buffer: ReplayBuffer,
        total_updates: int,
        updates_per_batch: int,
        run_dir: str | Path,
        target_updater: TargetNetUpdater | None = None,
        exploration: nn.Module | None = None,
        evaluator: Evaluator | None = None,
        eval_interval: int = 500,
        checkpoint_interval: int = 500,
        keep_checkpoints: int = 2,
        total_frames: int | None = None,
        min_trials: int = 1,
        clip_norm: float | None = 1.0,
        warmup_updates: int = 500,
        autocast: bool = False,
        log_interval: int = 50,
        loggers: Sequence[str | Logger] = (),
        progress_bar: bool = True,
        success_threshold: float = 0.0,
        seed: int | None = None,
        resume_command: str = "trainer.resume(); trainer.train()",
    ) -> None:
        _check_collector(collector, replay_buffer)
        _check_positive(
            total_updates=total_updates,
            updates_per_batch=updates_per_batch,
            eval_interval=eval_interval,
            checkpoint_interval=checkpoint_interval,
            log_interval=log_interval,
            min_trials=min_trials,
        )
        self.run_dir = Path(run_dir)
        super().__init__(
            collector=collector,
            total_frames=float("inf") if total_frames is None else total_frames,
            frame_skip=1,
            optim_steps_per_batch=updates_per_batch,
            loss_module=loss_module,
            optimizer=optimizer,
            optimization_stepper=AMAGOOptimizationStepper(clip_norm, autocast, self.run_dir),
            replay_buffer=replay_buffer,
            target_net_updater=target_updater,
            clip_norm=clip_norm,
            progress_bar=False,  # TorchRL's counts frames
            log_interval=log_interval,
        )
        self.seed, self.resume_command = seed, resume_command
        self.total_updates, self.min_trials = total_updates, min_trials
        self.exploration, self.evaluator = exploration, evaluator
        self.eval_interval, self.checkpoint_interval = eval_interval, checkpoint_interval
        self.collected_frames = self._optim_count = 0  # TorchRL keeps them on the class
        self.checkpoints = CheckpointStore(self.run_dir, keep_checkpoints)
        self.table = ProgressTable(self.run_dir / PROGRESS_FILE)
        self.stopwatch, self.window = Stopwatch(), MetricWindow()
        self.monitor = TrialMonitor(replay_buffer, self.window, self.run_dir, success_threshold)
        self.scheduler = make_warmup(optimizer, warmup_updates)
        self._device = next(loss_module.parameters()).device
        self._show_bar, self._logger_arguments = progress_bar, tuple(loggers)
        self._loggers: list[Logger] = []
        self._bar: ProgressBar | None = None
        self._updates_left = 0  # of the batch collected last
        self._last_row = {"frames": 0, "updates": 0, "training": 0.0}
        self._evaluated_at = self._saved_at = -1
        self._resumed: dict[str, Any] | None = None
        self._interrupted = False
        self._register_hooks()

    def _register_hooks(self) -> None:
        self.register_op("process_optim_batch", self._sample)
        LRSchedulerHook(self.scheduler, interval="optim").register(self)
        if self.target_net_updater is not None:
            self.register_op("post_optim", TargetNetUpdaterHook(self.target_net_updater))

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
            with _sigint(self._on_sigint):
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
            self._close()
        if not self._interrupted:
            return "finished"
        self._tell_interruption()
        return "interrupted"

    def _begin(self) -> None:
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._loggers = [make_logger(logger, self.run_dir) for logger in self._logger_arguments]
        self._bar = ProgressBar(self.total_updates, self._optim_count, self._show_bar)
        if self._resumed is None:
            if self.seed is not None:
                torch.manual_seed(self.seed)
                np.random.seed(self.seed % 2**32)
                random.seed(self.seed)
            self.monitor.skip_existing()
            self._restart_trials(self._draw_seed(), self._collector_state())
        else:
            GlobalRNGState().load_state_dict(self._resumed["rng"])
            self._restart_trials(self._resumed["env_seed"], self._resumed["collector"])
            self._resumed = {}
        self.stopwatch.start()

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

    def _collect(self, batches: Iterator[Any]) -> bool:
        if next(batches, self) is self:
            return False  # the collector's own total_frames
        frames = self.collector.requested_frames_per_batch
        self.collected_frames += frames
        if self.exploration is not None:
            self.exploration.step(frames)
        self.monitor()
        self._pre_steps_log_hook(None)
        if self.monitor.trials >= self.min_trials:
            self._updates_left = self.optim_steps_per_batch
        return True

    def optim_steps(self, batch: TensorDictBase | None) -> None:
        """The updates that are due since the last collected batch."""
        self._pre_optim_hook()
        while self._updates_left and not self._is_done():
            sub_batch = self._process_optim_batch_hook(batch)
            metrics = self.optimization_stepper.step(self, sub_batch)
            self._optim_count += 1
            self._updates_left -= 1
            self._post_optim_hook()
            self._post_optim_log(sub_batch)
            self.window.add_scalars(metrics)
            self._after_update()

    def _sample(self, _: TensorDictBase | None) -> TensorDictBase:
        batch = self.replay_buffer.sample()
        check_data(batch, self.run_dir, "observations and rewards of a training batch")
        return batch if self._device.type == "cpu" else batch.to(self._device)

    def _after_update(self) -> None:
        update = self._optim_count
        self._bar.update()
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
        update = self._optim_count
        if self._interrupted:
            if self.checkpoints.latest() is None:
                self._checkpoint(restart=False)
            return
        if self._saved_at != update:
            self._checkpoint(restart=False)
        if self.evaluator is not None and self._evaluated_at != update:
            self._write_row(self._evaluate())

    def _close(self) -> None:
        self.stopwatch.stop()
        self.table.close()
        for logger in self._loggers:
            logger.shutdown()
        if self._bar is not None:
            self._bar.close()
        self.collector.shutdown(raise_on_error=not self._interrupted)

    # -- what is seen --------------------------------------------------------------------------

    def _evaluate(self) -> dict[str, float]:
        if self.evaluator is None:
            return {}
        rng = GlobalRNGState()
        before = rng.state_dict()
        with self.stopwatch.apart("evaluation"):
            results = self.evaluator()
        rng.load_state_dict(before)  # evaluating more or less often must not change training
        self._evaluated_at = self._optim_count
        if isinstance(results, TrialResults):
            results = summarize(results)
        return {f"eval/{name}": float(value) for name, value in results.items()}

    def _write_row(self, evaluation: Mapping[str, float]) -> None:
        seconds = self.stopwatch.read()
        counts = {"frames": self.collected_frames, "updates": self._optim_count}
        elapsed = max(seconds["training"] - self._last_row["training"], 1e-9)
        row = {"update": self._optim_count, "frames": self.collected_frames}
        row["trials"] = self.monitor.trials
        row |= {f"seconds_{activity}": value for activity, value in seconds.items()}
        row |= {
            f"{name}_per_second": (value - self._last_row[name]) / elapsed
            for name, value in counts.items()
        }
        self._last_row = {**counts, "training": seconds["training"]}
        row["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        row |= self.window.means()
        row |= evaluation
        self.table.append(row)
        self._bar.show(row)
        for logger in self._loggers:
            for name, value in row.items():
                logger.log_scalar(name, value, step=self._optim_count)

    def _log(self, log_pbar: bool = False, **metrics: Any) -> None:
        """What TorchRL's logging hooks give joins the same table, as means over its rows."""
        for name, value in metrics.items():
            if not isinstance(value, torch.Tensor) or value.numel() == 1:
                self.window.add(name, float(value))

    # -- checkpoints ---------------------------------------------------------------------------

    def _checkpoint(self, restart: bool) -> None:
        with self.stopwatch.apart("checkpoint"):
            seed, collector = self._draw_seed(), self._collector_state()
            path = self.checkpoints.save(
                self._optim_count,
                self._run_state(seed, collector),
                self.replay_buffer,
                {
                    "frames": self.collected_frames,
                    "architecture": describe_architecture(self.loss_module),
                },
            )
            self._saved_at = self._optim_count
            torchrl_logger.debug(f"wrote {path}")
            if restart:
                self._restart_trials(seed, collector)

    def _run_state(self, env_seed: int, collector: dict[str, Any]) -> dict[str, Any]:
        exploration = {} if self.exploration is None else self.exploration.state_dict()
        return {
            "loss": self.loss_module.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scheduler": self.scheduler.state_dict(),
            "exploration": exploration,
            "collector": collector,
            "env_seed": env_seed,
            "rng": GlobalRNGState().state_dict(),
            "trainer": {
                "updates": self._optim_count,
                "frames": self.collected_frames,
                "updates_left": self._updates_left,
                "evaluated_at": self._evaluated_at,
                "last_row": self._last_row,
                "seconds": self.stopwatch.read(),
            },
            "monitor": self.monitor.state_dict(),
            "window": self.window.state_dict(),
            "table": self.table.state_dict(),
        }

    def resume(self, path: str | Path | None = None) -> AMAGOTrainer:
        """Go back to a checkpoint; :meth:`train` continues from there.

        Args:
            path: a run's folder (its last checkpoint is taken) or one checkpoint's folder. Default:
                ``run_dir``. From another run, that run's rows up to the checkpoint are copied.

        Raises:
            FileNotFoundError: if there is no checkpoint.
            RuntimeError: if it is damaged; the message names the newest intact one.
            ValueError: if it is of another architecture. In each case nothing has been changed.
        """
        found = self.checkpoints.find(path)
        source = found.parent.parent
        if source.resolve() != self.run_dir.resolve():
            refuse_existing_run(self.run_dir)
        state = self.checkpoints.load(found, self.loss_module)
        self.checkpoints.load_replay(found, self.replay_buffer)
        self.table.load_state_dict(state["table"], source=source / PROGRESS_FILE)
        self.loss_module.load_state_dict(state["loss"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scheduler.load_state_dict(state["scheduler"])
        if self.exploration is not None:
            self.exploration.load_state_dict(state["exploration"])
        self.monitor.load_state_dict(state["monitor"])
        self.window.load_state_dict(state["window"])
        counters = state["trainer"]
        self._optim_count = self._saved_at = counters["updates"]
        self.collected_frames = counters["frames"]
        self._updates_left = counters["updates_left"]
        self._evaluated_at, self._last_row = counters["evaluated_at"], counters["last_row"]
        self.stopwatch.seconds = dict(counters["seconds"])
        self._resumed = {key: state[key] for key in ("rng", "env_seed", "collector")}
        return self

    def _draw_seed(self) -> int:
        return int(torch.randint(2**31 - 1, ()))

    def _collector_state(self) -> dict[str, Any]:
        """Counters (trial numbers are stored in the replay) and statistics of the transforms.

        The policy's weights are the loss's, and saved there.
        """
        state = self.collector.state_dict()
        return {key: value for key, value in state.items() if key != "policy_state_dict"}

    def _restart_trials(self, seed: int, collector: dict[str, Any]) -> None:
        """End the trials in progress and begin new ones that ``seed`` and torch's generator decide."""
        env_state = collector.get("env_state_dict")
        if env_state:
            self.collector.env.load_state_dict(env_state)
        counters = {key: value for key, value in collector.items() if key != "env_state_dict"}
        self.collector.load_state_dict(counters, strict=False)
        # Some environments seed torch's generator too, with which exploration draws its noise.
        rng = torch.get_rng_state()
        self.collector.set_seed(seed)
        torch.set_rng_state(rng)
        self.collector.reset()

    # -- interruption --------------------------------------------------------------------------

    def _on_sigint(self) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        self.request_stop("interrupted")

    def _tell_interruption(self) -> None:
        latest = self.checkpoints.latest()
        if latest is None:
            torchrl_logger.warning(
                f"Interrupted at update {self._optim_count}, before there was a checkpoint."
            )
            return
        torchrl_logger.warning(
            f"Interrupted at update {self._optim_count}. Last checkpoint: {latest}. "
            f"To resume: {self.resume_command}"
        )


def summarize(results: TrialResults) -> dict[str, float]:
    """Means over trials: return, length, and success at the first and the last attempt."""
    return {
        "trial_return": float(results.trial_return.float().mean()),
        "trial_length": float(results.trial_length.float().mean()),
        "success_first": float(results.attempt_success[:, 0].float().mean()),
        "success_last": float(results.attempt_success[:, -1].float().mean()),
    }


def refuse_existing_run(run_dir: str | Path) -> None:
    """Raise FileExistsError if the folder holds a run; nothing is touched.

    Call it before expensive set-up; :meth:`AMAGOTrainer.train` does so in any case.
    """
    run_dir = Path(run_dir)
    for name in (PROGRESS_FILE, CHECKPOINTS_FOLDER):
        if (run_dir / name).exists():
            raise FileExistsError(
                f"a new run needs a folder without one, but {run_dir} holds {name}. Choose another "
                "run_dir, resume that run, or delete the folder."
            )


def _check_collector(collector: BaseCollector, replay_buffer: ReplayBuffer) -> None:
    if getattr(collector, "replay_buffer", None) is not replay_buffer:
        raise ValueError(
            "the collector must write to the trainer's replay_buffer, got a collector with "
            f"replay_buffer={type(getattr(collector, 'replay_buffer', None)).__name__}. Make it "
            "with Collector(..., trajs_per_batch=1, replay_buffer=replay_buffer)."
        )
    if getattr(collector, "trajs_per_batch", None) is None:
        raise ValueError(
            "the collector must write whole trials, got one with trajs_per_batch=None, which "
            "writes fragments. Make it with Collector(..., trajs_per_batch=1, "
            "replay_buffer=replay_buffer)."
        )


def _check_positive(**values: int) -> None:
    for name, value in values.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}. Give a larger number.")


@contextlib.contextmanager
def _sigint(on_signal: Callable[[], None]) -> Iterator[None]:
    """Call ``on_signal`` instead of raising KeyboardInterrupt; only the main thread may do so."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    previous = signal.signal(signal.SIGINT, lambda *_: on_signal())
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, previous)
