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

import torch
from torch import Tensor
from torchrl._utils import logger as torchrl_logger
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
    """Means of metrics since the last log.

    Tensors are added up where they are, in one stacked operation, and only read at log time: no
    synchronisation with a device in between.

    Example:
        >>> window = MetricWindow()
        >>> window.add_scalars({"loss": torch.tensor(1.0)})
        >>> window.add_scalars({"loss": torch.tensor(3.0)})
        >>> window.add("return", total=10.0, count=4)
        >>> window.means()
        {'return': 2.5, 'loss': 2.0}
    """

    def __init__(self) -> None:
        self._keys: list[str] = []
        self._sum: Tensor | None = None
        self._count = 0
        self._totals: dict[str, list[float]] = {}

    def add_scalars(self, metrics: Mapping[str, Tensor]) -> None:
        """Add one value of each metric (0-dimensional tensors)."""
        keys = list(metrics.keys())
        if keys != self._keys:
            self._fold()
            self._keys = keys
        values = torch.stack([x.detach() for x in metrics.values()]).float()
        # What a checkpoint brought back lies on the CPU.
        self._sum = values if self._sum is None else self._sum.to(values.device).add_(values)
        self._count += 1

    def add(self, name: str, total: float, count: float = 1) -> None:
        """Add ``count`` values that sum to ``total``."""
        entry = self._totals.setdefault(name, [0.0, 0.0])
        entry[0] += float(total)
        entry[1] += float(count)

    def means(self) -> dict[str, float]:
        """Return the mean of every metric, in the order first seen, and start anew."""
        self._fold()
        out = {name: total / count for name, (total, count) in self._totals.items() if count}
        self._totals = {}
        return out

    def _fold(self) -> None:
        if self._sum is not None:
            for name, total in zip(self._keys, self._sum.tolist(), strict=True):
                self.add(name, total, self._count)
        self._keys, self._sum, self._count = [], None, 0

    def state_dict(self) -> dict[str, Any]:
        """Everything added since the last log."""
        total = torch.zeros(0) if self._sum is None else self._sum.clone()
        return {"keys": self._keys, "sum": total, "count": self._count, "totals": self._totals}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on with a window."""
        self._keys, self._count = list(state["keys"]), int(state["count"])
        self._sum = state["sum"].clone() if self._count else None
        self._totals = {name: list(entry) for name, entry in state["totals"].items()}


class Stopwatch:
    """Seconds by activity; whatever is not measured apart is ``training``.

    Example:
        >>> watch = Stopwatch()
        >>> watch.start()
        >>> with watch.apart("evaluation"):
        ...     pass
        >>> sorted(watch.read())
        ['checkpoint', 'evaluation', 'training']
    """

    def __init__(self) -> None:
        self.seconds = {"training": 0.0, "evaluation": 0.0, "checkpoint": 0.0}
        self._since: float | None = None

    def start(self) -> None:
        """Count from here."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Pause."""
        if self._since is not None:
            self.seconds["training"] += time.perf_counter() - self._since
            self._since = None

    @contextmanager
    def apart(self, activity: str) -> Iterator[None]:
        """Count the time inside as ``activity``, not as training."""
        self.stop()
        began = time.perf_counter()
        try:
            yield
        finally:
            self.seconds[activity] += time.perf_counter() - began
            self.start()

    def read(self) -> dict[str, float]:
        """Seconds so far."""
        if self._since is not None:
            self.stop()
            self.start()
        return dict(self.seconds)


class RunReport:
    """Writes the same row to ``progress.csv``, the terminal and the loggers.

    On a terminal a progress bar shows the numbers; without one, each row is a line of TorchRL's
    logger.

    Args:
        run_dir: the run's folder.
        loggers: see :func:`make_logger`.
        progress_bar: False for neither bar nor lines.

    Example:
        >>> import tempfile
        >>> from torchrl_amago.trainers import read_progress
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = RunReport(Path(folder), progress_bar=False)
        ...     report.open(total_updates=100, update=0, hparams={"tau": 0.01})
        ...     report.window.add("loss", 3.0, count=2)
        ...     report.row(update=2, frames=64, extra={}, evaluation={"trial_return": 4.5})
        ...     report.close()
        ...     rows = read_progress(folder)
        >>> rows["loss"].item(), rows["eval/trial_return"].item()
        (1.5, 4.5)
    """

    def __init__(
        self, run_dir: Path, loggers: Sequence[str | Logger] = (), progress_bar: bool = True
    ) -> None:
        self.run_dir, self.progress_bar = run_dir, progress_bar
        self.window, self.stopwatch = MetricWindow(), Stopwatch()
        self.table = ProgressTable(run_dir / PROGRESS_FILE)
        #: Where the table's rows are when a run resumes; None for its own folder.
        self.source: Path | None = None
        self.loggers: list[str | Logger] = list(loggers)
        self._logger_states: dict[str, Any] = {}
        self._bar: tqdm | None = None
        self._total, self._latest = 0, {}
        self._last = {"frames": 0, "updates": 0, "training": 0.0}

    def open(self, total_updates: int, update: int, hparams: Mapping[str, Any]) -> None:
        """Make loggers and bar, and tell the loggers the run's settings."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._total, is_new = total_updates, not self._logger_states
        for i, logger in enumerate(self.loggers):
            saved = self._logger_states.get(str(i), {})
            self.loggers[i] = logger = make_logger(logger, self.run_dir, _id_of(saved))
            if saved.get("kind") == type(logger).__name__:
                logger.load_state_dict(saved["state"])
            if is_new or _is_wandb(logger):  # others would list the run a second time
                logger.log_hparams({k: _hparam(v) for k, v in hparams.items()})
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
        seconds = self.stopwatch.read()
        elapsed = max(seconds["training"] - self._last["training"], 1e-9)
        row = {"update": update, "frames": frames}
        row |= {f"seconds_{activity}": value for activity, value in seconds.items()}
        row["frames_per_second"] = (frames - self._last["frames"]) / elapsed
        row["updates_per_second"] = (update - self._last["updates"]) / elapsed
        self._last = {"frames": frames, "updates": update, "training": seconds["training"]}
        row |= {**extra, **self.window.means(), **evaluation_metrics(evaluation)}
        self.table.append(row)
        self._show(row)
        for logger in self.loggers:
            for name, value in row.items():
                logger.log_scalar(name, value, step=update)
        if isinstance(evaluation, TrialResults):
            self._log_attempts(evaluation, update)

    def _show(self, row: Mapping[str, float]) -> None:
        self._latest.update({k: v for k, v in row.items() if not math.isnan(v)})
        shown = {short: self._latest[key] for key, short in _SHOWN if key in self._latest}
        shown = {short: f"{value:.4g}" for short, value in shown.items()}
        self._bar.set_postfix(shown, refresh=False)
        numbers = ", ".join(f"{short} {value}" for short, value in shown.items())
        self.say(f"update {row['update']}/{self._total}, {row['frames']} frames: {numbers}")

    def _log_attempts(self, results: TrialResults, update: int) -> None:
        """Give the loggers return and success of each attempt, as numbers and as a picture."""
        if results.attempt_return.shape[1] < 2 or not self.loggers:
            return
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
        self.stopwatch.stop()
        for logger in self.loggers:
            if not isinstance(logger, str):
                logger.shutdown()
        if self._bar is not None:
            self._bar.close()

    def state_dict(self) -> dict[str, Any]:
        """Window, clocks, size of the table, and what loggers need to go on."""
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
    """A TorchRL logger by name, writing into ``run_dir``; loggers pass through.

    Args:
        logger: ``"tensorboard"``, ``"wandb"`` or any :class:`torchrl.record.loggers.Logger`.
        run_dir: the run's folder; its name is the experiment's.
        run_id: run to go on with, of a logger that has ids.

    Raises:
        ImportError: if the package is missing; the message names the extra to install.
        ValueError: for another name.
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
    run_dir = Path(run_dir)
    if logger == "tensorboard":
        from torchrl.record.loggers import TensorboardLogger

        return TensorboardLogger(exp_name="tensorboard", log_dir=str(run_dir))
    from torchrl.record.loggers import WandbLogger

    return WandbLogger(exp_name=run_dir.name, save_dir=str(run_dir), id=run_id)


def _id_of(saved: Mapping[str, Any]) -> str | None:
    return saved.get("state", {}).get("local", {}).get("id")


def _hparam(value: Any) -> Any:
    return value if isinstance(value, bool | int | float | str) else str(value)


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
