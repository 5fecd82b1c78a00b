"""Reports of a run: means of metrics and clocks, in the table, on the terminal, to loggers."""

from __future__ import annotations

import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor
from torchrl import logger as torchrl_logger
from torchrl.record import loggers as torchrl_loggers
from torchrl.record.loggers import Logger
from tqdm import tqdm

from torchrl_amago._validation import check_choice
from torchrl_amago.evaluation import Results, TrialResults, evaluation_metrics
from torchrl_amago.plots import plot_adaptation_curve
from torchrl_amago.progress import PROGRESS_FILE, MetricWindow, ProgressTable

ACTIVITIES = ("training", "evaluation", "checkpoint")
#: Columns that depend on the machine's speed.
CLOCK_COLUMNS = (*(f"seconds_{x}" for x in ACTIVITIES), "frames_per_second", "updates_per_second")
# Metrics on the terminal, under short names, from the latest row that has them.
_DISPLAYED = {
    "eval/trial_return": "return",
    "eval/success_first": "first",
    "eval/success_last": "last",
    "train/trial_return": "train return",
    "loss_actor": "actor",
    "loss_qvalue": "critic",
    "frames_per_second": "frames/s",
    "updates_per_second": "updates/s",
}


class RunReport:
    """Writer of rows to ``progress.csv``, the terminal (or as lines) and the loggers."""

    def __init__(
        self, run_dir: Path, loggers: Sequence[str | Logger] = (), progress_bar: bool = True
    ) -> None:
        self.run_dir, self.progress_bar, self.loggers = run_dir, progress_bar, list(loggers)
        self.window, self.table = MetricWindow(), ProgressTable(run_dir / PROGRESS_FILE)
        self.seconds, self._since = dict.fromkeys(ACTIVITIES, 0.0), time.perf_counter()
        self._bar, self._latest, self._logger_states = tqdm(disable=True), {}, []
        self._last_row = {"frames": 0, "updates": 0, "training": 0.0}

    def _read_clock(self, activity: str = "training") -> None:
        before, self._since = self._since, time.perf_counter()
        self.seconds[activity] += self._since - before

    @contextmanager
    def timed(self, activity: str) -> Iterator[None]:
        """Count the time inside as ``activity``, not as training."""
        self._read_clock()
        try:
            yield
        finally:
            self._read_clock(activity)

    def open(self, total_updates: int, update: int, hparams: Mapping[str, Any]) -> None:
        """Make loggers and progress bar, and log the run's settings."""
        hparams = {k: v if isinstance(v, int | float | str) else str(v) for k, v in hparams.items()}
        states = dict(enumerate(self._logger_states))
        for i, name in enumerate(self.loggers):
            saved = states.get(i, {})
            run_id = saved.get("state", {}).get("local", {}).get("id")
            self.loggers[i] = logger = make_logger(name, self.run_dir, run_id)
            if saved.get("kind") == type(logger).__name__:
                logger.load_state_dict(saved["state"])
            # Other loggers would list a resumed run a second time.
            if not saved or "wandb" in type(logger).__name__.lower():
                logger.log_hparams(hparams)
        disable = None if self.progress_bar and sys.stderr else True  # None: if it is no terminal
        self._bar = tqdm(total=total_updates, initial=update, disable=disable, unit="update")
        self._since = time.perf_counter()

    def log_line(self, line: str) -> None:
        if self.progress_bar and self._bar.disable:
            torchrl_logger.info(line)

    def add_update(self, metrics: Mapping[str, float | Tensor]) -> None:
        self._bar.update()
        self.window.add_scalars(metrics)

    def write_row(
        self, update: int, frames: int, extra: Mapping[str, float], evaluation: Results
    ) -> None:
        """Write the means since the last row, ``extra`` and the metrics of an evaluation."""
        self._read_clock()
        last, training = self._last_row, self.seconds["training"]
        elapsed = max(training - last["training"], 1e-9)
        row = {
            "update": update,
            "frames": frames,
            **{f"seconds_{activity}": value for activity, value in self.seconds.items()},
            "frames_per_second": (frames - last["frames"]) / elapsed,
            "updates_per_second": (update - last["updates"]) / elapsed,
            **extra,
            **self.window.means(),
            **evaluation_metrics(evaluation),
        }
        self._last_row = {"frames": frames, "updates": update, "training": training}
        self.table.append(row)
        self._display(row)
        for logger in self.loggers:
            logger.log_metrics(row, step=update)
        if isinstance(evaluation, TrialResults) and self.loggers:
            self._log_episodes(evaluation, update)

    def _display(self, row: Mapping[str, float]) -> None:
        latest = self._latest = self._latest | {k: v for k, v in row.items() if not math.isnan(v)}
        values = {name: f"{latest[key]:.4g}" for key, name in _DISPLAYED.items() if key in latest}
        self._bar.set_postfix(values, refresh=False)
        text = ", ".join(f"{name} {value}" for name, value in values.items())
        self.log_line(f"update {row['update']}/{self._bar.total}, {row['frames']} frames: {text}")

    def _log_episodes(self, results: TrialResults, update: int) -> None:
        means = {x: results.by_episode(x).nanmean(0).tolist() for x in ("return", "success")}
        row = {f"eval_episode_{i + 1}/{x}": v for x, vs in means.items() for i, v in enumerate(vs)}
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "adaptation_curve.png"
            plot_adaptation_curve(results, path)
            for logger in self.loggers:
                logger.log_metrics(row, step=update)
                _log_picture(logger, "eval/adaptation_curve", path, update)

    def close(self) -> None:
        for logger in self.loggers:
            if not isinstance(logger, str):
                logger.shutdown()
        self._bar.close()

    def state_dict(self) -> dict[str, Any]:
        self._read_clock()
        loggers = [logger for logger in self.loggers if not isinstance(logger, str)]
        return {
            "window": self.window.state_dict(),
            "seconds": dict(self.seconds),
            "last": dict(self._last_row),
            "table": self.table.state_dict(),
            "loggers": [{"kind": type(x).__name__, "state": x.state_dict()} for x in loggers],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.table.load_state_dict(state["table"])
        self.window.load_state_dict(state["window"])
        self.seconds = dict(state["seconds"])
        self._last_row, self._logger_states = dict(state["last"]), state["loggers"]


def make_logger(logger: str | Logger, run_dir: str | Path, run_id: str | None = None) -> Logger:
    """Make a logger in ``run_dir`` (or for a wandb run) from its name; return others as given."""
    if not isinstance(logger, str):
        return logger
    check_choice("loggers", logger, ("tensorboard", "wandb"))
    try:
        if logger == "tensorboard":
            return torchrl_loggers.TensorboardLogger("tensorboard", log_dir=str(run_dir))
        return torchrl_loggers.WandbLogger(Path(run_dir).name, save_dir=str(run_dir), id=run_id)
    except ImportError as error:
        raise ImportError(f'{error}. Run pip install "torchrl-amago[{logger}]".') from error


def _log_picture(logger: Logger, name: str, path: Path, update: int) -> None:
    if "wandb" in type(logger).__name__.lower():
        import wandb

        logger.log_metrics({name: wandb.Image(str(path))}, step=update)
    elif hasattr(logger.experiment, "add_image"):
        from matplotlib.image import imread

        logger.experiment.add_image(name, imread(path), global_step=update, dataformats="HWC")
