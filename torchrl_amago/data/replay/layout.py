"""The entries of steps, and how rows keep each value once.

TorchRL's steps say everything twice: `next` of step t is the root of step t + 1. Here a trial of L
steps is L + 1 rows. Row t has the root entries of step t and what is under `next` alone (reward); the last
row has what the last step led to.

Legend: N steps, K trials, R = N + K rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_leaf_nontensor
from torch import Tensor

Kind = Literal["both", "root", "next"]

_END_KEYS = ("done", "terminated", "truncated")
_CHECKED_PAIRS = 64  # pairs (next of step t, root of step t + 1) of a write that are compared


def trial_ends(steps: TensorDictBase) -> Tensor | None:
    """Find which steps are their trial's last, by any of the flags under ``next``.

    Args:
        steps: ``[N]``.

    Returns:
        bool ``[N]``; None where there is no flag.

    Example:
        >>> done = torch.tensor([[False], [True]])
        >>> trial_ends(TensorDict({"next": {"done": done}}, [2])).tolist()
        [False, True]
    """
    flags = [steps.get(("next", key), None) for key in _END_KEYS]
    flags = [flag.reshape(len(steps), -1).any(-1) for flag in flags if flag is not None]
    return torch.stack(flags).any(0) if flags else None


class Entry(NamedTuple):
    """A tensor of each step: its key, where steps have it, and what it looks like."""

    key: tuple[str, ...]
    kind: Kind
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def row_key(self) -> tuple[str, ...]:
        """Key in rows."""
        return ("next", *self.key) if self.kind == "next" else self.key

    @property
    def file(self) -> Path:
        """File in a memory-mapped tensordict."""
        return Path(*self.row_key[:-1], f"{self.row_key[-1]}.memmap")

    @property
    def num_bytes(self) -> int:
        """Bytes of one value."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def __str__(self) -> str:
        where = {"both": "root and next", "root": "root only", "next": "next only"}[self.kind]
        return f"{[*self.shape]} {str(self.dtype).removeprefix('torch.')} ({where})"


class Layout:
    """The entries of the steps that a storage holds.

    Entries that TorchRL keeps for itself are left out: those under ``"collector"`` and those whose name
    begins with an underscore.

    Args:
        entries: by the order in which checksums take them.

    Example:
        >>> steps = TensorDict({"x": torch.arange(2.0), "next": {"x": torch.arange(1.0, 3.0),
        ...                     "reward": torch.ones(2, 1)}}, [2])
        >>> layout = Layout.of(steps)
        >>> rows = layout.pack(steps, [2])
        >>> rows["x"].tolist(), layout.unpack(rows)["next", "x"].tolist()
        ([0.0, 1.0, 2.0], [1.0, 2.0])
    """

    def __init__(self, entries: Sequence[Entry]) -> None:
        self.entries = tuple(entries)

    @classmethod
    def of(cls, steps: TensorDictBase) -> Layout:
        """Describe steps ``[N]``.

        Raises:
            TypeError: for entries that aren't tensors.
            ValueError: for an entry that is of another shape or dtype under ``next``, or for none.
        """
        root, following = _entries(steps)
        found = []
        for key in sorted(root.keys() | following.keys()):
            here, there = root.get(key), following.get(key)
            kind: Kind = "next" if here is None else "root" if there is None else "both"
            if kind == "both" and (here.shape, here.dtype) != (there.shape, there.dtype):
                raise ValueError(
                    f"{key} must be of one shape and dtype in the root and under 'next', got "
                    f"{[*here.shape[1:]]} {here.dtype} and {[*there.shape[1:]]} {there.dtype}. "
                    "Make the environment's specs agree, or leave one of them out."
                )
            value = there if here is None else here
            found.append(Entry(key, kind, value.dtype, tuple(value.shape[1:])))
        if not found:
            raise ValueError(
                "a replay buffer needs steps with at least one entry, got none. Write what a "
                "collector gives."
            )
        return cls(found)

    def to_json(self) -> list[list[Any]]:
        """Describe the entries in plain values."""
        return [[e.key, e.kind, str(e.dtype).removeprefix("torch."), e.shape] for e in self.entries]

    @classmethod
    def from_json(cls, entries: list[list[Any]]) -> Layout:
        """Invert :meth:`to_json`."""
        return cls(
            [Entry(tuple(k), kind, getattr(torch, d), tuple(s)) for k, kind, d, s in entries]
        )

    def check_same(self, other: Layout, where: str, remedy: str) -> None:
        """Raise ValueError, naming what differs, unless the other layout is this one."""
        mine, others = ({e.key: str(e) for e in x.entries} for x in (self, other))
        differing = [
            f"{'.'.join(key)}: {mine.get(key, 'nothing')} stored, {others.get(key, 'nothing')} here"
            for key in sorted(mine.keys() | others.keys())
            if mine.get(key) != others.get(key)
        ]
        if differing:
            raise ValueError(f"{where}, and differ in {'; '.join(differing)}. {remedy}")

    def pack(self, steps: TensorDictBase, lengths: Sequence[int]) -> TensorDict:
        """Make rows ``[R]`` of trials that lie side by side, ``[N]``.

        Raises:
            ValueError: where ``next`` of a step isn't the root of the step after it: only one is kept.
        """
        root, following = _entries(steps)
        length_K = torch.tensor(lengths)
        last_K, trial_K = length_K.cumsum(0) - 1, torch.arange(len(length_K))
        row_N = torch.arange(len(steps)) + trial_K.repeat_interleave(length_K)
        inner = torch.ones(len(steps), dtype=torch.bool)
        inner[last_K] = False
        inner = inner.nonzero().squeeze(-1)
        checked = inner[:: max(1, len(inner) // _CHECKED_PAIRS)]
        rows = TensorDict(batch_size=[len(steps) + len(length_K)])
        for entry in self.entries:
            here = following[entry.key] if entry.kind == "next" else root[entry.key]
            ahead = following[entry.key] if entry.kind == "both" else here
            if entry.kind == "both":
                _check_pairs(entry.key, ahead[checked], here[checked + 1])
            values = here.new_empty(rows.batch_size + here.shape[1:])
            values[row_N], values[last_K + trial_K + 1] = here, ahead[last_K]
            rows.set(entry.row_key, values)
        return rows

    def unpack(self, rows: TensorDictBase) -> TensorDict:
        """Give steps ``[*, S - 1]`` as views of rows ``[*, S]``, or of some of their entries."""
        here, ahead = rows[..., :-1], rows[..., 1:]
        for entry in self.entries:
            if entry.kind == "both" and entry.key in rows.keys(True):
                here.set(("next", *entry.key), ahead.get(entry.key))
        return here

    def row_keys(self, keys: Sequence[NestedKey]) -> list[tuple[str, ...]]:
        """Find the rows' entries that these of steps are in."""
        found = {}
        for entry in self.entries:
            places = {"both": (entry.key, ("next", *entry.key))}.get(entry.kind, (entry.row_key,))
            found |= dict.fromkeys(places, entry.row_key)
        try:
            return [found[_parts(key)] for key in keys]
        except KeyError as error:
            names = sorted(".".join(key) for key in found)
            raise KeyError(
                f"an entry must be one that the trials have, {names}, got {error}"
            ) from None


def _check_pairs(key: tuple[str, ...], ahead: Tensor, then: Tensor) -> None:
    differs = (ahead != then) & ~((ahead != ahead) & (then != then))  # NaN equals NaN here
    if differs.any():
        raise ValueError(
            f"('next', {'.'.join(key)!r}) of a step must equal {'.'.join(key)!r} of the step after it, "
            f"and differs in {int(differs.sum())} values: only one of them is stored. Let the "
            "environment show the same in both, leave the entry out of 'next', or rename it there."
        )


def _entries(steps: TensorDictBase) -> tuple[dict, dict]:
    """The tensors to keep of the root, and of ``next``, by their key as a tuple."""
    places: tuple[dict, dict] = ({}, {})
    for key, value in steps.items(True, True, is_leaf=is_leaf_nontensor):
        parts = _parts(key)
        under_next = parts[0] == "next"
        name = parts[under_next:]
        if name[0] == "collector" or any(part.startswith("_") for part in name):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"a replay buffer stores tensors, got {type(value).__name__} at {key!r}. Encode it "
                "as a tensor, or exclude it."
            )
        places[under_next][name] = value
    return places


def _parts(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)
