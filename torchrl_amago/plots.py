"""Figures as files (PNG, PDF or SVG): learning curve, adaptation curve, picture strip of a trial.

They are drawn without pyplot: no global state, no display. Importing matplotlib takes long, and
waits until something is drawn.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchrl_amago.evaluation.results import Measure, TrialResults
from torchrl_amago.evaluation.statistics import bootstrap_mean
from torchrl_amago.progress import read_rows

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

__all__ = ["plot_adaptation_curve", "plot_learning_curve", "plot_trial_strip"]

Table = Sequence[Mapping[str, Any]] | str | Path
"""Logged table: rows of column -> number (other entries are skipped), or its CSV file."""
Results = TrialResults | Sequence[TrialResults]

# Okabe and Ito's palette: told apart in every kind of colour blindness, and in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_REFERENCE_COLOUR = "#444444"
_DPI = 160
_PANELS = {
    "return per trial": {"train/trial_return": "training", "eval/trial_return": "evaluation"},
    "success rate": {
        "train/success_last": "last episode, training",
        "eval/success_last": "last episode, evaluation",
        "train/success_first": "first episode, training",
        "eval/success_first": "first episode, evaluation",
    },
}


def plot_learning_curve(
    runs: Table | Sequence[Table] | Mapping[str, Table | Sequence[Table]],
    path: str | Path,
    *,
    x: str = "frames",
    panels: Mapping[str, Mapping[str, str]] | None = None,
    reference: Mapping[str, float] | None = None,
    reference_label: str = "optimal",
    marks: Mapping[str, float] | None = None,
    title: str | None = None,
) -> None:
    """Draw logged columns over the steps of a run.

    Several seeds become their mean with its 95% bootstrap interval, over the steps that all of them
    reached, interpolated at the first seed's points.

    Args:
        runs: a run's table, or a sequence of tables of several seeds; or either by name for several
            agents, which share the panels.
        path: PNG (or PDF, SVG) to write.
        x: column on the horizontal axis.
        panels: panel title -> {column: label}. By default return per trial, and success at the
            first and last episode, in training (thin) and evaluation, if logged.
        reference: panel title -> height of a dashed line, such as the optimum.
        marks: label -> position on the horizontal axis of a dotted line in every panel.

    Raises:
        ValueError: if no column of the panels was logged.

    Example:
        >>> rows = [{"frames": 64 * t, "eval/trial_return": t / 10} for t in range(40)]
        >>> plot_learning_curve({"agent": [rows, rows, rows]}, "learning_curve.png")
    """
    runs = runs if isinstance(runs, Mapping) else {"": runs}
    tables = {name: _read_seeds(run) for name, run in runs.items()}
    logged = {key for seeds in tables.values() for rows in seeds for row in rows for key in row}
    panels = {k: columns for k, columns in (panels or _PANELS).items() if logged & columns.keys()}
    if not panels or x not in logged:
        raise ValueError(
            f"the learning curve needs column {x!r} and a column to draw over it, got "
            f"{sorted(logged)}. Name yours with x= and panels=."
        )
    from matplotlib.ticker import EngFormatter

    figure, axes = _figure(len(panels), width=4.6, height=3.3)
    for ax, (name, columns) in zip(axes, panels.items(), strict=True):
        # A quantity has one colour, in training and in evaluation.
        colours: dict[tuple[str, str], str] = {}
        for run, seeds in tables.items():
            for column, label in columns.items():
                colour = _COLOURS[len(colours) % len(_COLOURS)]
                colour = colours.setdefault((run, column.rpartition("/")[2]), colour)
                if points := [p for rows in seeds if len(p := _points(rows, x, column))]:
                    count = f"{len(points)} seeds" if len(points) > 1 else ""
                    label_of_line = ", ".join(part for part in (run, label, count) if part)
                    _draw_mean(ax, points, colour, label_of_line, column.startswith("train/"))
        line = dict(color=_REFERENCE_COLOUR, lw=1.2)
        if reference and name in reference:
            ax.axhline(reference[name], **line, ls="--", label=reference_label)
        for label, place in (marks or {}).items():
            ax.axvline(place, **line, ls=":", label=label)
        ax.set_xlabel("environment steps" if x == "frames" else x)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set_ylabel(name)
        if name.startswith("success"):
            _percent_axis(ax)
        ax.legend(frameon=False, fontsize=8)
    _finish(figure, path, title)


def plot_adaptation_curve(
    results: Results | Mapping[str, Results],
    path: str | Path,
    *,
    measure: Measure = "success",
    reference: Sequence[float] | None = None,
    reference_label: str = "Bayes-optimal",
    title: str | None = None,
) -> None:
    """Draw success (or return) by episode: the adaptation within a trial.

    The band is the 95% percentile-bootstrap interval of the mean, resampling whole trials. Several
    seeds are pooled, with a thin line for each.

    Args:
        results: of one agent, or of its seeds; or either by name for several agents.
        reference: value by episode of a dashed line, such as an exact optimum's.

    Example:
        >>> import torch
        >>> success = torch.rand(200, 5) < torch.tensor([0.5, 0.8, 0.9, 0.95, 0.95])
        >>> results = TrialResults(success.float(), success, success.sum(1), torch.full((200,), 30))
        >>> plot_adaptation_curve({"memory": results}, "adaptation_curve.png")
    """
    from matplotlib.ticker import MaxNLocator

    figure, (ax,) = _figure(1, width=5.2, height=3.6)
    results = results if isinstance(results, Mapping) else {"agent": results}
    agents = {k: [run] if isinstance(run, TrialResults) else run for k, run in results.items()}
    num_episodes = max(run.episode_return.shape[1] for runs in agents.values() for run in runs)
    episodes = range(1, num_episodes + 1)
    marker = "o" if num_episodes <= 20 else None
    for number, (name, runs) in enumerate(agents.items()):
        colour = _COLOURS[number % len(_COLOURS)]
        label = f"{name}, {len(runs)} seeds" if len(runs) > 1 else name
        for run in runs if len(runs) > 1 else ():
            values = run.by_episode(measure).nanmean(0).numpy()
            ax.plot(episodes[: len(values)], values, color=colour, lw=0.8, alpha=0.45)
        pooled = TrialResults.concatenate(runs).by_episode(measure).numpy()
        mean, low, high = bootstrap_mean(pooled)
        ax.fill_between(episodes[: len(mean)], low, high, color=colour, alpha=0.2, lw=0)
        ax.plot(episodes[: len(mean)], mean, color=colour, marker=marker, ms=5, lw=2, label=label)
    if reference is not None:
        line = dict(color=_REFERENCE_COLOUR, ls="--", lw=1.5, marker=marker and "D", ms=3.5)
        ax.plot(range(1, len(reference) + 1), reference, **line, label=reference_label)
    ax.set_xlabel("episode at the same task")
    ax.set_ylabel("success rate" if measure == "success" else "return of the episode")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if measure == "success":
        _percent_axis(ax)
    trials = sum(len(run) for runs in agents.values() for run in runs)
    label = f"95% bootstrap interval, {trials:,} trials"
    colour = _COLOURS[0] if len(agents) == 1 else "#888888"
    ax.fill_between([], [], color=colour, alpha=0.2, lw=0, label=label)
    ax.legend(frameon=False, fontsize=9, loc="lower right" if measure == "success" else "best")
    _finish(figure, path, title)


def plot_trial_strip(
    frames: Sequence[Sequence[np.ndarray]],
    path: str | Path,
    *,
    titles: Sequence[str] | None = None,
    headings: Sequence[str] | None = None,
    title: str | None = None,
    picture_inches: float = 0.85,
) -> None:
    """Draw one trial as a grid of pictures: a row for each episode, a column for each step.

    Args:
        frames: pictures `[H, W, 3]` uint8 of each episode, as `rollout_pictures` returns.
        titles, headings: text beside each episode and over each column; by default numbers.

    Example:
        >>> frames = [[np.full((8, 8, 3), 200, np.uint8)] * steps for steps in (4, 3, 3)]
        >>> plot_trial_strip(frames, "trial.png")
    """
    from matplotlib.figure import Figure

    columns, side = max(map(len, frames)), picture_inches
    titles = titles or [f"episode {number}" for number in range(1, len(frames) + 1)]
    headings = headings or ["start", *(f"step {number}" for number in range(1, columns))]
    left = 0.1 + 0.075 * max(map(len, titles))  # inches for the episodes' titles
    top = 0.55 if title else 0.3  # and for the headings
    width, height = left + columns * side, top + len(frames) * side
    figure = Figure(figsize=(width, height))
    # One plane for all, in inches: axes for each picture would take five times as long.
    ax = figure.add_axes((0, 0, 1, 1), xlim=(0, width), ylim=(height, 0))
    ax.set_axis_off()
    middles = [left + (column + 0.5) * side for column in range(columns)]
    for x, heading in zip(middles, headings, strict=True):
        ax.text(x, top - 0.05, heading, fontsize=7, ha="center", va="bottom")
    for row, (episode, label) in enumerate(zip(frames, titles, strict=True)):
        y = top + (row + 0.5) * side
        ax.text(left - 0.06, y, label, fontsize=8, ha="right", va="center")
        for x, picture in zip(middles, episode, strict=False):
            scale = 0.47 * side / max(picture.shape[:2])  # a little space between pictures
            h, w = (scale * pixels for pixels in picture.shape[:2])
            ax.imshow(picture, extent=(x - w, x + w, y + h, y - h), interpolation="nearest")
    _finish(figure, path, title, y=0.98, va="top")


def _read_seeds(run: Table | Sequence[Table]) -> list[list[dict[str, float]]]:
    """Read the tables of one or several seeds; entries that are no finite number are left out."""
    run = read_rows(run) if isinstance(run, str | Path) else run
    if run and not isinstance(run[0], Mapping):
        return [table for seed in run for table in _read_seeds(seed)]
    return [[{k: float(v) for k, v in row.items() if _is_number(v)} for row in run]]


def _is_number(value: Any) -> bool:
    try:
        return bool(np.isfinite(float(value)))
    except (TypeError, ValueError):
        return False


def _points(rows: list[dict[str, float]], x: str, column: str) -> np.ndarray:
    return np.array([[row[x], row[column]] for row in rows if x in row and column in row])


def _draw_mean(ax: Axes, seeds: list[np.ndarray], colour: str, label: str, thin: bool) -> None:
    """Draw points `[N, 2]` of one seed, or the mean of several with its interval."""
    x, mean = seeds[0].T
    if len(seeds) > 1:
        first, last = max(points[0, 0] for points in seeds), min(p[-1, 0] for p in seeds)
        x = x[(first <= x) & (x <= last)]
        mean, low, high = bootstrap_mean(np.stack([np.interp(x, *points.T) for points in seeds]))
        ax.fill_between(x, low, high, color=colour, alpha=0.1 if thin else 0.2, lw=0)
    style = dict(lw=0.9, alpha=0.6) if thin else dict(lw=1.8, marker="o" if len(x) <= 40 else None)
    ax.plot(x, mean, color=colour, label=label, ms=3.5, **style)


def _percent_axis(ax: Axes) -> None:
    ax.set_ylim(-0.02, 1.02)
    ax.yaxis.set_major_formatter(lambda fraction, _: f"{fraction:.0%}")


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.grid(color="#dddddd", lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _finish(figure: Figure, path: str | Path, title: str | None, **title_options: Any) -> None:
    if title:
        figure.suptitle(title, fontsize=11, **title_options)
    figure.savefig(path, dpi=_DPI)
