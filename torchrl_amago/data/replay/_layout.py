"""The entries of steps, and rows that keep each value once.

TorchRL's steps say everything twice: `next` of step t is the root of step t + 1. Here a trial of L steps is L + 1
rows. Row t has the entries of step t but for those under `next` that the root has, too; row L has what the last
step led to. N steps, K trials, R = N + K rows.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_leaf_nontensor
from torch import Tensor

Key = tuple[str, ...]
Spec = dict[Key, str]  # what each entry of a step looks like, as "float32 2 3"

_CHECKED_PAIRS = 64  # pairs (next of step t, root of step t + 1) of a write that are compared


def as_tuple(key: NestedKey) -> Key:
    """Give a key as a tuple."""
    return (key,) if isinstance(key, str) else tuple(key)


def entries_of(steps: TensorDictBase) -> dict[Key, Tensor]:
    """Give the tensors of steps ``[N]``, but for TorchRL's own: under ``"collector"``, or ``"_..."``."""
    entries = {}
    for key, value in steps.items(True, True, is_leaf=is_leaf_nontensor):
        parts = as_tuple(key)
        name = parts[parts[0] == "next" :]
        if name[0] == "collector" or any(part.startswith("_") for part in name):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"a replay buffer stores tensors, got {type(value).__name__} at {key!r}. Encode it "
                "as a tensor, or exclude it."
            )
        entries[parts] = value
    if not entries:
        raise ValueError("a replay buffer needs steps with at least one entry, got none.")
    spec = spec_of(entries)
    for key in spec:
        if is_twice(key, spec) and spec[key] != spec[key[1:]]:
            raise ValueError(
                f"{key[1:]} must be of one dtype and shape in the root and under 'next', got "
                f"{spec[key[1:]]} and {spec[key]}. Make the environment's specs agree, or leave one out."
            )
    return dict(sorted(entries.items()))


def spec_of(entries: Mapping[Key, Tensor]) -> Spec:
    """Describe entries ``[N, ...]``."""
    return {
        key: " ".join([str(x.dtype).removeprefix("torch."), *map(str, x.shape[1:])])
        for key, x in entries.items()
    }


def empty_row(spec: Spec) -> TensorDict:
    """Make a row of zeros."""
    row = TensorDict()
    for key, (dtype, *shape) in ((key, text.split()) for key, text in spec.items()):
        if not is_twice(key, spec):
            row.set(key, torch.zeros([int(n) for n in shape], dtype=getattr(torch, dtype)))
    return row


def is_twice(key: Key, entries: Iterable[Key]) -> bool:
    """Whether an entry under ``next`` is kept as the root's, one row on."""
    return key[0] == "next" and key[1:] in entries


def check_same(stored: Spec, here: Spec, place: object) -> None:
    """Raise ValueError, naming what differs, unless two specs are the same."""
    differing = [
        f"{'.'.join(key)}: {stored.get(key, 'nothing')} stored, {here.get(key, 'nothing')} here"
        for key in sorted(stored.keys() | here.keys())
        if stored.get(key) != here.get(key)
    ]
    if differing:
        raise ValueError(
            f"steps must have the entries of those in {place}, and differ in {'; '.join(differing)}. Use "
            "the environment and policy that they were collected with, or a new buffer."
        )


def pack(entries: Mapping[Key, Tensor], lengths: Sequence[int]) -> TensorDict:
    """Make rows ``[R]`` of trials ``[N]`` that lie side by side."""
    length_K = torch.tensor(lengths)
    last_K, trial_K = length_K.cumsum(0) - 1, torch.arange(len(length_K))
    row_N = torch.arange(sum(lengths)) + trial_K.repeat_interleave(length_K)
    inner = (row_N.diff() == 1).nonzero().squeeze(-1)
    inner = inner[:: max(1, len(inner) // _CHECKED_PAIRS)]
    rows = TensorDict(batch_size=[sum(lengths) + len(lengths)])
    for key, here in entries.items():
        if is_twice(key, entries):
            continue
        ahead = entries.get(("next", *key), here)
        then, following = (here[inner + 1], ahead[inner]) if ahead is not here else (here[:0],) * 2
        differs = (following != then) & ~(
            (following != following) & (then != then)
        )  # NaN is NaN here
        if differs.any():
            name = ".".join(key)
            raise ValueError(
                f"('next', {name!r}) of a step must equal {name!r} of the step after it, and differs in "
                f"{int(differs.sum())} values: only one of them is stored. Let the environment show the "
                "same in both, leave the entry out of 'next', or rename it there."
            )
        values = here.new_empty(rows.batch_size + here.shape[1:])
        values[row_N], values[last_K + trial_K + 1] = here, ahead[last_K]
        rows.set(key, values)
    return rows
