"""Means of a run's metrics, and the table of them, a CSV file."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from torchrl_amago._files import DamagedError, explain_full_disk, replace_file

PROGRESS_FILE = "progress.csv"
_TEXT = {"newline": "", "encoding": "utf-8"}


class MetricWindow:
    """Means of metrics since the last row; tensors are read from the device only then."""

    def __init__(self) -> None:
        self._totals: dict[str, tuple[Any, float]] = {}

    def add_scalars(self, metrics: Mapping[str, float | Tensor]) -> None:
        """Add one value of each metric: numbers, or 0-dimensional tensors."""
        for name, value in metrics.items():
            self.add(name, value.detach().float() if isinstance(value, Tensor) else float(value))

    def add(self, name: str, total: float | Tensor, count: float = 1) -> None:
        """Add ``count`` values that sum to ``total``."""
        before = self._totals.get(name, (0.0, 0.0))
        self._totals[name] = (before[0] + total, before[1] + count)

    def means(self) -> dict[str, float]:
        """Return the mean of every metric, in the order first seen, and start anew."""
        state, self._totals = self.state_dict(), {}
        return {name: total / count for name, (total, count) in state.items() if count}

    def state_dict(self) -> dict[str, tuple[float, float]]:
        return {name: (float(total), count) for name, (total, count) in self._totals.items()}

    def load_state_dict(self, state: Mapping[str, tuple[float, float]]) -> None:
        self._totals = dict(state)


class ProgressTable:
    """A CSV file that is on the disk row by row.

    A row with new columns replaces the whole file. The state holds the text: a resumed run has the
    rows of its checkpoint, whatever happened to the file.

    Example:
        >>> table = ProgressTable("progress.csv")
        >>> table.append({"update": 1})
        >>> table.append({"update": 2, "loss": 0.5})
        >>> read_progress(".")["loss"]
        array([nan, 0.5])
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.columns: list[str] = []

    def append(self, row: Mapping[str, float]) -> None:
        """Write one row; columns that it lacks stay empty."""
        new = [column for column in row if column not in self.columns]
        if new:
            rows = read_rows(self.path) if self.columns else []
            self.columns += new
            with replace_file(self.path, "w", **_TEXT) as file:
                writer = csv.DictWriter(file, self.columns, lineterminator="\n")
                writer.writeheader()
                writer.writerows(rows)
        with explain_full_disk(self.path), self.path.open("a", **_TEXT) as file:
            csv.DictWriter(file, self.columns, lineterminator="\n").writerow(row)

    def state_dict(self) -> dict[str, str]:
        return {"text": self.path.read_text(encoding="utf-8") if self.columns else ""}

    def load_state_dict(self, state: Mapping[str, str]) -> None:
        self.columns = next(csv.reader(state["text"].splitlines()), [])
        if not self.columns:
            return self.path.unlink(missing_ok=True)
        with replace_file(self.path, "w", **_TEXT) as file:
            file.write(state["text"])


def read_progress(run_dir: str | Path) -> dict[str, np.ndarray]:
    """Read a run's table, as :class:`ProgressTable` shows: float64 by column, NaN for empty cells.

    Raises DamagedError if it is no table of numbers, FileNotFoundError if there is none.
    """
    path = Path(run_dir) / PROGRESS_FILE
    try:
        rows = read_rows(path)
        columns = rows[0].keys() if rows else ()
        return {c: np.array([float(row[c] or "nan") for row in rows]) for c in columns}
    except (ValueError, csv.Error) as error:
        raise DamagedError(f"{path} must be a table of numbers, but {error}.") from error


def read_rows(path: str | Path) -> list[dict[str, str]]:
    """Read the rows of a CSV file, as text by column."""
    with Path(path).open(**_TEXT) as file:
        return list(csv.DictReader(file))
