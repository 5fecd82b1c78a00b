"""What a run reports, put together: metrics since the last row, clocks, table, bar and loggers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torchrl.record.loggers import Logger

from torchrl_amago.trainers.logging import (
    PROGRESS_FILE,
    MetricWindow,
    ProgressBar,
    ProgressTable,
    Stopwatch,
    make_logger,
)


class RunReport:
    """Writes the same row to ``progress.csv``, the progress bar and the loggers.

    Args:
        run_dir: the run's folder.
        loggers: see :func:`~torchrl_amago.trainers.make_logger`.
        progress_bar: whether to show one, if there is a terminal.

    Example:
        >>> import tempfile
        >>> from torchrl_amago.trainers import read_progress
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     report = RunReport(Path(folder), progress_bar=False)
        ...     report.open(total_updates=100, update=0)
        ...     report.window.add("loss", 3.0, count=2)
        ...     report.row(update=2, frames=64, extra={}, evaluation={"eval/trial_return": 4.5})
        ...     report.close()
        ...     rows = read_progress(folder)
        >>> rows["loss"].item(), rows["eval/trial_return"].item()
        (1.5, 4.5)
    """

    def __init__(
        self, run_dir: Path, loggers: Sequence[str | Logger] = (), progress_bar: bool = True
    ) -> None:
        self.run_dir = run_dir
        self.window, self.stopwatch = MetricWindow(), Stopwatch()
        self.table = ProgressTable(run_dir / PROGRESS_FILE)
        self._logger_arguments, self._show_bar = tuple(loggers), progress_bar
        self._loggers: list[Logger] = []
        self._bar: ProgressBar | None = None
        self._last = {"frames": 0, "updates": 0, "training": 0.0}

    def open(self, total_updates: int, update: int) -> None:
        """Make loggers and bar; nothing is written before."""
        self.run_dir.mkdir(parents=True, exist_ok=True)
        self._loggers = [make_logger(logger, self.run_dir) for logger in self._logger_arguments]
        self._bar = ProgressBar(total_updates, update, self._show_bar)

    def tick(self) -> None:
        """One more update."""
        self._bar.update()

    def row(
        self, update: int, frames: int, extra: Mapping[str, float], evaluation: Mapping[str, float]
    ) -> None:
        """Write the means since the last row, ``extra`` and what an evaluation gave."""
        seconds = self.stopwatch.read()
        elapsed = max(seconds["training"] - self._last["training"], 1e-9)
        row = {"update": update, "frames": frames}
        row |= {f"seconds_{activity}": value for activity, value in seconds.items()}
        row["frames_per_second"] = (frames - self._last["frames"]) / elapsed
        row["updates_per_second"] = (update - self._last["updates"]) / elapsed
        self._last = {"frames": frames, "updates": update, "training": seconds["training"]}
        row |= {**extra, **self.window.means(), **evaluation}
        self.table.append(row)
        self._bar.show(row)
        for logger in self._loggers:
            for name, value in row.items():
                logger.log_scalar(name, value, step=update)

    def close(self) -> None:
        """Close everything that is open."""
        self.stopwatch.stop()
        for logger in self._loggers:
            logger.shutdown()
        if self._bar is not None:
            self._bar.close()

    def state_dict(self) -> dict[str, Any]:
        """Where in the table the run is, what it has added up since, and its clocks."""
        return {
            "table": self.table.state_dict(),
            "window": self.window.state_dict(),
            "seconds": self.stopwatch.read(),
            "last": self._last,
        }

    def load_state_dict(self, state: Mapping[str, Any], run_dir: Path | None = None) -> None:
        """Go on from there; rows written later are dropped.

        Args:
            state: what ``state_dict()`` gave.
            run_dir: folder of the run it was, if another: its rows are copied.
        """
        source = None if run_dir is None else run_dir / PROGRESS_FILE
        self.table.load_state_dict(state["table"], source)
        self.window.load_state_dict(state["window"])
        self.stopwatch.seconds = dict(state["seconds"])
        self._last = dict(state["last"])
