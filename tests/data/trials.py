"""Trials whose steps carry unique ids, and the slow, obvious way to find those that are left."""

from __future__ import annotations

import contextlib
import errno
import os
import threading

import pytest
import torch
from tensordict import TensorDict, assert_close
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer
from torchrl.envs import Compose, InitTracker, TransformedEnv

from tests.evaluation.scripted import ScriptedTrials
from torchrl_amago import PreviousStepTransform, TrialMixture, TrialSliceSampler, make_trial_buffer

# Of the trials of each row of `make_env`; the n-th reward of a trial is 100 * length + n.
LENGTHS = [[3, 12, 1, 7], [5, 5, 9, 2], [6, 1, 1, 4]]


def make_trial(length: int, first_id: int = 0, *, init_key: bool = True) -> TensorDict:
    """A trial of `length` steps, numbered from `first_id`; only its last step is done.

    Every entry follows from the ids: `state` counts in root and next, `observation` is root only,
    `reward` next only.
    """
    step = torch.arange(length)
    number = (first_id + step).double()
    state = torch.stack([number, -number], -1)
    trial = TensorDict(
        {
            "id": first_id + step,
            "observation": torch.stack([number.sin(), number.cos()], -1).float(),
            "nested": {"state": state},
            "next": {
                "nested": {"state": state + torch.tensor([1.0, -1.0])},
                "done": (step == length - 1).unsqueeze(-1),
                "reward": (0.5 * number).float().unsqueeze(-1),
            },
        },
        [length],
    )
    if init_key:
        trial["is_init"] = (step == 0).unsqueeze(-1)
    return trial


def make_trials(lengths: list[int], first_id: int = 0, **kwargs) -> list[TensorDict]:
    """Trials one after another, with ids that go on counting."""
    trials = []
    for length in lengths:
        trials.append(make_trial(length, first_id, **kwargs))
        first_id += length
    return trials


def filled(rb, lengths, first_id: int = 0):
    """The buffer, once trials of these lengths were written to it, one by one."""
    for trial in make_trials(list(lengths), first_id):
        rb.extend(trial)
    return rb


def make_buffer(lengths=(), first_id=0, *, capacity=100, slice_length=4, batch_size=8, **options):
    rb = make_trial_buffer(capacity, slice_length, batch_size, warn_short=False, **options)
    return filled(rb, lengths, first_id)


def stock_buffer(kind="tensor", capacity=100, slice_length=4, batch_size=8, **options):
    """Slices of whole trials from one of TorchRL's storages; further options are the sampler's."""
    storage = {"tensor": LazyTensorStorage, "memmap": LazyMemmapStorage}[kind]
    storage = storage(capacity, shared_init=options.pop("is_shared", False))
    buffer = options.pop("buffer", TensorDictReplayBuffer)
    draws = dict(batch_size=batch_size, generator=options.pop("generator", None))
    sampler = TrialSliceSampler(slice_length, warn_short=False, **options)
    return buffer(storage=storage, sampler=sampler, **draws)


def even_mixture(buffers, batch_size=2, **options) -> TrialMixture:
    return TrialMixture(buffers, dict.fromkeys(buffers, 1), batch_size=batch_size, **options)


def content_of(folder) -> dict:
    return {file: file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def flipped(content: bytes, place: int, bit: int = 0) -> bytes:
    """The content with one bit changed."""
    damaged = bytearray(content)
    damaged[place] ^= 1 << bit
    return bytes(damaged)


def full(*_, **__):
    """In place of a function that writes: the disk is full."""
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def stored_trials(rb) -> list[TensorDict]:
    """Every stored trial, oldest first, read step by step."""
    return list(rb[:].split(rb.storage.trials().length.tolist())) if len(rb) else []


def rows(batch, key="id") -> list[list[int]]:
    """The ids behind the mask, row by row."""
    mask_BT = batch["collector", "mask"]
    return [ids[mask].tolist() for ids, mask in zip(batch[key], mask_BT, strict=True)]


def windows(batch) -> set[tuple[int, ...]]:
    """The ids behind the mask of all rows that differ."""
    return {tuple(row) for row in rows(batch)}


def assert_same(found, expected) -> None:
    """The same entries, bit by bit, and no others."""
    assert_close(found, expected, rtol=0, atol=0)


def assert_columns(steps: TensorDict, **columns) -> None:
    """Entries of one number in each step hold these."""
    for name, column in columns.items():
        assert steps[name].flatten().tolist() == list(column), name


@contextlib.contextmanager
def written_beside(storage, method: str, write, *args):
    """Another process writes as soon as trials are read by a method: it waits for the lock."""
    threads, read = [], getattr(storage, method)

    def write_and_read(*args_of_read, **options):
        if not threads:
            threads.append(threading.Thread(target=write, args=args))
            threads[0].start()
            threads[0].join(0.2)
            assert threads[0].is_alive()
        return read(*args_of_read, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(storage, method, write_and_read)
        yield
        threads[0].join()


def make_env(lengths=LENGTHS) -> TransformedEnv:
    """Show where in which trial a step is, so that no slice can cross trials unnoticed."""
    script = [[[[100.0 * m + n for n in range(m)]] for m in row] for row in lengths]
    return TransformedEnv(ScriptedTrials(script), Compose(InitTracker(), PreviousStepTransform()))


def assert_stored_trials_are_whole(rb) -> list[TensorDict]:
    """All are trials of :func:`make_env`."""
    for trial in (stored := stored_trials(rb)):
        step = torch.arange(len(trial))
        reward = 100.0 * len(trial) + step
        assert len(trial) in {length for row in LENGTHS for length in row}
        assert torch.equal(trial["next", "reward"].squeeze(-1), reward)
        assert torch.equal(trial["next", "prev_reward"].squeeze(-1), reward)
        assert trial["prev_reward"].flatten().tolist() == [0.0, *reward[:-1].tolist()]
        assert torch.equal(trial["next", "done"].squeeze(-1), step == len(trial) - 1)
        assert torch.equal(trial["is_init"].squeeze(-1), step == 0)
    return stored


def found_trials(rb) -> list[tuple[int, ...]]:
    """Slots of the trials that the sampler finds in a stock buffer."""
    trials = rb.sampler.trials(rb.storage)
    pairs = zip(trials.start, trials.length, strict=True)
    return sorted(tuple(trials.slot[start : start + length].tolist()) for start, length in pairs)
