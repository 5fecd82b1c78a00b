"""Worker processes are replaced when they die or hang, and end with their parent."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.processes import forked, wait_for
from tests.scaling.lakes import LENGTH, make_buffer, make_env, small_policy, small_trainer
from torchrl_amago.scaling import WorkerPool, pool


@pytest.fixture(autouse=True)
def quick_looks(monkeypatch):
    monkeypatch.setattr(pool, "_LOOK_SECONDS", 0.1)


def make_pool(run_dir, workers=2, make=make_env, **options):
    options = dict(total_updates=10**6, round_steps=LENGTH, samples_per_insert=4.0) | options
    return WorkerPool(make, small_policy(), make_buffer(), run_dir, workers, **options)


def pids(run_dir):
    files = (run_dir / "workers").glob("*.json")
    return {file.stem: json.loads(file.read_text())["pid"] for file in files}


def run_until(workers, rounds, condition, seconds=60.0):
    """Sample and take in trials until a condition holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        next(rounds)
        workers.replay_buffer.sample()
        workers._supervise()
        time.sleep(0.005)


def is_running(pid):
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


def test_workers_that_die_or_hang_are_replaced(tmp_path):
    workers = make_pool(tmp_path, hung_after=2.5)
    rounds = iter(workers)

    def is_full(restarted):
        figures = workers._figures()
        return figures["workers/alive"] == 2 and figures["workers/restarted"] == restarted

    run_until(workers, rounds, lambda: is_full(0))
    first = pids(tmp_path)
    os.kill(first["worker-0"], signal.SIGKILL)
    # Else the one that stops would have the time of a first round.
    run_until(workers, rounds, lambda: is_full(1) and len(workers.pids()) == 2)
    os.kill(first["worker-1"], signal.SIGSTOP)
    run_until(workers, rounds, lambda: is_full(2))
    second = pids(tmp_path)
    assert not set(first.values()) & set(second.values())
    workers.replay_buffer.storage.verify()
    figures = workers.metrics()
    assert figures["worker-0/frames_per_second"] > 0
    assert 0 <= figures["wait/workers"] <= 1
    workers.shutdown()
    wait_for(lambda: not any(map(is_running, [*first.values(), *second.values()])))
    assert pids(tmp_path) == {}


def test_a_first_round_may_take_ten_times_longer(tmp_path):
    workers = make_pool(tmp_path, workers=1, hung_after=2.5)
    (worker,) = workers._own
    worker.process, worker.since = SimpleNamespace(exitcode=None), 100.0
    for played, limit in ((0, 25.0), (1, 2.5)):
        worker.facts = {"rounds": played}
        assert workers._find_problem(worker, 99.9 + limit) is None
        assert f"no heartbeat for {limit} s" in workers._find_problem(worker, 100.1 + limit)


def broken_env():
    raise OSError("no such emulator")


def test_workers_that_cannot_start_are_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(pool, "_PATIENCE", 1)
    workers = make_pool(tmp_path, workers=1, make=broken_env)
    with pytest.raises(RuntimeError, match="failed 1 times before a first trial"):
        next(iter(workers))
    workers.shutdown()


def test_pauses_double_while_a_worker_keeps_failing(tmp_path, monkeypatch):
    workers = make_pool(tmp_path, workers=1)
    (worker,) = workers._own
    monkeypatch.setattr(pool.time, "monotonic", lambda: 100.0)
    pauses = []
    for _ in range(8):
        worker.process = SimpleNamespace(
            exitcode=1, **dict.fromkeys(("kill", "join", "close"), list)
        )
        workers._end(worker, workers._find_problem(worker, 100.0))
        pauses.append(worker.since - 100.0)
    assert pauses == [1, 3, 7, 15, 31, 60, 60, 60]


def test_an_environment_that_cannot_be_pickled_is_refused(tmp_path):
    with pytest.raises(TypeError, match="functools.partial"):
        make_pool(tmp_path, make=lambda: make_env())
    with pytest.raises(TypeError, match="a function that makes"):
        make_pool(tmp_path, make=make_env())


def train(run_dir):
    small_trainer(run_dir, workers=2, total_updates=10**6).train()


def test_a_killed_learner_resumes_with_all_trials(tmp_path):
    learner = forked.Process(target=train, args=(tmp_path,))
    learner.start()
    wait_for(lambda: (tmp_path / "checkpoints" / "update_0000020").exists(), 60.0)
    workers = pids(tmp_path)
    os.kill(learner.pid, signal.SIGKILL)
    learner.join()
    wait_for(lambda: not any(map(is_running, workers.values())))
    buffer = make_buffer(path=tmp_path / "replay", mode="read")
    written, spool = buffer.write_count, tmp_path / "spool"
    # The learner may have died between storing a segment and removing it.
    stored = [x for x in (spool / "intake").glob("*.npz") if int(x.stem) < written]
    unread = len([*spool.rglob("*.npz")]) - len(stored)
    assert written
    trainer = small_trainer(tmp_path, workers=0, total_updates=10**6)
    trainer.resume()
    resumed_at = trainer.counts.updates
    assert resumed_at >= 20
    trainer.callbacks.append(lambda t: t.counts.updates > resumed_at + 3 and t.request_stop())
    trainer.train()
    assert trainer.counts.frames == trainer.online_buffer.write_count >= written
    assert trainer.monitor.trials >= buffer.num_trials
    taken = unread - len([*spool.rglob("*.npz")])
    assert (trainer.online_buffer.write_count > written) == (taken > 0)
    trainer.online_buffer.storage.verify()
    assert not (trainer.checkpoints.latest() / "replay").exists()
