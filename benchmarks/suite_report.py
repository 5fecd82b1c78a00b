"""The suite's page: tables and figures, from the folders of its cells alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from suite_figures import Styles, draw_curves, draw_intervals, draw_profiles, make_styles
from suite_runs import (
    Axis,
    Run,
    common_place,
    grouped,
    normalized_scores,
    read_runs,
    scores_at,
)
from suite_statistics import (
    performance_profile,
    probability_of_improvement,
    stratified_bootstrap,
)
from suite_table import TASKS

from torchrl_amago.evaluation import Interval, interquartile_mean

FIGURES = "figures/suite"
WORDS: dict[Axis, str] = {"time": "equal time", "frames": "equal steps"}

PAGE = """# The suite

{cells} finished cells of {begun} that have begun; {tasks} tasks, {methods} methods. This page is
written by `python benchmarks/suite.py report`, from the folders of the runs alone.

- A score is the mean return of greedy trials on held-out seeds, evaluated during training.
- Brackets are 95% intervals of the interquartile mean: the stratified bootstrap of rliable, which
  draws runs of each task anew. Of three runs the interquartile mean is the mean.
- Equal time: at the time limit, in training on one core without evaluations and checkpoints. Equal
  steps: at the number of steps that every run of the task has made. Curves are linear between
  evaluations and begin at chance. A run that ends before keeps its last score.
- Last policy: that of the best evaluation, on trials of other seeds.
- Learned: median over seeds of the time and the steps to the first evaluation at the threshold, and
  the seeds that came to it.

{overview}
"""


def write_report(
    root: Path,
    page: Path,
    tasks: Sequence[str],
    methods: Sequence[str],
    baseline: str | None = None,
) -> None:
    """Write a page of the cells in a folder, and its figures into `figures/suite` beside it.

    Raises:
        ValueError: if no cell has finished, or the baseline isn't among the methods.
    """
    runs = read_runs(root, tasks, methods)
    titles = {run.method: run.title for run in runs}
    if baseline is not None and baseline not in titles:
        raise ValueError(f"baseline must be one of {', '.join(titles)}, got {baseline!r}.")
    folder, by_task = page.parent, grouped(runs, lambda run: run.task)
    folder.mkdir(parents=True, exist_ok=True)
    styles = make_styles(list(titles.values()))
    overview = describe_all(folder, by_task, titles, baseline or next(iter(titles)), styles)
    text = PAGE.format(
        cells=len(runs),
        begun=len(list(root.glob("*/*/*/cell.json"))),
        tasks=len(by_task),
        methods=len(titles),
        overview="\n".join(overview),
    )
    for task_runs in by_task.values():
        text += "\n".join(describe_task(folder, task_runs, styles))
    page.write_text(text, encoding="utf-8")


def describe_all(
    folder: Path,
    by_task: dict[str, list[Run]],
    titles: dict[str, str],
    baseline: str,
    styles: Styles,
) -> Iterator[str]:
    """Yield the lines on all tasks together, and draw their figures."""
    yield "## All tasks\n"
    played = {m: [t for t, rs in by_task.items() if m in {r.method for r in rs}] for m in titles}
    many = {m: titles[m] for m in titles if 2 * len(played[m]) >= len(by_task)}
    common = {t: runs for t, runs in by_task.items() if all(t in played[m] for m in many)}
    if left_out := [titles[method] for method in titles if method not in many]:
        yield f"Played fewer than half of the tasks: {', '.join(left_out)}.\n"
    if common:
        yield from describe_aggregates(folder, common, many, styles)
    for axis, words in WORDS.items():
        yield f"### Every task at {words}\n"
        yield "Interquartile means, the highest one in bold.\n"
        rows = [every_method(runs, titles, axis) for runs in by_task.values()]
        yield from table(["task", *titles.values()], rows)
    if len(titles) > 1:
        yield f"### Beside {titles[baseline]}\n"
        yield from compare(by_task, titles, baseline)


def describe_aggregates(
    folder: Path, by_task: dict[str, list[Run]], titles: dict[str, str], styles: Styles
) -> Iterator[str]:
    """Yield the lines on normalised scores over tasks, and draw their figures."""
    yield "Scores are normalised (chance is 0, a reference is 1) on the tasks that all of these"
    yield f"methods have played ({len(by_task)}).\n"
    cells, pictures = {title: [title] for title in titles.values()}, []
    for axis, words in WORDS.items():
        scores = {titles[m]: normalized_scores(by_task, m, axis) for m in titles}
        intervals = {title: stratified_bootstrap(by) for title, by in scores.items()}
        for title, interval in intervals.items():
            cells[title].append(show(interval, 2))
        highest = max(1.0, *(score.max() for by in scores.values() for score in by.values()))
        thresholds = np.linspace(0, highest, 101)
        profiles = {title: performance_profile(by, thresholds) for title, by in scores.items()}
        all_, profile = f"{FIGURES}/all_{axis}.png", f"{FIGURES}/profile_{axis}.png"
        draw_intervals(folder / all_, intervals, styles, f"All tasks, {words}")
        draw_profiles(folder / profile, thresholds, profiles, styles, f"Runs, {words}")
        pictures += [
            f"![Scores at {words}]({all_})",
            f"![Fraction of runs above a score at {words}]({profile})\n",
        ]
    yield from table(["method", *WORDS.values()], list(cells.values()))
    yield from pictures


def every_method(runs: list[Run], titles: dict[str, str], axis: Axis) -> list[str]:
    """Return a task's row with the interquartile mean of every method."""
    place, digits = common_place(runs, axis), digits_of(runs[0].task)
    own = grouped(runs, lambda run: run.method)
    means = {m: float(interquartile_mean(scores_at(own[m], axis, place))) for m in own}
    shown = {m: f"{mean:.{digits}f}" for m, mean in means.items()}
    best = shown[max(means, key=means.get)]
    cells = [shown.get(method, "") for method in titles]
    return [TASKS[runs[0].task].title, *(f"**{c}**" if c == best else c for c in cells)]


def compare(by_task: dict[str, list[Run]], titles: dict[str, str], baseline: str) -> Iterator[str]:
    """Yield the table of each method beside the baseline."""
    rows = []
    for method in titles:
        if method != baseline:
            pairs = [
                [normalized_scores(by_task, name, axis) for name in (method, baseline)]
                for axis in WORDS
            ]
            rows.append([titles[method], *(cell for pair in pairs for cell in compare_pair(*pair))])
    yield "On the tasks that both have played. Chance: that a run scores higher than one of the"
    yield "baseline. Tasks: how many have a higher, an equal and a lower interquartile mean.\n"
    columns = [f"{what}, {words}" for words in WORDS.values() for what in ("chance", "tasks")]
    yield from table(["method", *columns], rows)


def compare_pair(scores: dict[str, np.ndarray], others: dict[str, np.ndarray]) -> list[str]:
    """Return the probability of improvement, and the numbers of tasks won, drawn and lost."""
    both = [task for task in scores if task in others]
    if not both:
        return ["-", "-"]
    chance = probability_of_improvement(*({t: of[t] for t in both} for of in (scores, others)))
    means = [np.array([interquartile_mean(of[t]) for t in both]) for of in (scores, others)]
    signs = np.sign(np.subtract(*means))
    return [show(chance, 2), ", ".join(str((signs == sign).sum()) for sign in (1, 0, -1))]


def describe_task(folder: Path, runs: list[Run], styles: Styles) -> Iterator[str]:
    """Yield the lines on one task, and draw its figures."""
    name, task = runs[0].task, TASKS[runs[0].task]
    minutes, steps = common_place(runs, "time") / 60, common_place(runs, "frames")
    yield f"\n## {task.title}\n"
    yield (
        f"Chance {task.chance:g}, reference {task.reference:g}, learned from {task.threshold:g}. "
        f"Equal time: {minutes:g} minutes; equal steps: {steps:,.0f}.\n"
    )
    rows = [describe_method(own, runs) for own in grouped(runs, lambda run: run.method).values()]
    columns = ["method", "seeds", "equal time", "equal steps", "last policy", "learned", "steps"]
    yield from table(columns, rows)
    if any(len(run.score) for run in runs):
        shown = [run for run in runs if len(run.score)]
        for axis in WORDS:
            draw_curves(folder / f"{FIGURES}/{name}_{axis}.png", shown, axis, styles)
            over = {"time": "time", "frames": "steps"}[axis]
            yield f"![{task.title}: return over {over}]({FIGURES}/{name}_{axis}.png)"
    yield "\n```bash"
    yield from (run.command for run in runs)
    yield "```\n"


def describe_method(own: list[Run], runs: list[Run]) -> list[str]:
    """Return a task's row of one method."""
    digits = digits_of(own[0].task)
    row = [own[0].title, str(len(own))]
    for axis in ("time", "frames"):
        scores = scores_at(own, axis, common_place(runs, axis))
        row.append(show(stratified_bootstrap(scores), digits))
    last = np.array([run.last for run in own])
    known = last[~np.isnan(last)]
    row.append(show(stratified_bootstrap(known), digits) if len(known) else "-")
    return row + [show_first(own, axis) for axis in ("time", "frames")]


def show_first(runs: list[Run], axis: Axis) -> str:
    """Return the median place at which runs came to the threshold, and how many did."""
    places = np.array([run.first_above(axis, TASKS[run.task].threshold) for run in runs])
    median, reached = np.median(places), f"{np.isfinite(places).sum()} of {len(places)}"
    if not np.isfinite(median):
        return f"never ({reached})"
    return f"{median:,.0f}{' s' if axis == 'time' else ''} ({reached})"


def digits_of(task: str) -> int:
    """Return the number of decimals that a task's scores are shown with."""
    span = TASKS[task].reference - TASKS[task].chance
    return max(0, 3 - len(str(int(span))))


def show(interval: Interval, digits: int) -> str:
    point, low, high = (f"{value:.{digits}f}" for value in interval)
    return f"{point} [{low}, {high}]"


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Yield the lines of a table, and an empty one."""
    for row in (columns, ["---"] * len(columns), *rows):
        yield f"| {' | '.join(row)} |"
    yield ""
