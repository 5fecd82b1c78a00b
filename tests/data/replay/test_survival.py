"""Processes that die at any moment, and processes that share a buffer."""

from __future__ import annotations

import multiprocessing
import random
import signal
import time
from pathlib import Path

import torch
from tensordict import TensorDict

from tests.data.trials import assert_stored_trials_are_whole, make_buffer, make_env, stored_trials
from tests.evaluation.scripted import act
from tests.processes import wait_for
from torchrl_amago.data import TrialCollector

CAPACITY = 3000
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload([__name__])


def open_buffer(folder, mode="continue", **options):
    options |= dict(path=folder / "replay", mode=mode)
    return make_buffer(capacity=CAPACITY, slice_length=8, batch_size=16, **options)


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


def assert_intact(steps: TensorDict, is_whole: bool = True) -> tuple[int, int]:
    """They are steps that a writer wrote, bit by bit, and all of a trial's."""
    writer, number = int(steps["writer"][0]), int(steps["number"][0])
    part = trial_of(writer, number)
    if not is_whole:
        (place,) = (part["state"] == steps["state"][0]).all(-1).nonzero()
        part = part[int(place) :][: len(steps)]
    for key, value in part.items(True, True):
        assert torch.equal(steps[key], value), (writer, number, key)
    return writer, number


def numbers_of_writers(rb) -> dict[int, list[int]]:
    """Numbers of each writer's trials in a buffer, which are whole and leave no gap."""
    numbers_of = {}
    for trial in stored_trials(rb):
        writer, number = assert_intact(trial)
        numbers_of.setdefault(writer, []).append(number)
    for numbers in numbers_of.values():
        assert numbers == list(range(numbers[0], numbers[-1] + 1))
    return numbers_of


def tell(folder: Path, writer: int, number: int) -> None:
    """Report the number of the next trial, or step, to be written."""
    with (folder / f"told_{writer}").open("ab", buffering=0) as file:
        file.write(number.to_bytes(8, "little"))


def told(folder: Path, writer: int) -> int:
    """Return the number that a writer has reported last."""
    file = folder / f"told_{writer}"
    content = file.read_bytes() if file.exists() else b""
    return int.from_bytes(content[len(content) // 8 * 8 - 8 :], "little") if content else 0


def write_for_ever(folder: Path, writer: int) -> None:
    """Write trials in writes of one to three, and tell of them."""
    torch.set_num_threads(1)
    rb, number = open_buffer(folder), told(folder, writer)
    while True:
        count = 1 + number % 3
        rb.extend(torch.cat([trial_of(writer, number + n) for n in range(count)]))
        number += count
        tell(folder, writer, number)


def collect_for_ever(folder: Path) -> None:
    torch.set_num_threads(1)
    rb = open_buffer(folder)
    options = {"frames_per_batch": 12, "total_frames": -1, "replay_buffer": rb}
    for _ in TrialCollector(make_env(), act, **options):
        tell(folder, 0, rb.write_count)


def start(target, *args):
    process = CONTEXT.Process(target=target, args=args, daemon=True)
    process.start()
    return process


def left_by_killed(folder: Path, target, *args, chance: random.Random, more: int, delay: float):
    """Open what a process leaves that is killed a while after it has told of some more."""
    process = start(target, folder, *args)
    enough = told(folder, 0) + chance.randrange(1, more)
    wait_for(lambda: told(folder, 0) > enough, 120, pause=0.0005)
    time.sleep(chance.random() * delay)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    return open_buffer(folder)


def test_killed_writers_lose_at_most_the_write_they_were_at(tmp_path):
    chance = random.Random(0)
    for _ in range(20):
        rb = left_by_killed(tmp_path, write_for_ever, 0, chance=chance, more=60, delay=0.003)
        written = told(tmp_path, 0)
        # Each of them in order up to the last one told, and at most the write after it. It is told
        # after it was written.
        ((_, numbers),) = numbers_of_writers(rb).items()
        assert written - 1 <= numbers[-1] <= written + 2
        assert len(rb) > CAPACITY - 4 * 60 or numbers[0] == 0
        assert set(rb.sample()["number"].unique().tolist()) <= set(numbers)
        tell(tmp_path, 0, numbers[-1] + 1)  # the next one goes on from there
    assert numbers[-1] >= 400


def test_killed_collection_goes_on(tmp_path):
    chance = random.Random(1)
    for _ in range(20):
        rb = left_by_killed(tmp_path, collect_for_ever, chance=chance, more=100, delay=0.005)
        trials = assert_stored_trials_are_whole(rb)
        # All that was reported, and at most one batch more: 4 steps of 3 rows, whose first trials
        # began up to 11, 8 and 5 steps earlier.
        written = rb.write_count
        assert told(tmp_path, 0) <= written <= told(tmp_path, 0) + 3 * 4 + 11 + 8 + 5
        assert written < CAPACITY
        assert sum(len(trial) for trial in trials) == written
        tell(tmp_path, 0, written)  # the next one goes on from there
    assert written > 500


def learn(folder: Path, seconds: float, queue) -> None:
    """Sample and save while others write; report what was wrong, and how much was seen."""
    torch.set_num_threads(1)
    rb = open_buffer(folder, prefetch=1)
    try:
        wait_for(rb.can_sample, 120, pause=0.0005)
        seen, batches = set(), 0
        stop = time.monotonic() + seconds
        while time.monotonic() < stop:
            batch = rb.sample()
            batches += 1
            if batches % 5 == 0:  # what is saved beside writers are whole trials too
                rb.dumps(folder / "saved")
                saved = make_buffer(capacity=CAPACITY, slice_length=8)
                saved.loads(folder / "saved")
                numbers_of_writers(saved)
                assert len(saved) == saved.write_count or len(saved) > CAPACITY - 4 * 60
            for row, mask in zip(batch, batch["collector", "mask"], strict=True):
                seen.add(assert_intact(row[mask], is_whole=False))
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
    # They wrote many times what the buffer holds.
    assert rb.write_count > 3 * CAPACITY
    numbers_of = numbers_of_writers(rb)
    assert set(numbers_of) == {0, 1}
    for writer, numbers in numbers_of.items():
        assert numbers[-1] >= told(tmp_path, writer) - 1
