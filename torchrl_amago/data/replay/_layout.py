"""Layout of a folder of trials: rows that hold each value once, and the table of the trials.

In TorchRL's steps, `next` of step t repeats the root of step t + 1. Here, a trial of L steps is
L + 1 rows. Row t has the root entries of step t, and those entries of its `next` that the root
lacks. Row L has the state after the last step. N steps, K trials, R = N + K rows.

The table is a memory-mapped file: two counters, then a ring of entries, one for each trial. Trials
`begin` to `end - 1` are there; the entry of trial n is at n modulo capacity + 1, so that no write
touches the last entry before it. A writer raises `begin` before it overwrites rows, and `end` once
rows and entries are complete, each by one aligned store: a process may die at any moment.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NoReturn

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase, is_leaf_nontensor
from torch import Tensor

from torchrl_amago._facts import check_same
from torchrl_amago._files import DamagedError
from torchrl_amago.data._trials import Trials
from torchrl_amago.keys import as_tuple

Key = tuple[str, ...]
Spec = dict[Key, str]  # dtype and shape of each entry of a step, as in "float32 2 3"
#: Steps written up to the trial's end, first row, length, CRC-32 of its values and of the entry.
ENTRY = np.dtype(
    [("stop", "<i8"), ("first", "<i4"), ("length", "<i4"), ("values", "<u4"), ("check", "<u4")]
)
#: What all steps of a folder share, and what to do if they don't.
ENTRIES = "entries of steps", "Collect them in the same way, or make a new buffer."

_CHECKED_PAIRS = 64  # pairs (next of step t, root of step t + 1) of a write that are compared


def entries_of(steps: TensorDictBase) -> tuple[dict[Key, Tensor], Spec]:
    """Return the tensors of steps ``[N]``, but for TorchRL's own, and describe them."""
    entries, spec = {}, {}
    leaves = steps.items(True, True, is_leaf=is_leaf_nontensor)
    for key, x in sorted((as_tuple(key), x) for key, x in leaves):
        name = key[key[0] == "next" :]
        if name[0] == "collector" or any(part.startswith("_") for part in name):
            continue
        if not isinstance(x, Tensor) or x.dtype in (torch.uint16, torch.uint32, torch.uint64):
            kind = getattr(x, "dtype", type(x).__name__)
            raise TypeError(f"can't store {kind} at {'.'.join(key)!r}. Convert or exclude it.")
        entries[key] = x
        spec[key] = " ".join(map(str, (x.dtype, *x.shape[1:]))).removeprefix("torch.")
    twice = [key for key in spec if is_twice(key, spec)]
    roots, nexts = {key: spec[key[1:]] for key in twice}, {key: spec[key] for key in twice}
    check_same("the root of steps", roots, nexts, *ENTRIES)
    return entries, spec


def is_twice(key: Key, entries: Iterable[Key]) -> bool:
    """Return whether an entry under ``next`` is stored as the root's, one row later."""
    return key[0] == "next" and key[1:] in entries


def empty_row(spec: Spec) -> dict[Key, Tensor]:
    """Make the entries of a row."""
    parts = {key: text.split() for key, text in spec.items() if not is_twice(key, spec)}
    return {k: torch.empty([*map(int, s)], dtype=getattr(torch, d)) for k, (d, *s) in parts.items()}


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
        same = torch.isclose(after[inner], root[inner + 1], 0, 0, equal_nan=True)
        if after is not root and not same.all():
            name = ".".join(key)
            raise ValueError(
                f"('next', {name!r}) of a step must equal {name!r} of the step after it, and "
                f"differs in {int((~same).sum())} values: only one of them is stored. Make the "
                "environment return the same in both, or exclude or rename the entry in 'next'."
            )
        values = root.new_empty(rows.batch_size + root.shape[1:])
        values[row_N], values[last_K + trial_K + 1] = root, after[last_K]
        rows.set(key, values)
    return rows


def as_bytes(values: Tensor) -> Tensor:
    """View values ``[R, ...]`` as bytes ``[R, width]``."""
    return values.reshape(len(values), values.shape[1:].numel()).view(torch.uint8)


def checksums(rows: TensorDictBase, trials: np.ndarray, first: int = 0) -> np.ndarray:
    """Compute the CRC-32 of the values of trials, by their entries; row 0 is the row `first`."""
    keys = sorted(map(as_tuple, rows.keys(True, True)))
    columns = [as_bytes(rows.get(key)).numpy() for key in keys]
    sums, start_K = [0] * len(trials), trials["first"] - first
    for n, (start, length) in enumerate(zip(start_K, trials["length"], strict=True)):
        for column in columns:
            sums[n] = zlib.crc32(column[start : start + length + 1], sums[n])
    return np.array(sums, "<u4")


class TrialTable:
    """Entries of the trials in a folder of `capacity` steps; DamagedError unless it is intact.

    The trials of a write lie side by side. Rows are filled from the front, and again from the front
    once the trials there are evicted. `4 * capacity` rows are always enough; ordinary trials touch
    few more than `capacity`.
    """

    def __init__(self, file: Path, capacity: int, writable: bool = True) -> None:
        self.file, self.capacity = file, capacity
        size, expected = file.exists() and file.stat().st_size, (capacity + 2) * ENTRY.itemsize
        if size != expected:
            fail(f"{file} must have {expected} bytes, it has {size}")
        self._memory = np.asarray(np.memmap(file, ENTRY, "r+" if writable else "r"))
        self._counters, self.ring = self._memory[:1].view("<u8")[:2], self._memory[1:]
        self._known = Trials(entries=self.ring[:0])
        self.look()

    @classmethod
    def create(cls, file: Path, capacity: int, source: TrialTable | None = None) -> TrialTable:
        """Write a table without trials, or a copy of another."""
        header = np.array([_encode(0, 0), _encode(0, 1)], "<u8")
        # Not through a map: writing to one on a full disk ends the process.
        with file.open("wb") as stream:
            stream.write(source._memory[: 1 + source.counters()[1]] if source else header)
            stream.truncate((capacity + 2) * ENTRY.itemsize)
        return cls(file, capacity)

    def counters(self) -> tuple[int, int]:
        """Return the numbers of the oldest trial and of the next one to be written."""
        words = self._counters.tolist()
        numbers = words[0] >> 16, words[1] >> 16
        if words != [_encode(number, place) for place, number in enumerate(numbers)]:
            fail(f"{self.file} has a counter that has changed")
        return numbers

    def look(self) -> Trials:
        """Return the trials that are there now."""
        while True:
            (begin, end), known, old = self.counters(), self._known, self._known.entries
            since = known.seen - len(old)
            if (begin, end) == (since, known.seen):
                return known
            old = old[begin - since if begin >= since else len(old) :]
            new, is_intact = self._read(begin + len(old), end)
            entries = np.concatenate([old, new])
            start, length = (entries[name].astype(np.int64) for name in ("first", "length"))
            fits = len(entries) == end - begin and length.sum() <= self.capacity
            if is_intact and fits:
                # The last entry is in the ring even if its trial was evicted.
                written = int(self._read(max(end - 1, 0), end)[0]["stop"].sum())
                num_rows, number = int((start + length + 1).max(initial=0)), np.arange(begin, end)
                self._known = Trials(end, number, start, length, None, entries, num_rows, written)
            elif begin == self.counters()[0]:  # else some were evicted between the two looks
                fail(f"{self.file} has {'trials that overlap' if is_intact else 'changed'}")

    def _read(self, begin: int, end: int) -> tuple[np.ndarray, bool]:
        """Return entries by their numbers, and whether they are as they were written."""
        numbers = np.arange(begin, end)
        entries = self.ring[numbers % len(self.ring)]
        return entries, bool((_checks(numbers, entries) == entries["check"]).all())

    def place(self, lengths: list[int]) -> tuple[np.ndarray, int]:
        """Find rows for new trials, under the writers' lock: entries, and the oldest that stays."""
        trials, new = self.look(), np.zeros(len(lengths), ENTRY)
        begin, old = trials.seen - len(trials.entries), trials.entries
        new["length"], new["stop"] = lengths, trials.written + np.cumsum(lengths)
        last_K = np.cumsum(new["length"] + 1)
        first, num_rows = old["first"], int(last_K[-1])
        oldest = np.searchsorted(old["stop"] - old["length"], new["stop"][-1] - self.capacity)
        row = int(first[-1] + old["length"][-1] + 1) if oldest < len(old) else 0
        if oldest < len(old) and num_rows <= first[oldest] < row:  # the front has room again
            row = 0
        while oldest < len(old) and row <= first[oldest] < row + num_rows:
            oldest += 1
        new["first"] = (row if oldest < len(old) else 0) + last_K - new["length"] - 1
        return new, begin + int(oldest)

    def evict(self, begin: int) -> None:
        """Give up the trials before this number."""
        self._counters[0] = _encode(begin, 0)

    def announce(self, entries: np.ndarray) -> np.ndarray:
        """Add new trials, whose rows are complete; return their numbers."""
        numbers = self.counters()[1] + np.arange(len(entries))
        entries["check"] = _checks(numbers, entries)
        self.ring[numbers % len(self.ring)] = entries
        self._counters[1] = _encode(int(numbers[-1]) + 1, 1)
        return numbers


def fail(problem: str) -> NoReturn:
    """Raise DamagedError."""
    raise DamagedError(f"{problem}. Use another copy of the folder, or load a checkpoint")


def _encode(number: int, place: int) -> int:
    """Put a counter and 16 bits of the CRC-32 of it and its place into 64 bits."""
    return number << 16 | zlib.crc32(number.to_bytes(6, "little"), place + 1) & 0xFFFF


def _checks(numbers: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """Compute the CRC-32 of entries and their trials' numbers."""
    content, size = entries.tobytes(), ENTRY.itemsize
    pieces = (content[at : at + size - 4] for at in range(0, len(content), size))
    return np.array([*map(zlib.crc32, pieces, (numbers + 1).tolist())], "<u4")
