"""Table of the trials in a folder: the commit point of a write, for all processes at once.

A memory-mapped file: two counters, then a ring of entries, one for each trial. Trials `begin` to
`end - 1` are there; the entry of trial n is at n modulo capacity + 1, so that no write touches the
last entry before it. A writer raises `begin` before it overwrites rows, and `end` once rows and
entries are complete, each by one aligned store: a process may die at any moment. Checksums of
counters and entries reveal flipped bits.
"""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import NoReturn

import numpy as np

from torchrl_amago._files import DamagedError

#: Steps written up to the trial's end, first row, length, CRC-32 of its values and of the entry.
ENTRY = np.dtype(
    [("stop", "<i8"), ("first", "<i4"), ("length", "<i4"), ("values", "<u4"), ("check", "<u4")]
)


class TrialTable:
    """Entries of the trials in a folder of `capacity` steps; DamagedError unless it is intact.

    A trial of L steps takes L + 1 rows, and the trials of a write lie side by side. Rows are filled
    from the front, and again from the front once the trials there are evicted, so that the oldest
    lie right ahead of the newest. `4 * capacity` rows are always enough; ordinary trials touch few
    more than `capacity`.
    """

    def __init__(self, file: Path, capacity: int, writable: bool = True) -> None:
        self.file, self.capacity = file, capacity
        size, expected = file.exists() and file.stat().st_size, self.bytes_for(capacity + 1)
        if size != expected:
            fail(f"{file} must have {expected} bytes, it has {size}")
        memory = np.asarray(np.memmap(file, ENTRY, "r+" if writable else "r"))
        self._counters, self.ring = memory[:1].view("<u8")[:2], memory[1:]
        self._known = 0, np.empty(0, ENTRY)  # number of the oldest trial, and entries
        self.look()

    @classmethod
    def create(cls, file: Path, capacity: int, begin=0, end=0, ring: bytes = b"") -> TrialTable:
        """Write a table of trials `begin` to `end - 1`."""
        # Not through a map: writing to one on a full disk ends the process.
        with file.open("wb") as stream:
            header = np.array([_encode(begin, 0), _encode(end, 1)], "<u8").tobytes()
            stream.write(header.ljust(ENTRY.itemsize, b"\0") + ring)
            stream.truncate((capacity + 2) * ENTRY.itemsize)
        return cls(file, capacity)

    @property
    def begin(self) -> int:
        """Number of the oldest trial."""
        return self._decode(0)

    @property
    def end(self) -> int:
        """Number of the next trial to be written."""
        return self._decode(1)

    @property
    def written(self) -> int:
        """Steps written so far, including those of evicted trials."""
        end = self.end  # the last entry is in the ring even if its trial was evicted
        return int(self._read(max(end - 1, 0), end)[0]["stop"].sum())

    def look(self) -> tuple[int, np.ndarray]:
        """Return the oldest trial's number and all entries: a new tuple if some changed."""
        while True:
            begin, end, (since, known) = self.begin, self.end, self._known
            if (begin, end) == (since, since + len(known)):
                return self._known
            known = known[begin - since if begin >= since else len(known) :]
            new, is_intact = self._read(begin + len(known), end)
            entries = np.concatenate([known, new])
            fits = len(entries) == end - begin and entries["length"].sum() <= self.capacity
            if is_intact and fits:
                self._known = begin, entries
            elif begin == self.begin:  # else some were evicted between the two looks
                fail(f"{self.file} has {'trials that overlap' if is_intact else 'changed'}")

    def _read(self, begin: int, end: int) -> tuple[np.ndarray, bool]:
        """Return entries by their numbers, and whether they are as they were written."""
        numbers = np.arange(begin, end)
        entries = self.ring[numbers % (self.capacity + 1)]
        return entries, bool((_checks(numbers, entries) == entries["check"]).all())

    def place(self, lengths: list[int]) -> tuple[np.ndarray, int]:
        """Find rows for new trials, under the writers' lock: entries, and the oldest that stays."""
        (begin, old), new = self.look(), np.zeros(len(lengths), ENTRY)
        new["length"], new["stop"] = lengths, self.written + np.cumsum(lengths)
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
        numbers = np.arange(self.end, self.end + len(entries))
        entries["check"] = _checks(numbers, entries)
        self.ring[numbers % (self.capacity + 1)] = entries
        self._counters[1] = _encode(self.end + len(entries), 1)
        return numbers

    def bytes_for(self, slots: int) -> int:
        """Return the size of the file up to so many slots of the ring."""
        return (1 + min(slots, self.capacity + 1)) * ENTRY.itemsize

    def _decode(self, place: int) -> int:
        word = int(self._counters[place])
        if _encode(word >> 16, place) != word:
            fail(f"{self.file} has a counter that has changed")
        return word >> 16


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
