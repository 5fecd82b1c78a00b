"""Figures: learning curve, adaptation curve, picture strip of a trial.

Drawn on matplotlib's own figure and Agg canvas, never through pyplot: no global state, no display.
matplotlib is imported when something is drawn, so that importing the package stays quick.
"""

from __future__ import annotations

import csv
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from torchrl_amago.evaluation.evaluate import Measure, TrialResults
from torchrl_amago.evaluation.statistics import bootstrap_mean

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette: told apart in every kind of colour blindness, and in print.
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_REFERENCE_COLOUR = "#444444"
_DPI = 160

Rows = Sequence[Mapping[str, Any]]


def plot_learning_curve(
    rows: Rows | str | Path | Mapping[str, Rows | str | Path],
    path: str | Path,
    *,
    x: str = "frames",
    panels: Mapping[str, Mapping[str, str]] | None = None,
    reference: Mapping[str, float] | None = None,
    reference_label: str = "optimal",
    marks: Mapping[str, float] | None = None,
    title: str | None = None,
) -> None:
    """Draw what a run logged, over the steps it took.

    Args:
        rows: the table as rows of column -> number (missing or empty entries are skipped), or the
            CSV file with it; or several runs by name, which then share the panels.
        path: PNG (or PDF, SVG) to write.
        x: column on the horizontal axis.
        panels: panel title -> {column: label}. By default return per trial, and success at the
            first and last episode, in training (thin) and evaluation, as far as they are logged.
        reference: panel title -> height of a dashed line, such as the optimum.
        reference_label: what that is.
        marks: label -> place on the horizontal axis of a dotted line in every panel, such as a switch.
        title: of the figure.

    Raises:
        ValueError: where no column of the panels was logged.

    Example:
        >>> import tempfile
        >>> rows = [{"frames": 64 * t, "eval/trial_return": t / 10} for t in range(40)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_learning_curve(rows, f"{folder}/learning_curve.png")
    """
    runs = rows if isinstance(rows, Mapping) else {"": rows}
    tables = {name: _read_rows(run) for name, run in runs.items()}
    panels = panels or _DEFAULT_PANELS
    logged = {key for table in tables.values() for row in table for key in row}
    panels = {name: columns for name, columns in panels.items() if logged & columns.keys()}
    if not panels or x not in logged:
        raise ValueError(
            f"The learning curve needs column {x!r} and a column to draw over it, got "
            f"{sorted(logged)}. Name yours with x= and panels=."
        )
    from matplotlib.ticker import EngFormatter

    figure, axes = _figure(len(panels), width=4.6, height=3.3)
    for ax, (name, columns) in zip(axes, panels.items(), strict=True):
        # What is logged in training and in evaluation is one thing, so it has one colour.
        things = list(
            dict.fromkeys((run, key.rpartition("/")[2]) for run in tables for key in columns)
        )
        for run, table in tables.items():
            for column, label in columns.items():
                points = np.array(
                    [[row[x], row[column]] for row in table if x in row and column in row]
                )
                if points.size:
                    name_of_line = ", ".join(part for part in (run, label) if part)
                    thing = things.index((run, column.rpartition("/")[2]))
                    colour = _COLOURS[thing % len(_COLOURS)]
                    thin = column.startswith("train/")
                    _draw_run(ax, points, colour, name_of_line, thin=thin)
        if reference and name in reference:
            ax.axhline(
                reference[name], color=_REFERENCE_COLOUR, ls="--", lw=1.2, label=reference_label
            )
        for label, place in (marks or {}).items():
            ax.axvline(place, color=_REFERENCE_COLOUR, ls=":", lw=1.2, label=label)
        ax.set_xlabel("environment steps" if x == "frames" else x)
        ax.xaxis.set_major_formatter(EngFormatter(sep=""))
        ax.set_ylabel(name)
        if name.startswith("success"):
            _percent_axis(ax)
        ax.legend(frameon=False, fontsize=8)
    _finish(figure, path, title)


def plot_adaptation_curve(
    results: TrialResults | Sequence[TrialResults] | Mapping[str, TrialResults],
    path: str | Path,
    *,
    measure: Measure = "success",
    pooled: bool = True,
    reference: Sequence[float] | None = None,
    reference_label: str = "Bayes-optimal",
    label: str = "agent",
    confidence: float = 0.95,
    seed: int = 0,
    title: str | None = None,
) -> None:
    """Draw success (or return) by episode: whether the agent adapts within a trial, and how fast.

    The band is the percentile-bootstrap interval of the mean, resampling whole trials.

    Args:
        results: of one agent; a sequence, of one agent trained with several seeds; or several
            agents by name.
        path: PNG (or PDF, SVG) to write.
        measure: `"success"` or `"return"`.
        pooled: whether seeds become one line with thin ones for each, or a line with a band each.
        reference: value by episode to draw beside it, such as an exact optimum's.
        reference_label: what that is.
        label: what the agent is called in the legend.
        confidence: probability mass of the band.
        seed: of the resampling.
        title: of the figure.

    Example:
        >>> import tempfile, torch
        >>> success = torch.rand(200, 5) < torch.tensor([0.5, 0.8, 0.9, 0.95, 0.95])
        >>> results = TrialResults(
        ...     success.float(), success, success.sum(1).float(), torch.full((200,), 30)
        ... )
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_adaptation_curve(results, f"{folder}/adaptation_curve.png")
    """
    from matplotlib.ticker import MaxNLocator

    lines, thin = _lines_of(results, pooled, label)
    figure, (ax,) = _figure(1, width=5.2, height=3.6)
    colours = _COLOURS * (1 + len(lines) // len(_COLOURS))
    most = max(line.episode_return.shape[1] for line in lines.values())
    marker = "o" if most <= 20 else None
    for number, single in enumerate(thin):
        values = single.by_episode(measure).nanmean(0).numpy()
        ax.plot(
            _episodes(values), values, color=colours[0], lw=0.8, alpha=0.45,
            label=None if number else "each seed",
        )  # fmt: skip
    for (name, line), colour in zip(lines.items(), colours, strict=False):
        mean, low, high = bootstrap_mean(
            line.by_episode(measure).numpy(), confidence=confidence, seed=seed
        )
        episodes = _episodes(mean)
        ax.fill_between(episodes, low, high, color=colour, alpha=0.2, lw=0)
        ax.plot(episodes, mean, color=colour, marker=marker, ms=5, lw=2, label=name)
    if reference is not None:
        ax.plot(
            _episodes(reference), reference, color=_REFERENCE_COLOUR, ls="--", lw=1.5,
            marker=marker and "D", ms=3.5, label=reference_label,
        )  # fmt: skip
    ax.set_xlabel("episode at the same task")
    ax.set_ylabel("success rate" if measure == "success" else "return of the episode")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    if measure == "success":
        _percent_axis(ax)
    trials = sum(len(line) for line in lines.values())
    band = f"{confidence:.0%} bootstrap interval, {trials:,} trials"
    ax.fill_between(
        [], [], color=colours[0] if len(lines) == 1 else "#888888", alpha=0.2, lw=0, label=band
    )
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
        frames: pictures `[H, W, 3]` uint8 of each episode, as `rollout_pictures` gives.
        path: PNG (or PDF, SVG) to write.
        titles: what to write beside each episode; its number by default.
        headings: what to write over each column; the step's number by default.
        title: of the figure.
        picture_inches: side of a picture.

    Example:
        >>> import tempfile
        >>> frames = [[np.full((8, 8, 3), 200, np.uint8)] * steps for steps in (4, 3, 3)]
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     plot_trial_strip(frames, f"{folder}/trial.png")
    """
    if not frames or not all(len(episode) for episode in frames):
        raise ValueError(
            "A trial strip needs at least one episode, and one picture in each, got "
            f"{[len(episode) for episode in frames]} pictures. Use rollout_pictures."
        )
    titles = titles or [f"episode {number}" for number in range(1, len(frames) + 1)]
    if len(titles) != len(frames):
        raise ValueError(
            f"titles must name each of the {len(frames)} episodes, got {len(titles)} of them. "
            "Leave it out to number them."
        )
    columns = max(map(len, frames))
    headings = headings or ["start", *(f"step {number}" for number in range(1, columns))]
    if len(headings) != columns:
        raise ValueError(
            f"headings must name each of the {columns} columns, got {len(headings)} of them. "
            "Leave it out to number them."
        )
    figure, place = _picture_grid(
        rows=len(frames),
        headings=headings,
        side=picture_inches,
        left=0.1 + 0.075 * max(map(len, titles)),  # room for the episodes' titles
        top=0.55 if title else 0.3,  # room for the headings
    )
    for row, episode in enumerate(frames):
        for column, picture in enumerate(episode):
            ax = figure.add_axes(place(row, column))
            ax.imshow(picture, interpolation="nearest")
            ax.set(xticks=[], yticks=[])
            ax.spines[:].set_visible(False)
            if column == 0:
                ax.set_ylabel(
                    titles[row], rotation=0, ha="right", va="center", fontsize=8, labelpad=6
                )
    _finish(figure, path, title, y=0.98, va="top")


_DEFAULT_PANELS = {
    "return per trial": {"train/trial_return": "training", "eval/trial_return": "evaluation"},
    "success rate": {
        "train/success_last": "last episode, training",
        "eval/success_last": "last episode, evaluation",
        "train/success_first": "first episode, training",
        "eval/success_first": "first episode, evaluation",
    },
}


def _read_rows(rows: Rows | str | Path) -> list[dict[str, float]]:
    """Rows of numbers; entries that are no finite number are left out."""
    if isinstance(rows, str | Path):
        with Path(rows).open(newline="") as file:
            rows = list(csv.DictReader(file))
    return [
        {key: number for key, value in row.items() if np.isfinite(number := _number(value))}
        for row in rows
    ]


def _number(value: Any) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        return float("nan")


def _lines_of(
    results: TrialResults | Sequence[TrialResults] | Mapping[str, TrialResults],
    pooled: bool,
    label: str,
) -> tuple[dict[str, TrialResults], Sequence[TrialResults]]:
    """Lines with a band, by label, and lines without one."""
    if isinstance(results, TrialResults):
        return {label: results}, ()
    if isinstance(results, Mapping):
        return dict(results), ()
    if pooled:
        return {f"{label}, {len(results)} seeds": TrialResults.concatenate(results)}, results
    return {f"{label}, seed {number}": single for number, single in enumerate(results, 1)}, ()


def _episodes(values: Sequence[float]) -> np.ndarray:
    return np.arange(1, len(values) + 1)


def _draw_run(ax: Axes, points: np.ndarray, colour: str, label: str, thin: bool) -> None:
    ax.plot(
        points[:, 0], points[:, 1], color=colour, label=label,
        lw=0.9 if thin else 1.8, alpha=0.6 if thin else 1.0,
        marker=None if thin or len(points) > 40 else "o", ms=3.5,
    )  # fmt: skip


def _percent_axis(ax: Axes) -> None:
    from matplotlib.ticker import PercentFormatter

    ax.set_ylim(-0.02, 1.02)
    ax.yaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))


def _figure(panels: int, width: float, height: float) -> tuple[Figure, list[Axes]]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width * panels, height), layout="constrained")
    axes = list(figure.subplots(1, panels, squeeze=False)[0])
    for ax in axes:
        ax.grid(color="#dddddd", lw=0.6)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _picture_grid(
    rows: int, headings: Sequence[str], side: float, left: float, top: float
) -> tuple[Figure, Callable[[int, int], tuple[float, float, float, float]]]:
    """A figure with headings over its columns, and where its pictures go (inches are given)."""
    from matplotlib.figure import Figure

    width, height = left + len(headings) * side, top + rows * side
    figure = Figure(figsize=(width, height))
    picture = 0.94 * side  # the rest is the gap between pictures

    def place(row: int, column: int) -> tuple[float, float, float, float]:
        x, y = left + column * side, height - top - (row + 1) * side
        return (x / width, y / height, picture / width, picture / height)

    for column, heading in enumerate(headings):
        x = left + column * side + picture / 2
        figure.text(x / width, 1 - (top - 0.08) / height, heading, fontsize=7, ha="center")
    return figure, place


def _finish(figure: Figure, path: str | Path, title: str | None, **title_options: Any) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    if title:
        figure.suptitle(title, fontsize=11, **title_options)
    FigureCanvasAgg(figure).print_figure(path, dpi=_DPI)
