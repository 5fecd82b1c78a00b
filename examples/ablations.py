"""Measure single choices of AMAGO on the lake by short runs, each with one change.

    python examples/ablations.py                      # 10 variants, 3 seeds, about 2 minutes each
    python examples/ablations.py --variants baseline memory_free --seeds 1 2
    python examples/ablations.py --debug              # networks and runs of seconds
    python examples/ablations.py --plot-only          # table and picture of the finished runs

Every run is a process of its own and writes about 50 MB into `VARIANT/SEED` in the run's folder.
The same command goes on after Ctrl-C: it skips finished runs and resumes an interrupted one from
its checkpoint. In the end the run's folder holds the page `ablations.md` and its picture
`figures/ablations.png`.
"""

from __future__ import annotations

import dataclasses
import multiprocessing
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from ablations_page import is_finished, read_scores, write_page
from ablations_variants import VARIANTS, train
from common import DEBUG


@dataclass
class Args:
    """Settings of the whole set of runs."""

    run_dir: Path = Path("runs/ablations")
    """Folder for the runs, the page and the picture."""
    variants: tuple[Literal[tuple(VARIANTS)], ...] = tuple(VARIANTS)
    """Variants to run and to show, listed above."""
    seeds: tuple[int, ...] = (1, 2, 3)
    """Seeds of each variant."""
    updates: int = 1000
    """Optimiser steps of a run: about 2 minutes on two CPU cores."""
    threads: int = 2
    """CPU threads of a run."""
    debug: bool = False
    """Small networks, 40 updates, one seed and a folder of its own: a test of the installation."""
    plot_only: bool = False
    """Write page and picture of the finished runs, train nothing."""

    def folder(self, variant: str, seed: int) -> Path:
        return self.run_dir / variant / str(seed)


def train_process(args: Args, variant: str, seed: int) -> None:
    torch.set_num_threads(args.threads)
    folder = args.folder(variant, seed)
    # Exits with 130 after Ctrl-C.
    train(variant, folder, seed, args.updates, threads=args.threads, debug=args.debug)


def train_missing(args: Args) -> list[str]:
    """Train all runs without a result; return the folders of those that failed."""
    failed = []
    # Seed by seed, so that a set stopped early has all variants to compare.
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
