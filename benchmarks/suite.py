"""Train many agents at many tasks with many seeds, and write the tables and figures of it.

    python benchmarks/suite.py --list                            # cells, their states and commands
    python benchmarks/suite.py --jobs 2 --minutes 15             # all; go on with the same command
    python benchmarks/suite.py --tasks lake-3 tmaze-50 --methods amago-gru ppo-gru --seeds 1 2
    python benchmarks/suite.py --peers peers.toml --methods recurrent-ppo
    python benchmarks/suite.py report                            # tables and figures of all runs
    python benchmarks/suite.py --debug --tasks lake-3 --seeds 1  # runs of seconds

A cell is a process of one thread in the folder RUN_DIR/TASK/METHOD/SEED. Finished cells are
skipped, interrupted ones go on from their checkpoint. The suite may be started several times on one
folder: a cell that another process runs is left to it. docs/suite.md tells more.
"""

from __future__ import annotations

import dataclasses
import shlex
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from threading import Event
from typing import Annotated, Literal

import tyro
from suite_cells import check_same_command, last_words, run_cell, seconds_used, state
from suite_table import METHODS, TASKS, Cell, Method, check_known, read_peers
from tqdm import tqdm

from torchrl_amago._signals import on_signals
from torchrl_amago._validation import check_counts, check_positive
from torchrl_amago.scaling import EXIT_CODES


@dataclass
class Args:
    """Settings of the suite."""

    action: Annotated[Literal["run", "report"], tyro.conf.Positional] = "run"
    """Run cells, or write tables and figures of those that have run."""
    run_dir: Path = Path("runs/suite")
    """Folder for all cells."""
    tasks: tuple[str, ...] = tuple(TASKS)
    """Names of tasks."""
    methods: tuple[str, ...] = ()
    """Names of methods; default all, peers included."""
    seeds: tuple[int, ...] = ()
    """Seeds; default five for the lake and three for others."""
    minutes: float = 15.0
    """Training minutes of a cell, on one thread; cells that used up less of them go on."""
    jobs: int = 1
    """Cells that run at the same time."""
    peers: Path | None = None
    """TOML or JSON file of other methods."""
    page: Path | None = None
    """File of the report, with pictures in `figures/suite` beside it; default
    RUN_DIR/report/suite_results.md."""
    baseline: str | None = None
    """Method that a report compares the others with; default the first."""
    list: bool = False
    """Print the cells, their states and commands; run nothing."""
    debug: bool = False
    """Small networks and runs of seconds, in a folder of their own."""

    def __post_init__(self) -> None:
        check_counts(jobs=self.jobs)
        check_positive(minutes=self.minutes)
        check_known("tasks", self.tasks, TASKS)

    def cells(self) -> Iterator[Cell]:
        """Yield cells seed by seed, so that a suite stopped early has all methods to compare.

        Raises:
            ValueError: if a method isn't known.
        """
        known = {**METHODS, **(read_peers(self.peers) if self.peers else {})}
        check_known("methods", self.methods, known)
        methods = [known[name] for name in self.methods or known]
        for number in range(max(len(self.seeds), *(TASKS[task].seeds for task in self.tasks))):
            for task in self.tasks:
                seeds = self.seeds or range(1, TASKS[task].seeds + 1)
                for method in methods:
                    if number < len(seeds) and task in method.tasks:
                        yield self._cell(task, method, seeds[number])

    def _cell(self, task: str, method: Method, seed: int) -> Cell:
        return Cell(self.run_dir, task, method, seed, self.minutes, self.debug)


def run(cells: list[Cell], jobs: int) -> int:
    """Run cells and return the exit status: 0, 1 if one failed, that of a signal if one came.

    After a signal all processes write a checkpoint first.

    Raises:
        ValueError: if a folder holds a run of another command; then none is run.
    """
    for cell in cells:
        check_same_command(cell)
    stop, status = Event(), 0

    def request_stop(outcome: str) -> None:
        nonlocal status
        status = EXIT_CODES[outcome]
        stop.set()

    with (
        on_signals(request_stop),
        ThreadPoolExecutor(jobs) as pool,
        tqdm(total=len(cells), disable=None, unit="cell") as bar,
    ):
        futures = {pool.submit(run_cell, cell, stop): cell for cell in cells}
        try:
            for future in as_completed(futures):
                cell, outcome = futures[future], future.result()
                bar.update()
                if outcome != "stopped":
                    tqdm.write(f"{cell}: {outcome}, {seconds_used(cell) / 60:.1f} minutes")
                if outcome == "failed":
                    status = status or 1
                    tqdm.write(f"{cell.folder / 'output.log'} ends with:\n{last_words(cell)}")
        finally:
            stop.set()  # an error here ends the other cells, too
    return status


def main() -> None:
    defaults = Args()
    if "--debug" in sys.argv[1:]:
        defaults = dataclasses.replace(defaults, run_dir=Path(f"{defaults.run_dir}_debug"))
    try:
        args = tyro.cli(Args, default=defaults, description=__doc__)
        cells = list(args.cells())
        if args.list:
            for cell in cells:
                print(f"{state(cell):12}{cell}  {shlex.join(cell.command())}")
        elif args.action == "report":
            from suite_report import write_report

            page = args.page or args.run_dir / "report" / "suite_results.md"
            write_report(args.run_dir, page, args.tasks, args.methods, args.baseline)
            print(page)
        else:
            sys.exit(run(cells, args.jobs))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
