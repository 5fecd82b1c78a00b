"""What a run tells: one CSV table always, a progress bar on a terminal, other loggers when asked."""

from __future__ import annotations

import csv
import importlib.util
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.record.loggers import Logger
from tqdm import tqdm

from torchrl_amago.trainers.replacing import replacing

PROGRESS_FILE = "progress.csv"
CLOCK_COLUMNS = (
    "seconds_training",
    "seconds_evaluation",
    "seconds_checkpoint",
    "frames_per_second",
    "updates_per_second",
)


class ProgressTable:
    """A CSV file that is on the disk row by row, and that can be cut back to an earlier row.

    TorchRL's ``CSVLogger`` writes one file per scalar; plots want one table. Columns may appear
    late (the first evaluation brings some): then the file is rewritten, atomically.

    Args:
        path: file to write. Nothing is touched before the first row.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = ProgressTable(Path(folder) / "progress.csv")
        ...     table.append({"update": 1, "loss": 0.5})
        ...     table.append({"update": 2, "loss": 0.25, "eval/return": 3.0})
        ...     read_progress(folder)["eval/return"].tolist()
        [nan, 3.0]
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.columns: list[str] = []
        self.num_rows = 0

    def append(self, row: Mapping[str, float]) -> None:
        """Write one row; columns it lacks stay empty."""
        new = [column for column in row if column not in self.columns]
        if new:
            rows = _read_rows(self.path) if self.num_rows else []
            self.columns += new
            self._rewrite(rows)
        with self.path.open("a", newline="", encoding="utf-8") as file:
            cells = [_cell(row.get(column)) for column in self.columns]
            csv.writer(file, lineterminator="\n").writerow(cells)
        self.num_rows += 1

    def state_dict(self) -> dict[str, Any]:
        """Position in the file."""
        return {"num_rows": self.num_rows, "columns": list(self.columns)}

    def load_state_dict(self, state: Mapping[str, Any], source: Path | None = None) -> None:
        """Drop every row and column written after ``state_dict()``.

        Args:
            state: what ``state_dict()`` gave.
            source: table to take the rows from, if it is another file.
        """
        rows = _read_rows(source or self.path)
        self.columns, self.num_rows = list(state["columns"]), int(state["num_rows"])
        if len(rows) < self.num_rows:
            raise RuntimeError(
                f"{source or self.path} must hold the {self.num_rows} rows written before the "
                f"checkpoint, got {len(rows)}. Put the run's own file back, or resume into "
                "another run_dir from a copy of the whole run."
            )
        if self.columns:
            self._rewrite(rows[: self.num_rows])

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        with replacing(self.path, "w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(
                file, self.columns, restval="", extrasaction="ignore", lineterminator="\n"
            )
            writer.writeheader()
            writer.writerows(rows)


def _cell(value: float | None) -> str:
    return "" if value is None else repr(value)


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def read_progress(run_dir: str | Path) -> dict[str, np.ndarray]:
    """The table of a run: one float64 array per column, NaN where a row says nothing.

    Raises:
        FileNotFoundError: if the folder has no ``progress.csv``.
    """
    path = Path(run_dir) / PROGRESS_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"a run's folder holds {PROGRESS_FILE}, but {path} does not exist. Pass the run_dir "
            "of an AMAGOTrainer that has logged at least once."
        )
    rows = _read_rows(path)
    columns = rows[0].keys() if rows else ()
    return {c: np.array([float(row[c] or "nan") for row in rows]) for c in columns}


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
        self._sum = values if self._sum is None else self._sum.add_(values)
        self._count += 1

    def add(self, name: str, total: float, count: float = 1) -> None:
        """Add ``count`` values that sum to ``total``."""
        entry = self._totals.setdefault(name, [0.0, 0.0])
        entry[0] += float(total)
        entry[1] += float(count)

    def means(self) -> dict[str, float]:
        """Mean of every metric, in the order first seen; the window starts anew."""
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
        """What has been added since the last log."""
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
        """Training goes on."""
        self._since = time.perf_counter()

    def stop(self) -> None:
        """Training pauses."""
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


class ProgressBar:
    """tqdm over updates, with the numbers one watches; silent where there is no terminal."""

    # Shown in this order under these short names, from the latest row that has them.
    SHOWN = (
        ("eval/trial_return", "return"),
        ("eval/success_first", "first"),
        ("eval/success_last", "last"),
        ("train/trial_return", "train return"),
        ("loss_actor", "actor"),
        ("loss_qvalue", "critic"),
        ("frames_per_second", "frames/s"),
        ("updates_per_second", "updates/s"),
    )

    def __init__(self, total: int | None, initial: int, enabled: bool) -> None:
        # disable=None is tqdm's own test for a terminal.
        disable = None if enabled else True
        self._bar = tqdm(total=total, initial=initial, disable=disable, unit="update", leave=True)
        self._latest: dict[str, float] = {}

    def update(self) -> None:
        """One more update."""
        self._bar.update()

    def show(self, row: Mapping[str, float]) -> None:
        """Refresh the numbers."""
        if self._bar.disable:
            return
        self._latest.update({k: v for k, v in row.items() if not math.isnan(v)})
        values = {short: self._latest[key] for key, short in self.SHOWN if key in self._latest}
        self._bar.set_postfix({k: f"{v:.4g}" for k, v in values.items()}, refresh=False)

    def close(self) -> None:
        """Leave the last state on the screen."""
        self._bar.close()


def make_logger(logger: str | Logger, run_dir: str | Path) -> Logger:
    """A TorchRL logger by name, writing into ``run_dir``; loggers pass through.

    Args:
        logger: ``"tensorboard"``, ``"wandb"`` or any :class:`torchrl.record.loggers.Logger`.
        run_dir: the run's folder; its name is the experiment's.

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

    return WandbLogger(exp_name=run_dir.name, save_dir=str(run_dir))
