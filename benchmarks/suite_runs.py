"""Runs of the suite as their folders hold them, and their scores."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from suite_cells import read_json
from suite_statistics import stratified_bootstrap
from suite_table import METHODS, TASKS

from torchrl_amago.evaluation import Interval, TrialResults
from torchrl_amago.progress import read_rows

Axis = Literal["time", "frames"]


@dataclass(frozen=True)
class Run:
    """A finished cell: its evaluations in the order of training.

    Attributes:
        task, method, title, seed, command: as `cell.json` has them.
        limit: seconds of training that it was allowed.
        time, frames, score: `[N]`, seconds and steps before each evaluation, and its mean return.
        last: mean return of the last evaluation, which plays the policy that was chosen, on trials
            of its own; NaN if there is none.
    """

    task: str
    method: str
    title: str
    seed: int
    command: str
    limit: float
    time: np.ndarray
    frames: np.ndarray
    score: np.ndarray
    last: float

    def score_at(self, axis: Axis, place: float) -> float:
        """Return the score at a place: linear from chance to the evaluations, then the last one."""
        scores = [TASKS[self.task].chance, *self.score]
        return float(np.interp(place, [0.0, *getattr(self, axis)], scores))

    def first_above(self, axis: Axis, threshold: float) -> float:
        """Return the place of the first evaluation at or above a threshold, infinite if none is."""
        above = np.flatnonzero(self.score >= threshold)
        return float(getattr(self, axis)[above[0]]) if len(above) else np.inf


def read_runs(root: Path, tasks: Sequence[str], methods: Sequence[str]) -> list[Run]:
    """Read all cells that have an outcome, in the order of the tasks and methods given.

    Args:
        root: folder of the suite.
        tasks: tasks to read.
        methods: methods to read; all if empty.

    Raises:
        ValueError: if there is none.
    """
    folders = [path.parent for path in sorted(root.glob("*/*/*/outcome.json"))]
    ended = ("finished", "out of time")
    folders = [f for f in folders if read_json(f / "outcome.json")["outcome"] in ended]
    runs = [_read_run(folder) for folder in folders]
    runs = [run for run in runs if run.task in tasks and (not methods or run.method in methods)]
    if not runs:
        raise ValueError(f"a report needs at least one finished cell, and {root} has none.")
    order = list(dict.fromkeys([*methods, *METHODS, *(run.method for run in runs)]))
    return sorted(runs, key=lambda r: (tasks.index(r.task), order.index(r.method), r.seed))


def _read_run(folder: Path) -> Run:
    cell = read_json(folder / "cell.json")
    columns = [cell["columns"][name] for name in ("time", "frames", "score")]
    table = folder / "run" / cell["table"]
    rows = read_rows(table) if table.exists() else []
    # A row without an evaluation has an empty cell there, or the table lacks the column still.
    points = [[float(row[column]) for column in columns] for row in rows if row.get(columns[-1])]
    points = [point for point in points if np.isfinite(point).all()]
    evaluation = folder / "run" / "evaluation.npz"
    has_last = evaluation.exists()
    last = TrialResults.load(evaluation).trial_return.mean().item() if has_last else np.nan
    named = {name: cell[name] for name in ("task", "method", "title", "seed", "command")}
    time, frames, score = np.array(points, dtype=float).reshape(-1, 3).T
    return Run(
        **named, limit=60 * cell["minutes"], time=time, frames=frames, score=score, last=last
    )


def grouped(runs: Iterable[Run], key: Callable[[Run], str]) -> dict[str, list[Run]]:
    """Return runs by a key, in their order."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        groups.setdefault(key(run), []).append(run)
    return groups


def common_place(runs: Sequence[Run], axis: Axis) -> float:
    """Return the place up to which runs of a task are compared.

    That is the smallest limit of time, and the number of steps that all of them made. A run that
    ended before its limit keeps its last score.
    """
    if axis == "time":
        return min(run.limit for run in runs)
    return min(run.frames[-1] if len(run.frames) else 0.0 for run in runs)


def scores_at(runs: Sequence[Run], axis: Axis, place: float) -> np.ndarray:
    """Return the scores of runs at a place."""
    return np.array([run.score_at(axis, place) for run in runs])


def normalized_scores(
    by_task: dict[str, list[Run]], method: str, axis: Axis
) -> dict[str, np.ndarray]:
    """Return a method's scores by task at the common places, where chance is 0, a reference 1."""
    scores = {}
    for task, runs in by_task.items():
        if own := [run for run in runs if run.method == method]:
            place = common_place(runs, axis)
            scores[task] = TASKS[task].normalized(scores_at(own, axis, place))
    return scores


def curve(runs: Sequence[Run], axis: Axis, places: np.ndarray) -> Interval:
    """Return the interquartile mean over runs at each place, with its interval."""
    intervals = [stratified_bootstrap(scores_at(runs, axis, place)) for place in places]
    return Interval(*np.array(intervals).T)
