"""What a run reports: means of metrics, clocks, and rows for table, terminal and loggers."""

from __future__ import annotations

import importlib.util
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torchrl import logger as torchrl_logger
from torchrl.record.loggers import Logger
from tqdm import tqdm

from torchrl_amago.evaluation import TrialResults, plot_adaptation_curve
from torchrl_amago.trainers.progress import PROGRESS_FILE, ProgressTable

# The numbers one watches, under short names, from the latest row that has them.
_SHOWN = (
    ("eval/trial_return", "return"),
    ("eval/success_first", "first"),
    ("eval/success_last", "last"),
    ("train/trial_return", "train return"),
    ("loss_actor", "actor"),
    ("loss_qvalue", "critic"),
    ("frames_per_second", "frames/s"),
    ("updates_per_second", "updates/s"),
)


class MetricWindow:
    """Means of metrics since the last log; tensors are only read when it is asked for them.

    Example:
        >>> import torch
        >>> window = MetricWindow()
        >>> window.add_scalars({"loss": torch.tensor(1.0)})
        >>> window.add_scalars({"loss": torch.tensor(3.0)})
        >>> window.add("return", total=10.0, count=4)
        >>> window.means()
        {'loss': 2.0, 'return': 2.5}
    """

    def __init__(self) -> None:
        self._totals: dict[str, list[Any]] = {}

    def add_scalars(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one value of each metric (0-dimensional tensors)."""
        for name, value in metrics.items():
            self.add(name, value.detach().float())

    def add(self, name: str, total: float | Tensor, count: float = 1) -> None:
        """Add ``count`` values that sum to ``total``."""
        entry = self._totals.setdefault(name, [0.0, 0.0])
        entry[0] = entry[0] + total
        entry[1] += count

    def means(self) -> dict[str, float]:
        """Return the mean of every metric, in the order first seen, and start anew."""
        state, self._totals = self.state_dict(), {}
        return {name: total / count for name, (total, count) in state.items() if count}

    def state_dict(self) -> dict[str, list[float]]:
        """Sum and count of every metric since the last log."""
        return {name: [float(total), count] for name, (total, count) in self._totals.items()}

    def load_state_dict(self, state: Mapping[str, list[float]]) -> None:
        """Go on with a window."""
        self._totals = {name: list(entry) for name, entry in state.items()}


class Stopwatch:
    """Seconds by activity; whatever is not measured apart is ``training``."""

    def __init__(self) -> None:
        self.seconds = {"training": 0.0, "evaluation": 0.0, "checkpoint": 0.0}
        self.start()

    def start(self) -> None:
        """Count from here."""
        self._since = time.perf_counter()

    def read(self, activity: str = "training") -> dict[str, float]:
        """Count the time since the last reading as ``activity``; return all seconds so far."""
        now = time.perf_counter()
        self.seconds[activity] += now - self._since
        self._since = now
        return dict(self.seconds)

    @contextmanager
    def apart(self, activity: str) -> Iterator[None]:
        """Count the time inside as ``activity``, not as training."""
        self.read()
        try:
            yield
        finally:
            self.read(activity)


class RunReport:
    """Writes the same row to ``progress.csv``, the terminal and the loggers.

    On a terminal a progress bar shows the numbers; without one, each row is a line of TorchRL's
    logger.

    Args:
        run_dir: the run's folder.
        loggers: see :func:`make_logger`.
        progress_bar: False for neither bar nor lines.
    """

    def __init__(
        self, run_dir: Path, loggers: Sequence[str | Logger] = (), progress_bar: bool = True
    ) -> None:
        self.run_dir, self.progress_bar = run_dir, progress_bar
        self.window, self.stopwatch = MetricWindow(), Stopwatch()
        self.table = ProgressTable(run_dir / PROGRESS_FILE)
        #: Folder of the run whose rows a resumed run takes over; None for its own.
        self.source: Path | None = None
        self.loggers: list[str | Logger] = list(loggers)
        self._logger_states: dict[str, Any] = {}
        self._bar: tqdm | None = None
        self._latest: dict[str, float] = {}
        self._last = {"frames": 0, "updates": 0, "training": 0.0}

    def open(self, total_updates: int, update: int, hparams: Mapping[str, Any]) -> None:
        """Make loggers and bar, and tell the loggers the run's settings."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        for i, logger in enumerate(self.loggers):
            saved = self._logger_states.get(str(i), {})
            run_id = saved.get("state", {}).get("local", {}).get("id")
            self.loggers[i] = logger = make_logger(logger, self.run_dir, run_id)
            if saved.get("kind") == type(logger).__name__:
                logger.load_state_dict(saved["state"])
            if not saved or _is_wandb(logger):  # others would list the run a second time
                plain = (bool, int, float, str)
                logger.log_hparams(
                    {k: v if isinstance(v, plain) else str(v) for k, v in hparams.items()}
                )
        # disable=None is tqdm's own test for a terminal.
        disable = None if self.progress_bar else True
        self._bar = tqdm(total=total_updates, initial=update, disable=disable, unit="update")

    def say(self, line: str) -> None:
        """Log a line where no progress bar is shown."""
        if self.progress_bar and self._bar.disable:
            torchrl_logger.info(line)

    def tick(self) -> None:
        """Count one more update."""
        self._bar.update()

    def row(
        self,
        update: int,
        frames: int,
        extra: Mapping[str, float],
        evaluation: Mapping[str, float] | TrialResults,
    ) -> None:
        """Write the means since the last row, ``extra`` and the numbers of an evaluation."""
        seconds, last = self.stopwatch.read(), self._last
        elapsed = max(seconds["training"] - last["training"], 1e-9)
        row = {
            "update": update,
            "frames": frames,
            **{f"seconds_{activity}": value for activity, value in seconds.items()},
            "frames_per_second": (frames - last["frames"]) / elapsed,
            "updates_per_second": (update - last["updates"]) / elapsed,
            **extra,
            **self.window.means(),
            **evaluation_metrics(evaluation),
        }
        self._last = {"frames": frames, "updates": update, "training": seconds["training"]}
        self.table.append(row)
        self._show(row)
        for logger in self.loggers:
            for name, value in row.items():
                logger.log_scalar(name, value, step=update)
        if isinstance(evaluation, TrialResults) and self.loggers:
            self._log_attempts(evaluation, update)

    def _show(self, row: Mapping[str, float]) -> None:
        self._latest.update({k: v for k, v in row.items() if not math.isnan(v)})
        shown = {short: self._latest[key] for key, short in _SHOWN if key in self._latest}
        shown = {short: f"{value:.4g}" for short, value in shown.items()}
        self._bar.set_postfix(shown, refresh=False)
        numbers = ", ".join(f"{short} {value}" for short, value in shown.items())
        self.say(f"update {row['update']}/{self._bar.total}, {row['frames']} frames: {numbers}")

    def _log_attempts(self, results: TrialResults, update: int) -> None:
        """Log return and success of each attempt, as numbers and as a picture."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adaptation_curve.png"
            plot_adaptation_curve(results, path)
            for logger in self.loggers:
                for measure in ("return", "success"):
                    for i, mean in enumerate(results.by_attempt(measure).nanmean(0).tolist()):
                        logger.log_scalar(f"eval_attempt_{i + 1}/{measure}", mean, step=update)
                _log_picture(logger, "eval/adaptation_curve", path, update)

    def close(self) -> None:
        """Close everything that is open."""
        for logger in self.loggers:
            if not isinstance(logger, str):
                logger.shutdown()
        if self._bar is not None:
            self._bar.close()

    def state_dict(self) -> dict[str, Any]:
        """Window, clocks, size of the table, and whatever loggers need to go on."""
        loggers = {
            str(i): {"kind": type(logger).__name__, "state": logger.state_dict()}
            for i, logger in enumerate(self.loggers)
            if not isinstance(logger, str)
        }
        return {
            "window": self.window.state_dict(),
            "seconds": self.stopwatch.read(),
            "last": dict(self._last),
            "table": self.table.state_dict(),
            "loggers": loggers,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a report; rows that were written after it are dropped."""
        source = None if self.source is None else self.source / PROGRESS_FILE
        self.table.load_state_dict(state["table"], source)
        self.window.load_state_dict(state["window"])
        self.stopwatch.seconds = dict(state["seconds"])
        self._last, self._logger_states = dict(state["last"]), state["loggers"]


def evaluation_metrics(results: Mapping[str, float] | TrialResults) -> dict[str, float]:
    """Columns of an evaluation: named numbers as they are, ``TrialResults`` by their summary."""
    if isinstance(results, TrialResults):
        results = results.summary()
    return {f"eval/{name}": float(value) for name, value in results.items()}


def make_logger(logger: str | Logger, run_dir: str | Path, run_id: str | None = None) -> Logger:
    """Make a TorchRL logger that writes into ``run_dir``; loggers pass through.

    Args:
        logger: ``"tensorboard"``, ``"wandb"`` or any :class:`torchrl.record.loggers.Logger`.
        run_dir: the run's folder; its name is the experiment's.
        run_id: run to go on with, of a logger that has ids.
    """
    if not isinstance(logger, str):
        return logger
    if logger not in ("tensorboard", "wandb"):
        raise ValueError(
            f"loggers must be 'tensorboard', 'wandb' or torchrl Logger objects, got {logger!r}. "
            f"{PROGRESS_FILE} is written in any case."
        )
    if importlib.util.find_spec(logger) is None:
        raise ImportError(
            f"the {logger!r} logger needs the package {logger}, which is not installed. Install "
            f"it with: pip install 'torchrl-amago[{logger}]'"
        )
    from torchrl.record.loggers import TensorboardLogger, WandbLogger

    run_dir = Path(run_dir)
    if logger == "tensorboard":
        return TensorboardLogger(exp_name="tensorboard", log_dir=str(run_dir))
    return WandbLogger(exp_name=run_dir.name, save_dir=str(run_dir), id=run_id)


def _is_wandb(logger: Logger) -> bool:
    return "wandb" in type(logger).__name__.lower()


def _log_picture(logger: Logger, name: str, path: Path, update: int) -> None:
    """Log a PNG file where the logger shows pictures (TensorBoard, wandb)."""
    if _is_wandb(logger):
        import wandb

        logger.log_metrics({name: wandb.Image(str(path))}, step=update)
    elif hasattr(logger.experiment, "add_image"):
        from matplotlib.image import imread

        logger.experiment.add_image(name, imread(path), global_step=update, dataformats="HWC")
