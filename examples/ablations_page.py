"""Scores of finished ablation runs, the page with their table, and its picture."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ablations_variants import VARIANTS

from torchrl_amago.envs import bayes_optimal_success
from torchrl_amago.evaluation import Interval, TrialResults, interquartile_mean
from torchrl_amago.trainers import read_progress

RESAMPLES = 2000

PAGE = """# Ablations

Worth of single choices on Meta-FrozenLake (3x3, five episodes at a lake) in short training. Every
variant changes one thing in the baseline, `examples/00_meta_frozen_lake.py` with {settings} and
{updates:,} updates. This page is written by

```bash
{command}
```

- Return per trial, of 5: interquartile mean over seeds (of three seeds or fewer, their mean) of the
  mean over greedy trials on held-out seeds. The 95% bootstrap interval draws seeds anew, and the
  trials of each. A run's `evaluation.npz` has all trials.
- First and last episode: fraction of trials whose first and last episode reached the goal.
- Seconds: training without evaluations and checkpoints. Other work on the same cores shows in them.
- The exact optimum, of an agent that knows how lakes are drawn, is {optimum:.3f}.

Nothing was tuned for any variant. Few seeds show large differences only: overlapping intervals
leave an order open. A short run shows how fast agents learn, not where they end. Exploration fades
over the same fraction of a run as in the example.

{table}

![Return per trial by variant](figures/ablations.png)
"""


class Score(NamedTuple):
    """Results of the runs of one variant; `by_seed` are mean returns per trial."""

    by_seed: np.ndarray
    trial_return: Interval
    success_first: float
    success_last: float
    seconds: float


def is_finished(folder: Path, updates: int) -> bool:
    """Return whether a folder holds a result; raise if it has another number of updates."""
    if not (folder / "evaluation.npz").exists():
        return False
    made = int(read_progress(folder)["update"][-1])
    if made != updates:
        raise ValueError(
            f"all runs must have the same --updates, got {updates}, and {folder} has a result "
            f"after {made}. Give --updates {made}, another --run-dir, or delete that folder."
        )
    return True


def read_scores(args: Any) -> dict[str, Score]:
    scores = {}
    for variant in args.variants:
        folders = [args.folder(variant, seed) for seed in args.seeds]
        finished = [folder for folder in folders if is_finished(folder, args.updates)]
        if finished:
            scores[variant] = score(finished)
    if not scores:
        raise ValueError(
            f"a page needs at least one finished run, and {args.run_dir} has none of "
            f"({', '.join(args.variants)}). Leave out --plot-only to train them."
        )
    return scores


def score(folders: list[Path]) -> Score:
    results = [TrialResults.load(folder / "evaluation.npz") for folder in folders]
    summaries = [result.summary() for result in results]
    returns = [result.trial_return.numpy() for result in results]
    return Score(
        np.array([values.mean() for values in returns]),
        bootstrap_seeds_and_trials(returns),
        *(np.mean([s[key] for s in summaries]) for key in ("success_first", "success_last")),
        np.mean([read_progress(folder)["seconds_training"][-1] for folder in folders]),
    )


def bootstrap_seeds_and_trials(returns: list[np.ndarray], confidence: float = 0.95) -> Interval:
    """Interquartile mean over seeds of their mean return: seeds are drawn, then trials of each."""
    generator = np.random.default_rng(0)

    def draw() -> np.ndarray:
        seeds = generator.integers(len(returns), size=len(returns))
        return np.array([generator.choice(returns[s], len(returns[s])).mean() for s in seeds])

    means = interquartile_mean(np.stack([draw() for _ in range(RESAMPLES)]), axis=1)
    tail = 50 * (1 - confidence)
    point = interquartile_mean(np.array([values.mean() for values in returns]))
    return Interval(point, *np.percentile(means, [tail, 100 - tail]))


def write_page(args: Any, scores: dict[str, Score]) -> None:
    optimum = bayes_optimal_success(3, 5).expected_return
    picture = args.run_dir / "figures" / "ablations.png"
    picture.parent.mkdir(exist_ok=True)
    plot_scores(scores, picture, optimum)
    page = args.run_dir / "ablations.md"
    table = make_table(scores)
    page.write_text(
        PAGE.format(
            settings="the small networks of `--debug`" if args.debug else "its defaults",
            updates=args.updates,
            command=command_of(args),
            optimum=optimum,
            table=table,
        ),
        encoding="utf-8",
    )
    print(f"{table}\n\nPage: {page}, picture: {picture}")


def command_of(args: Any) -> str:
    words = [".venv/bin/python", "examples/ablations.py", *["--debug"] * args.debug]
    if args.variants != tuple(VARIANTS):
        words += ["--variants", *args.variants]
    words += ["--seeds", *map(str, args.seeds)]
    return shlex.join([*words, "--updates", str(args.updates), "--threads", str(args.threads)])


def make_table(scores: dict[str, Score]) -> str:
    lines = [
        "| variant | change | seeds | return per trial | first episode | last episode | seconds |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in scores.items():
        point, low, high = row.trial_return
        cells = [
            f"`{name}`",
            VARIANTS[name].change,
            str(len(row.by_seed)),
            f"{point:.3f} [{low:.3f}, {high:.3f}]",
            f"{row.success_first:.3f}",
            f"{row.success_last:.3f}",
            f"{row.seconds:.0f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def plot_scores(scores: dict[str, Score], path: Path, optimum: float) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 1.3 + 0.34 * len(scores)), layout="constrained")
    ax = figure.subplots()
    for height, row in enumerate(scores.values()):
        point, low, high = row.trial_return
        ax.plot([low, high], [height, height], color="#0072B2", lw=5, alpha=0.35)
        ax.plot(row.by_seed, [height] * len(row.by_seed), "|", color="#444444", ms=8)
        ax.plot(point, height, "o", color="#0072B2", ms=6)
    if "baseline" in scores:
        point = scores["baseline"].trial_return.point
        ax.axvline(point, color="#D55E00", ls="--", lw=1.2, zorder=0, label="baseline")
    ax.axvline(optimum, color="#444444", ls=":", lw=1.2, zorder=0, label="exact optimum")
    ax.set_yticks(range(len(scores)), scores)
    ax.invert_yaxis()
    ax.set_xlabel("return per trial: interquartile mean, 95% interval, each seed")
    ax.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside upper center", ncols=2, frameon=False, fontsize=9)
    figure.savefig(path, dpi=160)
