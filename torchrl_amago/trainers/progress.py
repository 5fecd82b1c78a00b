"""The table of a run, `progress.csv`: on the disk row by row, and verified when the run goes on."""

from __future__ import annotations

import csv
import hashlib
import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from torchrl_amago.files import DamagedError, explain_full_disk, replace_file, sha256

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
    late (the first evaluation brings some): then the file is replaced as a whole.

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
            self._write(_render(rows, self.columns))
        with (
            explain_full_disk(self.path),
            self.path.open("a", newline="", encoding="utf-8") as file,
        ):
            cells = [_cell(row.get(column)) for column in self.columns]
            csv.writer(file, lineterminator="\n").writerow(cells)
        self.num_rows += 1

    def state_dict(self) -> dict[str, Any]:
        """Size and SHA-256 of the table."""
        digest = sha256(self.path) if self.num_rows else ""
        return {"num_rows": self.num_rows, "columns": list(self.columns), "sha256": digest}

    def load_state_dict(self, state: Mapping[str, Any], source: Path | None = None) -> None:
        """Drop every row and column written after ``state_dict()``.

        The rows come from `source`, if that is another file.

        Raises:
            DamagedError: if the earlier rows are not there as they were written.
        """
        columns, num_rows = list(state["columns"]), int(state["num_rows"])
        source = source or self.path
        rows = _read_rows(source)
        if len(rows) < num_rows:
            raise _damaged(source, f"it holds {len(rows)} rows of {num_rows}")
        content = _render(rows[:num_rows], columns)
        if num_rows and hashlib.sha256(content).hexdigest() != state["sha256"]:
            raise _damaged(source, "they have changed (SHA-256 differs)")
        self.columns, self.num_rows = columns, num_rows
        if columns:
            self._write(content)
        else:
            self.path.unlink(missing_ok=True)

    def _write(self, content: bytes) -> None:
        with replace_file(self.path) as file:
            file.write(content)


def read_progress(run_dir: str | Path) -> dict[str, np.ndarray]:
    """Read the table of a run: one float64 array per column, NaN for empty cells."""
    path = Path(run_dir) / PROGRESS_FILE
    if not path.exists():
        raise FileNotFoundError(
            f"a run's folder holds {PROGRESS_FILE}, but {path} does not exist. Pass the run_dir "
            "of an AMAGOTrainer that has logged at least once."
        )
    rows = _read_rows(path)
    columns = rows[0].keys() if rows else ()
    return {c: np.array([float(row[c] or "nan") for row in rows]) for c in columns}


def _cell(value: float | None) -> str:
    return "" if value is None else repr(value)


def _read_rows(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return list(csv.DictReader(file))
    except (UnicodeDecodeError, csv.Error) as error:
        raise _damaged(path, f"it cannot be read ({error})") from error


def _render(rows: list[dict[str, str]], columns: list[str]) -> bytes:
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    # A cell that a damaged row lacks comes as None.
    writer.writerows({key: cell or "" for key, cell in row.items()} for row in rows)
    return text.getvalue().encode()


def _damaged(path: Path, problem: str) -> DamagedError:
    return DamagedError(
        f"{path} must hold the rows written before the checkpoint, but {problem}. Put the run's own "
        "file back, or resume into another run_dir from a copy of the whole run"
    )
