"""Cells of the suite: one process each, locked, stopped at the time limit, resumed."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from threading import Event
from typing import IO, Literal

from suite_table import ROOT, Cell

from torchrl_amago._files import replace_file
from torchrl_amago.progress import read_rows

try:
    import fcntl
except ImportError:  # Windows: the suite may be started once there
    fcntl = None

Outcome = Literal["finished", "out of time", "failed", "stopped", "runs elsewhere", "done before"]

_LOOK_SECONDS = 1.0
_GRACE_SECONDS = 120.0  # for a last checkpoint


def run_cell(cell: Cell, stop: Event) -> Outcome:
    """Run a cell to its end or its time limit, unless that is done or another process does it."""
    if stop.is_set():
        return "stopped"
    cell.folder.mkdir(parents=True, exist_ok=True)
    with try_lock(cell.folder / "lock") as lock:
        if lock is None:
            return "runs elsewhere"
        if is_done(cell):
            return "done before"
        write_json(cell.folder / "cell.json", describe(cell))
        run_dir, method = cell.folder / "run", cell.method
        if run_dir.exists() and not method.resume:
            shutil.rmtree(run_dir)
        more = method.resume if run_dir.exists() else ""
        outcome = run_process(cell, more, lock, stop, seconds=60 * cell.minutes)
        if outcome == "finished" and method.keeps_time:
            outcome = "out of time"
        if outcome == "out of time" and method.finish:
            updates = read_table(cell)[-1]["update"]
            last = run_process(cell, method.finish.format(updates=updates), lock, stop)
            outcome = outcome if last == "finished" else last
        if outcome != "stopped":
            write_json(cell.folder / "outcome.json", {"outcome": outcome, "minutes": cell.minutes})
        return outcome


def is_done(cell: Cell) -> bool:
    """Return whether a cell has finished, or used up as many minutes as it has now."""
    record = read_json(cell.folder / "outcome.json")
    used_up = record.get("outcome") == "out of time" and record["minutes"] >= cell.minutes
    return record.get("outcome") == "finished" or used_up


def state(cell: Cell) -> str:
    """Return the cell's state in words."""
    if is_done(cell):
        return read_json(cell.folder / "outcome.json")["outcome"]
    if not cell.folder.exists():
        return "missing"
    with try_lock(cell.folder / "lock") as lock:
        return "running" if lock is None else "unfinished"


def describe(cell: Cell) -> dict[str, object]:
    """Return what a report must know of a cell."""
    method = cell.method
    return {
        "task": cell.task,
        "method": method.name,
        "title": method.title or method.name,
        "seed": cell.seed,
        "minutes": cell.minutes,
        "command": shlex.join(cell.command()),
        "table": method.table,
        "columns": {"time": method.time, "frames": method.frames, "score": method.score},
    }


def check_same_command(cell: Cell) -> None:
    """Raise ValueError if the cell's folder holds a run of another command."""
    before = read_json(cell.folder / "cell.json")
    if not before:
        return
    now = describe(dataclasses.replace(cell, minutes=before["minutes"]))
    changed = [name for name, value in now.items() if before.get(name) != value]
    if changed:
        raise ValueError(
            f"{cell.folder} holds a run with another {changed[0]}: {before.get(changed[0])!r}. "
            "Delete that folder or choose another --run-dir."
        )


def run_process(
    cell: Cell, more: str, lock: IO, stop: Event, seconds: float = float("inf")
) -> Outcome:
    """Run the cell's command with `more` words, until it ends or has used up its seconds.

    They are those of its table. A process that doesn't say, or keeps the time by itself, gets twice
    as many and ten minutes.
    """
    environ = dict(os.environ, OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
    environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), environ.get("PYTHONPATH")]))
    begin = time.monotonic()
    with (cell.folder / "output.log").open("a", encoding="utf-8") as log:
        process = subprocess.Popen(
            cell.command(sys.executable, more),
            env=environ,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # signals come from here alone
            # Holds the lock for as long as it lives, even if this process is killed.
            pass_fds=[lock.fileno()],
        )
        while process.poll() is None:
            stop.wait(_LOOK_SECONDS)
            late = time.monotonic() - begin > 2 * seconds + 600
            late |= seconds_used(cell) >= seconds and not cell.method.keeps_time
            if (late or stop.is_set()) and process.poll() is None:
                end_process(process)
                return "out of time" if late else "stopped"
    return "failed" if process.returncode else "finished"


def end_process(process: subprocess.Popen) -> None:
    """Ask a process to end, and end its group if it doesn't."""
    process.send_signal(signal.SIGTERM)
    try:
        process.wait(_GRACE_SECONDS)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def seconds_used(cell: Cell) -> float:
    """Return the seconds in the last row of the cell's table, 0 if there is none."""
    with contextlib.suppress(OSError, ValueError, TypeError, KeyError, IndexError, csv.Error):
        return float(read_table(cell)[-1][cell.method.time])
    return 0.0


def read_table(cell: Cell) -> list[dict[str, str]]:
    return read_rows(cell.folder / "run" / cell.method.table)


def last_words(cell: Cell) -> str:
    """Return the end of what a cell's process printed."""
    return "\n".join((cell.folder / "output.log").read_text("utf-8").splitlines()[-5:])


@contextlib.contextmanager
def try_lock(path: Path) -> Iterator[IO | None]:
    """Yield the locked file, or None if another process holds the lock."""
    with path.open("a") as file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield None
        else:
            yield file


def read_json(path: Path) -> dict:
    return json.loads(path.read_text("utf-8")) if path.exists() else {}


def write_json(path: Path, values: dict) -> None:
    with replace_file(path, "w", encoding="utf-8") as file:
        json.dump(values, file, indent=1)
