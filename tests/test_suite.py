"""The suite: cells that are killed, stopped, locked and resumed, and the report's figures by hand."""

from __future__ import annotations

import json
import shlex
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import suite_cells
from suite_cells import check_same_command, is_done, run_cell, state, try_lock
from suite_report import show_first, write_report
from suite_runs import common_place, curve, normalized_scores, read_runs
from suite_table import METHODS, ROOT, TASKS, Cell, Method, read_peers

from tests.scripts import run_script

SUITE = ROOT / "benchmarks" / "suite.py"
# Pretends that every evaluation takes a second, for ever or for so many of them.
PEER = """
import sys, time
from pathlib import Path
folder, evaluations = Path(sys.argv[1]), int(sys.argv[2])
folder.mkdir(parents=True)
with (folder / "table.csv").open("w") as file:
    print("clock,steps,gain", file=file, flush=True)
    for number in range(1, evaluations + 1):
        print(f"{number},{100 * number},{number / 10}", file=file, flush=True)
        time.sleep(0.01)
"""


@pytest.fixture
def peer(tmp_path) -> Method:
    script = tmp_path / "peer.py"
    script.write_text(PEER)
    command = shlex.join([sys.executable, str(script), "{run_dir}", "{seconds}"])
    columns = {"table": "table.csv", "time": "clock", "frames": "steps", "score": "gain"}
    return Method("peer", command, tasks=("lake-3",), **columns)


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(suite_cells, "_LOOK_SECONDS", 0.02)


@pytest.mark.slow
def test_a_killed_cell_is_resumed_and_both_are_reported(tmp_path, monkeypatch, quick, peer):
    """One cell is an example, the other one a peer of another program."""
    root, started = tmp_path / "runs", []
    popen = suite_cells.subprocess.Popen
    monkeypatch.setattr(
        suite_cells.subprocess,
        "Popen",
        lambda *a, **k: started.append(popen(*a, **k)) or started[-1],
    )
    cell = Cell(root, "lake-3", METHODS["amago-feedforward"], 1, 5.0, debug=True)

    def kill_after_a_checkpoint():
        while not list(cell.folder.glob("run/checkpoints/update*")):
            time.sleep(0.02)
        started[0].kill()

    killer = threading.Thread(target=kill_after_a_checkpoint)
    killer.start()
    assert run_cell(cell, threading.Event()) == "failed"
    killer.join()
    assert state(cell) == "unfinished"

    peers = tmp_path / "peers.json"
    peers.write_text(json.dumps({"peer": [vars(peer)]}))
    flags = ["--debug", "--run-dir", str(root), "--tasks", "lake-3", "--seeds", "1"]
    flags += ["--methods", "amago-feedforward", "peer", "--minutes", "5", "--peers", str(peers)]
    done = run_script(SUITE, *flags)
    assert done.returncode == 0, done.stderr
    assert "lake-3/amago-feedforward/1: finished" in done.stdout
    assert "lake-3/peer/1: out of time, 5.0 minutes" in done.stdout
    assert "goes on in" in (cell.folder / "output.log").read_text("utf-8")

    reported = run_script(SUITE, "report", *flags)
    assert reported.returncode == 0, reported.stderr
    page = (root / "report" / "suite_results.md").read_text("utf-8")
    assert "2 finished cells of 2 that have begun; 1 tasks, 2 methods" in page
    assert "| peer | 1 | 30.00 [30.00, 30.00] |" in page
    assert shlex.join(cell.command()) in page
    assert page.count("![") == 6
    for line in page.splitlines():
        if line.startswith("!["):
            assert (root / "report" / line.partition("](")[2].rstrip(")")).stat().st_size
    assert "out of time lake-3/peer/1" in run_script(SUITE, *flags, "--list").stdout


def test_a_cell_stops_at_the_limit_and_goes_on_with_a_higher_one(tmp_path, quick, peer):
    endless = peer.command.replace("{seconds}", "100000")
    cells = [
        Cell(tmp_path, "lake-3", Method(**{**vars(peer), "command": endless}), 1, minutes)
        for minutes in (0.2, 0.4)
    ]
    assert [state(cell) for cell in cells] == ["missing", "missing"]
    assert run_cell(cells[0], threading.Event()) == "out of time"
    assert suite_cells.seconds_used(cells[0]) >= 12
    assert [is_done(cell) for cell in cells] == [True, False]
    assert run_cell(cells[0], threading.Event()) == "done before"
    assert run_cell(cells[1], threading.Event()) == "out of time"
    assert suite_cells.seconds_used(cells[1]) >= 24
    with pytest.raises(ValueError, match="holds a run with another command"):
        check_same_command(Cell(tmp_path, "lake-3", peer, 1, 1.0))


def test_a_cell_is_left_to_the_process_that_runs_it(tmp_path, peer):
    cell = Cell(tmp_path, "lake-3", peer, 1, 0.1)
    cell.folder.mkdir(parents=True)
    with try_lock(cell.folder / "lock") as lock:
        assert lock is not None
        assert run_cell(cell, threading.Event()) == "runs elsewhere"
        assert state(cell) == "running"
    stop = threading.Event()
    stop.set()
    assert run_cell(cell, stop) == "stopped"


def test_commands_name_scripts_and_flags_that_exist(tmp_path):
    """Every own cell's command, with the flags that its example knows."""
    known = {}
    for method in METHODS.values():
        for task in method.tasks:
            command = Cell(tmp_path, task, method, 1, 1.0).command()
            script = Path(command[1])
            if script.name not in known:
                shown = run_script(ROOT / "examples" / script.name, "--help")
                known[script.name] = shown.stdout + "--debug"
            flags = [word for word in command if word.startswith("--")]
            assert all(flag in known[script.name] for flag in flags), command


def test_peers(tmp_path):
    path = tmp_path / "peers.toml"
    path.write_text('[[peer]]\nname = "other"\ncommand = "x {task}"\ntasks = ["lake-3"]\n')
    if sys.version_info >= (3, 11):
        assert read_peers(path)["other"].tasks == ("lake-3",)
    path = tmp_path / "peers.json"
    for entry, message in {
        '{"name": "amago-gru", "command": "x"}': "must be new",
        '{"name": "a", "command": "x", "colour": 1}': "fields of Method.*colour",
        '{"name": "a", "command": "x", "tasks": ["chess"]}': "tasks must be of lake-3.*got chess",
    }.items():
        path.write_text(f'{{"peer": [{entry}]}}')
        with pytest.raises(ValueError, match=message):
            read_peers(path)


def write_cell(root: Path, method: str, seed: int, scores: list[float], pace: float) -> None:
    """Write a finished cell whose evaluations come every `pace` seconds and 100 steps."""
    folder = root / "lake-3" / method / str(seed)
    (folder / "run").mkdir(parents=True)
    columns = {"time": "seconds", "frames": "steps", "score": "gain"}
    cell = {"task": "lake-3", "method": method, "title": method.upper(), "seed": seed}
    cell |= {"minutes": 1.0, "command": f"run {method} {seed}", "table": "t.csv"}
    (folder / "cell.json").write_text(json.dumps({**cell, "columns": columns}))
    (folder / "outcome.json").write_text('{"outcome": "finished", "minutes": 1}')
    rows = [f"{pace * n},{100 * n},{score}" for n, score in enumerate(scores, 1)]
    # Two rows without an evaluation.
    text = "\n".join(["seconds,steps,gain", "0.1,1,", "0.2,2,nan", *rows])
    (folder / "run" / "t.csv").write_text(text)


def test_scores_by_hand(tmp_path):
    write_cell(tmp_path, "a", 1, [1.0, 2.0, 4.5], pace=10)
    write_cell(tmp_path, "a", 2, [1.0, 4.4], pace=10)
    write_cell(tmp_path, "b", 1, [3.0, 4.0, 4.0, 4.0], pace=25)
    runs = read_runs(tmp_path, list(TASKS), [])
    assert [(run.method, run.seed) for run in runs] == [("a", 1), ("a", 2), ("b", 1)]
    assert common_place(runs, "time") == 60
    assert common_place(runs, "frames") == 200
    assert [run.score_at("time", 60) for run in runs] == [4.5, 4.4, 4.0]
    assert [run.score_at("frames", 200) for run in runs] == [2.0, 4.4, 4.0]
    # From chance to the first evaluation, and between two.
    assert runs[0].score_at("time", 0) == TASKS["lake-3"].chance == 0.35
    assert runs[0].score_at("time", 5) == pytest.approx((0.35 + 1.0) / 2)
    assert runs[2].score_at("frames", 150) == 3.5
    assert show_first(runs[:2], "time") == "25 s (2 of 2)"
    assert show_first(runs[:2], "frames") == "250 (2 of 2)"
    assert show_first(runs[2:], "time") == "never (0 of 1)"
    scores = normalized_scores({"lake-3": runs}, "a", "frames")["lake-3"]
    np.testing.assert_allclose(scores, (np.array([2.0, 4.4]) - 0.35) / (4.496 - 0.35))
    mean, low, high = curve(runs[:2], "frames", np.array([100, 200, 300]))
    assert mean.tolist() == [1.0, 3.2, 4.45]
    assert low.tolist() == [1.0, 2.0, 4.4]
    assert high.tolist() == [1.0, 4.4, 4.5]


def test_report_with_a_baseline(tmp_path):
    for seed in (1, 2):
        write_cell(tmp_path, "a", seed, [1.0, 2.0], pace=10)
        write_cell(tmp_path, "b", seed, [1.0, 4.0], pace=20)
    write_report(tmp_path, tmp_path / "page.md", list(TASKS), [], baseline="a")
    page = (tmp_path / "page.md").read_text("utf-8")
    assert "| B | 1.00 [1.00, 1.00] | 1, 0, 0 | 1.00 [1.00, 1.00] | 1, 0, 0 |" in page
    assert "| Frozen lake 3x3 | 2.00 | **4.00** |" in page
    assert "run a 1\nrun a 2\nrun b 1\nrun b 2" in page
    # A run that was stopped before its first evaluation counts as chance.
    (tmp_path / "lake-3" / "b" / "1" / "run" / "t.csv").write_text("seconds,steps\n0.1,1\n")
    write_report(tmp_path, tmp_path / "page.md", list(TASKS), [])
    assert "| B | 2 | 2.17 [0.35, 4.00] |" in (tmp_path / "page.md").read_text("utf-8")
    with pytest.raises(ValueError, match="baseline must be one of a, b, got 'c'"):
        write_report(tmp_path, tmp_path / "page.md", list(TASKS), [], baseline="c")
    with pytest.raises(ValueError, match="needs at least one finished cell"):
        write_report(tmp_path, tmp_path / "page.md", ["pendulum"], [])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tasks", "chess"], "tasks must be of lake-3"),
        (["--methods", "dqn"], "methods must be of amago-transformer"),
        (["report"], "needs at least one finished cell"),
    ],
)
def test_a_users_errors(flags, message, tmp_path):
    done = run_script(SUITE, *flags, "--run-dir", str(tmp_path))
    assert done.returncode == 2
    assert message in done.stderr
