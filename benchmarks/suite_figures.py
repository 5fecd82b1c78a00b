"""Figures of the suite: curves with bands, intervals and performance profiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter
from suite_runs import Axis, Run, common_place, curve, grouped
from suite_table import TASKS

from torchrl_amago.evaluation import Interval

# Okabe and Ito's palette without yellow: told apart in every kind of colour blindness.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
REFERENCE = "#777777"
AXES = {"time": "minutes of training on one core", "frames": "environment steps"}

Styles = Mapping[str, dict[str, Any]]


def make_styles(titles: Sequence[str]) -> Styles:
    """Return a colour and a line style for each method, the same in all figures."""
    lines = ("-", "--", ":")
    return {
        title: dict(
            color=COLOURS[number % len(COLOURS)], linestyle=lines[number // len(COLOURS) % 3]
        )
        for number, title in enumerate(titles)
    }


def draw_curves(path: Path, runs: Sequence[Run], axis: Axis, styles: Styles) -> None:
    """Draw the runs of a task: interquartile mean over seeds, 95% interval as a band."""
    figure, ax = _start(height=3.9)
    task = TASKS[runs[0].task]
    end = max(getattr(run, axis)[-1] for run in runs)
    if axis == "time":
        end = min(end, common_place(runs, axis))
    for title, seeds in grouped(runs, lambda run: run.title).items():
        # Over time a run that has ended keeps its score; over steps lines end with the longest run.
        last = end if axis == "time" else max(run.frames[-1] for run in seeds)
        places = np.linspace(0, last, 101)
        mean, low, high = curve(seeds, axis, places)
        shown = places / 60 if axis == "time" else places
        ax.fill_between(shown, low, high, color=styles[title]["color"], alpha=0.12, lw=0)
        ax.plot(shown, mean, **styles[title], lw=1.8, label=title)
    ax.axhline(task.threshold, color=REFERENCE, ls=":", lw=1, label="learned")
    ax.axhline(task.chance, color=REFERENCE, ls="-", lw=0.8, label="chance")
    ax.set(xlabel=AXES[axis], ylabel="return per trial")
    if axis == "frames":
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
    _finish(figure, path, task.title)


def draw_intervals(path: Path, rows: Mapping[str, Interval], styles: Styles, title: str) -> None:
    """Draw a point and a bar for each method."""
    figure, ax = _start(height=1.3 + 0.34 * len(rows))
    for height, (name, (point, low, high)) in enumerate(rows.items()):
        ax.plot([low, high], [height, height], color=styles[name]["color"], lw=6, alpha=0.35)
        ax.plot(point, height, "o", color=styles[name]["color"], ms=6)
    ax.set_yticks(range(len(rows)), rows)
    ax.invert_yaxis()
    ax.set_xlabel("interquartile mean of normalised scores")
    _finish(figure, path, title, legend=False)


def draw_profiles(
    path: Path, thresholds: np.ndarray, rows: Mapping[str, Interval], styles: Styles, title: str
) -> None:
    """Draw the fraction of runs above each score."""
    figure, ax = _start(height=3.9)
    for name, (point, low, high) in rows.items():
        ax.fill_between(thresholds, low, high, color=styles[name]["color"], alpha=0.12, lw=0)
        ax.plot(thresholds, point, **styles[name], lw=1.8, label=name)
    ax.set(xlabel="normalised score", ylabel="fraction of runs above it", ylim=(-0.02, 1.02))
    _finish(figure, path, title)


def _start(height: float) -> tuple[Figure, Any]:
    figure = Figure(figsize=(4.8, height), layout="constrained")
    ax = figure.subplots()
    ax.grid(color="#dddddd", lw=0.6)
    ax.set_axisbelow(True)
    ax.spines[["top", "right"]].set_visible(False)
    return figure, ax


def _finish(figure: Figure, path: Path, title: str, legend: bool = True) -> None:
    figure.suptitle(title, fontsize=11)
    if legend:
        labels = figure.axes[0].get_legend_handles_labels()[1]
        ncols = 1 if max(map(len, labels)) > 36 else 2  # two long ones are wider than the figure
        figure.legend(loc="outside lower center", ncols=ncols, frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=160)
