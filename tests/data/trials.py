"""Trials whose steps carry unique ids, and the slow, obvious way to find those that are left."""

from __future__ import annotations

import torch
from tensordict import TensorDict


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


def surviving_trials(lengths: list[int], capacity: int) -> list[tuple[int, int]]:
    """(first id, length) of the newest trials that `capacity` steps hold."""
    survivors, total, stop = [], 0, sum(lengths)
    for length in reversed(lengths):
        total += length
        if total > capacity:
            break
        stop -= length
        survivors.append((stop, length))
    return survivors[::-1]


def stored_trials(rb) -> list[TensorDict]:
    """Every stored trial, oldest first, read step by step."""
    return list(rb[:].split(rb.storage.trials().length.tolist())) if len(rb) else []


def rows(batch, key="id") -> list[list[int]]:
    """The ids behind the mask, row by row."""
    mask_BT = batch["collector", "mask"]
    return [ids[mask].tolist() for ids, mask in zip(batch[key], mask_BT, strict=True)]
