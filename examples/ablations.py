"""What single choices of AMAGO are worth: short runs of `00_meta_frozen_lake.py`, a table, a picture.

    python examples/ablations.py                      # 10 variants, 3 seeds, about 2 minutes each
    python examples/ablations.py --variants baseline memory_free --seeds 1 2
    python examples/ablations.py --debug              # networks and runs of seconds
    python examples/ablations.py --plot-only          # table and picture of what is there

Every run is a process of its own and writes about 50 MB into `VARIANT/SEED` in the run's folder. The
same command again goes on after Ctrl-C: finished runs are skipped, an interrupted one resumes from its
checkpoint. In the end the page `ablations.md` and its picture `figures/ablations.png` lie in the run's
folder.
"""

from __future__ import annotations

import dataclasses
import importlib
import multiprocessing
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from common import DEBUG

from torchrl_amago import HLGauss, PopArt, TwoHot
from torchrl_amago.envs import bayes_optimal_success
from torchrl_amago.evaluation import EvaluationResults, Interval, TrialResults, interquartile_mean
from torchrl_amago.modules import DISCOUNTS
from torchrl_amago.trainers import read_progress

# A module whose name begins with a digit can't be imported by a statement.
lake = importlib.import_module("00_meta_frozen_lake")

# A trial returns 0 to 5, times the loss's reward_scale of 10. Critics first predict the middle of the range,
# which therefore is 0: agents that begin with great expectations stand still for thousands of updates.
# Of the published 128 bins, one run would take as long as all others: they are outputs for every action.
RETURNS = dict(num_bins=16, min_return=-55.0, max_return=55.0, symlog=False)
RESAMPLES = 2000


@dataclass(frozen=True)
class Variant:
    """One change to the baseline."""

    change: str
    """What the table says of it."""
    args: dict[str, Any] = field(default_factory=dict)
    """Fields of the example's command line."""
    policy: dict[str, Any] = field(default_factory=dict)
    """Arguments of `make_policy`."""
    loss: Callable[[], dict[str, Any]] = dict
    """Makes arguments of the loss; anew for each run, since codecs hold statistics."""


def codec(make: Callable[..., Any], **options: Any) -> Callable[[], dict[str, Any]]:
    return lambda: dict(value_codec=make(len(DISCOUNTS), **options))


VARIANTS = {
    "baseline": Variant(
        "nothing (seven discounts, PopArt, online and offline terms, one-step targets, Transformer)"
    ),
    "discounts_1": Variant("one discount, 0.999", policy=dict(discounts=(0.999,))),
    "discounts_3": Variant("discounts 0.9, 0.99, 0.999", policy=dict(discounts=(0.9, 0.99, 0.999))),
    "no_popart": Variant(
        "values aren't normalised: regression on returns", loss=codec(PopArt, enabled=False)
    ),
    "online_only": Variant(
        "policy gradient alone, no imitation", loss=lambda: dict(offline_coeff=0.0)
    ),
    "offline_only": Variant(
        "filtered imitation alone; TD targets average two critics, as the loss does then",
        loss=lambda: dict(online_coeff=0.0, offline_coeff=1.0),
    ),
    "two_hot": Variant("two-hot classification of values, 16 bins", loss=codec(TwoHot, **RETURNS)),
    "hl_gauss": Variant(
        "HL-Gauss classification of values, 16 bins", loss=codec(HLGauss, **RETURNS)
    ),
    "n_step_3": Variant("three-step targets", loss=lambda: dict(n_step=3)),
    "memory_free": Variant(
        "no memory: a feed-forward network instead of the Transformer",
        args=dict(seq_model="feedforward"),
    ),
}


@dataclass
class Args:
    """Settings of the whole set of runs."""

    run_dir: Path = Path("runs/ablations")
    """Folder for the runs, the page and the picture."""
    variants: tuple[Literal[tuple(VARIANTS)], ...] = tuple(VARIANTS)
    """Which to run and to show; the list above says what each changes."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of each variant."""
    updates: int = 1000
    """Optimiser steps of a run: about 2 minutes on two CPU cores."""
    threads: int = 2
    """CPU threads of a run."""
    debug: bool = False
    """Small networks, 40 updates and one seed, to see that everything works; in a folder of its own."""
    plot_only: bool = False
    """Train nothing: page and picture of the runs that have finished."""

    def folder(self, variant: str, seed: int) -> Path:
        return self.run_dir / variant / str(seed)


class LakeArgs(lake.Args):
    """The example's settings; this script resumes by itself, so its own command is the one to show."""

    def resume_command(self) -> str:
        return shlex.join([sys.executable, *sys.argv])


def train(args: Args, variant: str, seed: int) -> EvaluationResults:
    folder = args.folder(variant, seed)
    settings = dict(
        run_dir=folder,
        seed=seed,
        threads=args.threads,
        total_updates=args.updates,
        # The same fraction of the run as in the example: exploration is to be over at the end.
        anneal_frames=lake.Args.anneal_frames * args.updates // lake.Args.total_updates,
        resume=True,
    )
    changed = VARIANTS[variant]
    debug = DEBUG if args.debug else {}
    return lake.train(
        LakeArgs(**{**debug, **settings, **changed.args}),
        policy_options=changed.policy,
        loss_options=changed.loss(),
    )


def train_process(args: Args, variant: str, seed: int) -> None:
    torch.set_num_threads(args.threads)
    train(args, variant, seed)  # leaves with 130 after Ctrl-C


def is_finished(folder: Path, updates: int) -> bool:
    """Whether the folder holds a result; ValueError if it is one of another number of updates."""
    if not (folder / "evaluation.npz").exists():
        return False
    made = int(read_progress(folder)["update"][-1])
    if made != updates:
        raise ValueError(
            f"all runs must have the same --updates, got {updates}, and {folder} has a result after "
            f"{made}. Give --updates {made}, another --run-dir, or delete that folder."
        )
    return True


def train_missing(args: Args) -> list[str]:
    """Train what has no result yet; returns the folders of runs that ended without one."""
    failed = []
    # Seed by seed: whoever stops early has all variants to compare.
    for seed in args.seeds:
        for variant in args.variants:
            folder = args.folder(variant, seed)
            if is_finished(folder, args.updates):
                print(f"{folder}: has finished before, skipped")
                continue
            print(f"{folder}: training", flush=True)
            # Spawned, not forked: no run sees what another left in the process.
            process = multiprocessing.get_context("spawn").Process(
                target=train_process, args=(args, variant, seed)
            )
            process.start()
            try:
                process.join()
            except KeyboardInterrupt:
                process.join()  # it got the signal too, and ends by itself
                sys.exit(130)
            if process.exitcode:
                failed.append(str(folder))
    return failed


class Score(NamedTuple):
    """What the runs of one variant reached; `by_seed` are mean returns per trial."""

    by_seed: np.ndarray
    trial_return: Interval
    success_first: float
    success_last: float
    seconds: float


def read_scores(args: Args) -> dict[str, Score]:
    scores = {}
    for variant in args.variants:
        folders = [args.folder(variant, seed) for seed in args.seeds]
        finished = [folder for folder in folders if is_finished(folder, args.updates)]
        if finished:
            scores[variant] = score(finished)
    if not scores:
        raise ValueError(
            f"a page needs at least one finished run, and {args.run_dir} has none of those asked for "
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


PAGE = """# Ablations

What single choices are worth on Meta-FrozenLake (3x3, five episodes at a lake) when training is short. Every variant
changes one thing in the baseline, `examples/00_meta_frozen_lake.py` with {settings} and {updates:,} updates. This
page is written by

```bash
{command}
```

- Return per trial, of 5: a seed's is the mean over its greedy trials on held-out seeds after training (a trial is five
  episodes at one lake; a run's `evaluation.npz` has them all). The figure is the interquartile mean over seeds (of three
  seeds or fewer that is their mean), with a 95% bootstrap interval for which seeds are drawn anew, and the trials of each.
- First and last episode: fraction of trials whose first and last episode reached the goal, averaged over seeds.
- Seconds: of training, without evaluations and checkpoints, averaged over seeds. Other work on the same cores shows in
  them.
- The exact optimum, that of an agent which knows how lakes are drawn, is {optimum:.3f}.

Nothing was tuned for any variant, and few seeds tell large differences only: variants whose intervals overlap haven't been
told apart. A short run shows how fast agents learn, not where they end. Exploration fades over the same fraction of a run as in
the example.

{table}

![Return per trial by variant](figures/ablations.png)
"""


def write_page(args: Args, scores: dict[str, Score]) -> None:
    optimum = bayes_optimal_success(lake.Args.size, lake.Args.episodes).expected_return
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


def command_of(args: Args) -> str:
    words = [".venv/bin/python", "examples/ablations.py", *["--debug"] * args.debug]
    if args.variants != tuple(VARIANTS):
        words += ["--variants", *args.variants]
    words += ["--seeds", *map(str, args.seeds)]
    return shlex.join([*words, "--updates", str(args.updates), "--threads", str(args.threads)])


def make_table(scores: dict[str, Score]) -> str:
    lines = [
        "| variant | what is changed | seeds | return per trial | first episode | last episode | seconds |",
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


def read_command_line() -> Args:
    import tyro  # here, since every run's process imports this file

    defaults = Args()
    if "--debug" in sys.argv[1:]:
        defaults = dataclasses.replace(
            defaults,
            debug=True,
            run_dir=Path(f"{defaults.run_dir}_debug"),
            seeds=(1,),
            updates=DEBUG["total_updates"],
        )
    listed = "\n".join(f"    {name}: {variant.change}" for name, variant in VARIANTS.items())
    return tyro.cli(Args, default=defaults, description=f"{__doc__}\nVariants:\n\n{listed}")


def main(args: Args) -> None:
    failed = [] if args.plot_only else train_missing(args)
    write_page(args, read_scores(args))
    if failed:
        sys.exit(f"No result, see the messages above: {', '.join(failed)}")


if __name__ == "__main__":
    main(read_command_line())
