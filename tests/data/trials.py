"""Trials whose steps carry unique ids, and the slow, obvious way to find the complete ones."""

from __future__ import annotations

import torch
from tensordict import TensorDict


def make_trial(length: int, first_id: int = 0, *, init_key: bool = True) -> TensorDict:
    """A trial of `length` steps, numbered from `first_id`; only its last step is done."""
    step = torch.arange(length)
    trial = TensorDict(
        {
            "id": first_id + step,
            "observation": torch.randn(length, 2),
            "next": {"done": (step == length - 1).unsqueeze(-1), "reward": torch.randn(length, 1)},
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


def surviving_trials(lengths: list[int], capacity: int) -> list[tuple[int, int]]:
    """(first id, length) of the trials of which a FIFO of `capacity` steps still holds each step."""
    written = sum(lengths)
    first, survivors = 0, []
    for length in lengths:
        if first >= written - capacity:
            survivors.append((first, length))
        first += length
    return survivors
