"""Learner, collectors and evaluators of one run folder come and go."""

from __future__ import annotations

import errno
import os
import signal
import sys
import threading
import time

import numpy as np
import pytest

from tests.processes import forked, wait_for
from tests.scaling.lakes import LENGTH, make_env, small_policy, small_trainer
from torchrl_amago import HeldOutEvaluator
from torchrl_amago.progress import read_rows
from torchrl_amago.scaling import EXIT_CODES, collect, evaluate_run, roles
from torchrl_amago.scaling._exchange import Board, Outbox

SETTINGS = {"task": "lakes"}
ENDLESS = 10**6


def learn(run_dir, total_updates=ENDLESS):
    trainer = small_trainer(run_dir, workers=0, total_updates=total_updates, settings=SETTINGS)
    sys.exit(EXIT_CODES[trainer.resume(missing_ok=True).train()])


def play(run_dir, **options):
    sys.exit(EXIT_CODES[collect(make_env, small_policy(), run_dir, **ROLE | options)])


ROLE = dict(round_steps=LENGTH, settings=SETTINGS)


def assess(run_dir):
    policy = small_policy()
    held_out = HeldOutEvaluator(policy, make_env())
    outcome = evaluate_run(policy, lambda: held_out.evaluate(4), run_dir, settings=SETTINGS)
    sys.exit(EXIT_CODES[outcome])


def start(role, *args):
    process = forked.Process(target=role, args=args)
    process.start()
    return process


def end(process, seconds=30.0):
    begin = time.monotonic()
    os.kill(process.pid, signal.SIGTERM)
    process.join(seconds)
    assert time.monotonic() - begin < seconds
    return process.exitcode


def test_roles_come_and_go(tmp_path):
    collectors = [start(play, tmp_path)]  # before the learner
    evaluator = start(assess, tmp_path)
    learner = start(learn, tmp_path)
    table = tmp_path / "evaluations" / "0.csv"
    wait_for(lambda: table.exists() and int(read_rows(table)[-1]["update"]) >= 10, 90.0)
    assert end(collectors[0]) == 75
    assert end(evaluator) == 75
    collectors = [start(play, tmp_path) for _ in range(2)]
    wait_for(lambda: len([*(tmp_path / "workers").glob("*.json")]) == 2)
    with pytest.raises(BlockingIOError, match="in use by process"):
        small_trainer(tmp_path, workers=0, total_updates=1, settings=SETTINGS).resume()
    assert end(learner) == 75
    trainer = small_trainer(tmp_path, workers=0, total_updates=ENDLESS, settings=SETTINGS)
    updates = trainer.resume().counts.updates
    trainer._lock.close()
    assert updates > 0
    evaluator = start(assess, tmp_path)
    learner = start(learn, tmp_path, updates + 20)
    for process in (learner, evaluator, *collectors):
        process.join(60.0)
        assert process.exitcode == 0
    assert int(read_rows(table)[-1]["update"]) == updates + 20
    assert np.isfinite(float(read_rows(table)[-1]["eval/trial_return"]))
    assert not [*(tmp_path / "workers").glob("*.json")]


def test_a_collector_of_another_task_is_refused(tmp_path):
    Board(tmp_path, small_policy(), SETTINGS).publish(0)
    with pytest.raises(ValueError, match="task: lakes there, absent here"):
        collect(make_env, small_policy(), tmp_path, round_steps=LENGTH)
    with pytest.raises(ValueError, match="they differ in"):
        evaluate_run(small_policy(d_model=16), dict, tmp_path, settings=SETTINGS)


@pytest.mark.parametrize("option", [dict(ray="local"), dict(samples_per_insert=4.0)])
def test_options_of_workers_need_workers(tmp_path, option):
    with pytest.raises(ValueError, match="are for workers: give workers, too"):
        small_trainer(tmp_path, workers=None, make=make_env(), **option)


def test_a_run_keeps_its_replay_where_it_began(tmp_path):
    small_trainer(tmp_path, workers=None, make=make_env(), total_updates=5).train()
    with pytest.raises(ValueError, match="replay: absent there, in place here"):
        small_trainer(tmp_path, workers=0).resume()


def in_thread(run_dir, **options):
    thread = threading.Thread(target=collect, args=(make_env, small_policy(), run_dir))
    thread._kwargs = ROLE | options | {"max_unread": 2}
    thread.start()
    return thread


def test_a_worker_waits_while_its_segments_are_unread(tmp_path):
    board = Board(tmp_path, small_policy(), SETTINGS)
    board.publish(0)
    thread = in_thread(tmp_path, name="one", seed=0)
    outbox = Outbox(tmp_path, "one")
    wait_for(lambda: outbox.unread() == 2)
    time.sleep(0.5)
    assert outbox.unread() == 2
    next(outbox.folder.glob("*.npz")).unlink()
    wait_for(lambda: outbox.unread() == 2)
    board.publish(1, is_last=True)
    thread.join(10.0)
    assert not thread.is_alive()


def test_a_worker_waits_on_a_full_disk(tmp_path, monkeypatch, caplog):
    put, refusals = Outbox.put, [1, 2, 3]

    def full(self, segment):
        if refusals:
            refusals.pop()
            raise OSError(errno.ENOSPC, "No space left on device")
        put(self, segment)

    monkeypatch.setattr(Outbox, "put", full)
    monkeypatch.setattr(roles, "_RETRY_SECONDS", 0.01)
    board = Board(tmp_path, small_policy(), SETTINGS)
    board.publish(0)
    thread = in_thread(tmp_path, name="one", seed=0)
    wait_for(lambda: Outbox(tmp_path, "one").unread() == 2)
    board.publish(1, is_last=True)
    thread.join(10.0)
    assert refusals == []
    assert caplog.text.count("No space left") == 3
