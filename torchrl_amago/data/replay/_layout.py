"""Rows that hold each value of a trial once.

TorchRL's steps hold most values twice: `next` of step t is the root of step t + 1. Here, a trial of
L steps is L + 1 rows. Row t has the root entries of step t, and those entries of its `next` that
the root lacks. Row L has the state after the last step. N steps, K trials, R = N + K rows.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase, is_leaf_nontensor
from torch import Tensor

from torchrl_amago.keys import as_tuple

Key = tuple[str, ...]
Spec = dict[Key, str]  # dtype and shape of each entry of a step, as in "float32 2 3"

_CHECKED_PAIRS = 64  # pairs (next of step t, root of step t + 1) of a write that are compared


def entries_of(steps: TensorDictBase) -> tuple[dict[Key, Tensor], Spec]:
    """Return the tensors of steps ``[N]``, but for TorchRL's own, and describe them."""
    entries = {}
    for key, value in steps.items(True, True, is_leaf=is_leaf_nontensor):
        parts = as_tuple(key)
        name = parts[parts[0] == "next" :]
        if name[0] == "collector" or any(part.startswith("_") for part in name):
            continue
        if not isinstance(value, Tensor):
            got = f"got {type(value).__name__} at {key!r}. Encode or exclude it."
            raise TypeError(f"a replay buffer stores tensors, {got}")
        entries[parts] = value
    entries = dict(sorted(entries.items()))
    dtypes = {key: str(x.dtype).removeprefix("torch.") for key, x in entries.items()}
    spec = {key: " ".join([dtypes[key], *map(str, x.shape[1:])]) for key, x in entries.items()}
    twice = [key for key in spec if is_twice(key, spec)]
    check_same({key: spec[key[1:]] for key in twice}, {key: spec[key] for key in twice}, "the root")
    return entries, spec


def empty_row(spec: Spec) -> dict[Key, Tensor]:
    """Make the entries of a row."""
    parts = {key: text.split() for key, text in spec.items() if not is_twice(key, spec)}
    return {
        key: torch.empty([*map(int, shape)], dtype=getattr(torch, dtype))
        for key, (dtype, *shape) in parts.items()
    }


def is_twice(key: Key, entries: Iterable[Key]) -> bool:
    """Return whether an entry under ``next`` is stored as the root's, one row later."""
    return key[0] == "next" and key[1:] in entries


def check_same(stored: Spec, given: Spec, place: object) -> None:
    """Raise ValueError, naming the difference, unless two specs are the same or one is empty."""
    differing = [
        f"{'.'.join(key)}: {stored.get(key, 'nothing')} there, {given.get(key, 'nothing')} here"
        for key in sorted(stored.keys() | given.keys())
        if stored.get(key) != given.get(key)
    ]
    if stored and given and differing:
        raise ValueError(
            f"steps must have the entries of those in {place}, and differ in "
            f"{'; '.join(differing)}. Use the environment and policy that they were collected "
            "with, or a new buffer."
        )


def pack(entries: Mapping[Key, Tensor], lengths: Sequence[int]) -> TensorDict:
    """Make rows ``[R]`` of trials ``[N]`` that lie side by side."""
    length_K = torch.tensor(lengths)
    last_K, trial_K = length_K.cumsum(0) - 1, torch.arange(len(length_K))
    row_N = torch.arange(sum(lengths)) + trial_K.repeat_interleave(length_K)
    inner = (row_N.diff() == 1).nonzero().squeeze(-1)
    inner = inner[:: max(1, len(inner) // _CHECKED_PAIRS)]
    rows = TensorDict(batch_size=[sum(lengths) + len(lengths)])
    for key, root in entries.items():
        if is_twice(key, entries):
            continue
        after = entries.get(("next", *key), root)
        a, b = (after[inner], root[inner + 1]) if after is not root else (root[:0], root[:0])
        differs = (a != b) & ~((a != a) & (b != b))  # NaN equals NaN here
        if differs.any():
            name = ".".join(key)
            raise ValueError(
                f"('next', {name!r}) of a step must equal {name!r} of the step after it, and "
                f"differs in {int(differs.sum())} values: only one of them is stored. Make the "
                "environment return the same in both, or exclude or rename the entry in 'next'."
            )
        values = root.new_empty(rows.batch_size + root.shape[1:])
        values[row_N], values[last_K + trial_K + 1] = root, after[last_K]
        rows.set(key, values)
    return rows


def as_bytes(values: Tensor) -> Tensor:
    """View values ``[R, ...]`` as bytes ``[R, width]``."""
    return values.reshape(len(values), values.shape[1:].numel()).view(torch.uint8)


def checksums(rows: TensorDictBase, first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Compute the CRC-32 of the values of runs of rows."""
    columns = [rows.get(key) for key in sorted(map(as_tuple, rows.keys(True, True)))]
    columns = [as_bytes(x).numpy() for x in columns if x.numel()]
    sums = np.zeros(len(first), "<u4")
    for n, (start, stop) in enumerate(zip(first.tolist(), (first + count).tolist(), strict=True)):
        for column in columns:
            sums[n] = zlib.crc32(column[start:stop], int(sums[n]))
    return sums
