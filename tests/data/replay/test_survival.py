"""Processes that die at any moment, and processes that share a buffer."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from tensordict import TensorDict
from torchrl.collectors import MultiCollector
from torchrl.envs import Compose, InitTracker, TransformedEnv

from tests.data.trials import stored_trials
from tests.evaluation.scripted import ScriptedTrials, act
from tests.processes import fork_workers
from torchrl_amago.data import TrialCollector, make_trial_buffer
from torchrl_amago.envs import PreviousStepTransform

CAPACITY = 3000
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def open_buffer(folder, mode="continue"):
    return make_trial_buffer(CAPACITY, 8, 16, path=folder / "replay", mode=mode, warn_short=False)


def trial_of(writer: int, number: int) -> TensorDict:
    """The trial that a writer writes as its `number`-th: a function of both, every byte of it."""
    generator = torch.Generator().manual_seed(1_000_003 * writer + number)
    length = int(torch.randint(1, 60, (), generator=generator))
    state = torch.randn(length + 1, 5, generator=generator)
    done = (torch.arange(length) == length - 1).unsqueeze(-1)
    return TensorDict(
        {
            "writer": torch.full((length,), writer),
            "number": torch.full((length,), number),
            "state": state[:-1],
            "next": {"state": state[1:], "done": done},
        },
        [length],
    )


def assert_intact(trial: TensorDict) -> tuple[int, int]:
    """It is what its writer wrote, bit by bit, and whole."""
    writer, number = int(trial["writer"][0]), int(trial["number"][0])
    expected = trial_of(writer, number)
    assert len(trial) == len(expected)
    for key, value in expected.items(True, True):
        assert torch.equal(trial[key], value), (writer, number, key)
    return writer, number


def write_for_ever(folder: Path, writer: int, number: int = 0) -> None:
    """Write trials in writes of one to three; tell in a file which ones are written."""
    torch.set_num_threads(1)
    rb = open_buffer(folder)
    told = os.open(folder / f"told_{writer}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    while True:
        count = 1 + number % 3
        rb.extend(torch.cat([trial_of(writer, number + n) for n in range(count)]))
        number += count
        os.write(told, number.to_bytes(8, "little"))


def told(folder: Path, writer: int) -> int:
    """Return the number of trials that a writer has reported."""
    file = folder / f"told_{writer}"
    content = file.read_bytes() if file.exists() else b""
    return int.from_bytes(content[len(content) // 8 * 8 - 8 :], "little") if content else 0


def start(target, *args):
    process = CONTEXT.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def wait_for(condition) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.0005)


def test_killed_writers_lose_at_most_the_write_they_were_at(tmp_path):
    chance = random.Random(0)
    number = 0
    for _ in range(20):
        process = start(write_for_ever, tmp_path, 0, number)
        enough = told(tmp_path, 0) + chance.randrange(1, 60)
        wait_for(lambda enough=enough: told(tmp_path, 0) > enough)
        time.sleep(chance.random() * 0.003)
        process.kill()
        process.join()
        assert process.exitcode == -signal.SIGKILL
        rb = open_buffer(tmp_path)
        trials = [assert_intact(trial) for trial in stored_trials(rb)]
        numbers = [number for _, number in trials]
        written = told(tmp_path, 0)
        # Each of them in order up to the last one told, and at most the write after it. It is told
        # after it was written.
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert written - 1 <= numbers[-1] <= written + 2
        assert len(rb) > CAPACITY - 4 * 60 or numbers[0] == 0
        batch = rb.sample()
        assert set(batch["number"].unique().tolist()) <= set(numbers)
        number = numbers[-1] + 1
        # What is told next goes on from there.
        (tmp_path / "told_0").write_bytes(number.to_bytes(8, "little"))
    assert number > 400


def make_env() -> TransformedEnv:
    """Rewards number the steps of each trial from 1."""
    lengths = [[3, 5], [4], [7, 2, 6]]
    script = [[[[float(n + 1) for n in range(m)]] for m in row] for row in lengths]
    transforms = Compose(InitTracker(), PreviousStepTransform())
    return TransformedEnv(ScriptedTrials(script), transforms)


def make_policy():
    return act


def assert_counts_from_one(trial: TensorDict) -> None:
    count = torch.arange(len(trial)) + 1.0
    assert len(trial) in {2, 3, 4, 5, 6, 7}
    assert torch.equal(trial["next", "reward"].squeeze(-1), count)
    assert torch.equal(trial["next", "prev_reward"].squeeze(-1), count)
    assert torch.equal(trial["prev_reward"].squeeze(-1), count - 1)
    assert torch.equal(trial["next", "done"].squeeze(-1), count == len(trial))
    assert torch.equal(trial["is_init"].squeeze(-1), count == 1)


def collect_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)
    rb = open_buffer(folder)
    collector = TrialCollector(
        make_env(), act, frames_per_batch=12, total_frames=-1, replay_buffer=rb
    )
    told = os.open(folder / "told_0", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for _ in collector:
        os.write(told, rb.write_count.to_bytes(8, "little"))


def test_killed_collection_goes_on(tmp_path):
    chance = random.Random(1)
    written = 0
    for _ in range(20):
        process = start(collect_for_ever, tmp_path)
        enough = written + chance.randrange(1, 100)
        wait_for(lambda enough=enough: told(tmp_path, 0) > enough)
        time.sleep(chance.random() * 0.005)
        process.kill()
        process.join()
        rb = open_buffer(tmp_path)
        trials = stored_trials(rb)
        for trial in trials:
            assert_counts_from_one(trial)
        # All that was reported, and at most one batch more: 4 steps of 3 rows, whose first trials
        # began up to 6 steps earlier.
        written = rb.write_count
        assert told(tmp_path, 0) <= written <= told(tmp_path, 0) + 3 * (4 + 6)
        assert written < CAPACITY
        assert sum(len(trial) for trial in trials) == written
        # What is told next goes on from there.
        (tmp_path / "told_0").write_bytes(written.to_bytes(8, "little"))
    assert written > 500


def assert_saved_is_intact(folder: Path) -> None:
    """What was saved beside writers are whole trials, each writer's without a gap."""
    rb = make_trial_buffer(CAPACITY, 8, 16, warn_short=False)
    rb.loads(folder)
    found = [assert_intact(trial) for trial in stored_trials(rb)]
    for writer in {writer for writer, _ in found}:
        numbers = [number for who, number in found if who == writer]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
    assert len(rb) == rb.write_count or len(rb) > CAPACITY - 4 * 60


def learn(folder: Path, seconds: float, queue) -> None:
    """Sample and save while others write; report what was wrong, and how much was seen."""
    torch.set_num_threads(1)
    rb = make_trial_buffer(
        CAPACITY, 8, 16, path=folder / "replay", mode="continue", warn_short=False, prefetch=1
    )
    try:
        wait_for(rb.can_sample)
        seen, batches = set(), 0
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            batch = rb.sample()
            batches += 1
            if batches % 5 == 0:
                rb.dumps(folder / "saved")
                assert_saved_is_intact(folder / "saved")
            for row, mask in zip(batch, batch["collector", "mask"], strict=True):
                row = row[mask]
                writer, number = int(row["writer"][0]), int(row["number"][0])
                expected = trial_of(writer, number)
                (place,) = (expected["state"] == row["state"][0]).all(-1).nonzero()
                part = expected[int(place) : int(place) + len(row)]
                for key, value in part.items(True, True):
                    assert torch.equal(row[key], value), (writer, number, key)
                seen.add((writer, number))
        queue.put((None, batches, seen))
    except BaseException as error:
        queue.put((repr(error), 0, set()))
        raise
    finally:
        rb.shutdown()


def test_two_processes_write_while_a_third_learns(tmp_path):
    queue = CONTEXT.Queue()
    learner = start(learn, tmp_path, 4.0, queue)
    writers = [start(write_for_ever, tmp_path, writer) for writer in (0, 1)]
    error, batches, seen = queue.get(timeout=120)
    for writer in writers:
        writer.kill()
        writer.join()
    learner.join()
    assert error is None
    assert batches > 10  # and so at least two were saved
    assert {writer for writer, _ in seen} == {0, 1}
    rb = open_buffer(tmp_path, mode="read")
    found = [assert_intact(trial) for trial in stored_trials(rb)]
    assert {writer for writer, _ in found} == {0, 1}
    assert len(set(found)) == len(found)
    # They wrote many times what the buffer holds.
    assert rb.write_count > 3 * CAPACITY
    for writer in (0, 1):
        numbers = [number for who, number in found if who == writer]
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
        assert numbers[-1] >= told(tmp_path, writer) - 1


@pytest.mark.slow
def test_torchrls_collectors_in_two_processes(tmp_path, monkeypatch):
    fork_workers(monkeypatch)
    rb = open_buffer(tmp_path)
    collector = MultiCollector(
        [make_env, make_env],
        policy_factory=make_policy,
        sync=True,
        frames_per_batch=24,
        total_frames=24 * 15,
        trajs_per_batch=1,
        replay_buffer=rb,
    )
    checked = 0
    try:
        for _ in collector:
            for trial in stored_trials(rb):
                assert_counts_from_one(trial)
            checked += rb.can_sample()
    finally:
        collector.shutdown()
    assert checked > 5
    assert rb.write_count > 120
