"""Which trials a folder holds, and where: what makes a write count, at one moment, for all processes.

A memory-mapped file: two counters, then a ring with an entry for each trial, that of trial n at n
modulo capacity + 1: a write never touches the entry of the last trial before it. Trials `begin` to `end - 1` are there. A writer raises `begin` before it
overwrites rows and `end` once rows and entries are complete, each by one aligned store, so a process
may die at any moment. Readers look at `begin` again after they have read rows. Counters and
entries carry checksums of their own: no flipped bit goes unnoticed.
"""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np

from torchrl_amago._files import DamagedError

#: A trial: steps written up to its end since the beginning, first row, steps, CRC-32 of its values and of this.
ENTRY = np.dtype([("stop", "<u8"), *((x, "<u4") for x in ("first", "length", "values", "check"))])
_HEADER = 4096  # a page of its own for the counters
_EPISODES = 1000
_SALTS = (0x5A17, 0xC3E9)  # keep one counter's bytes from passing for the other's, or for zeros


class TrialTable:
    """Entries of the trials in a folder of `capacity` steps.

    A trial of L steps takes L + 1 rows side by side. Rows are filled from the front, and again from there once
    the trial there has left; so the oldest trials lie right ahead of the newest. `3 * capacity + 2` rows
    are always enough, and ordinary trials touch few more than `capacity`.

    Raises:
        DamagedError: for a file of another size, or one that can't be right.
    """

    def __init__(self, file: Path, capacity: int, writable: bool = True) -> None:
        self.file, self.capacity = file, capacity
        size, expected = file.stat().st_size, _HEADER + (capacity + 1) * ENTRY.itemsize
        if size != expected:
            raise DamagedError(f"{file} must have {expected} bytes, it has {size}")
        self._map = np.memmap(file, np.uint8, "r+" if writable else "r")
        memory = np.asarray(self._map)  # slices faster than a memmap
        self._counters, self._ring = memory[:16].view("<u8"), memory[_HEADER:].view(ENTRY)
        self._known = 0, np.empty(0, ENTRY)
        self.verify()

    @classmethod
    def create(cls, file: Path, capacity: int) -> TrialTable:
        """Make the file of an empty table; it takes no disk space until it is filled."""
        with file.open("wb") as stream:
            stream.write(b"".join(_encode(0, salt).to_bytes(8, "little") for salt in _SALTS))
            stream.truncate(_HEADER + (capacity + 1) * ENTRY.itemsize)
        return cls(file, capacity)

    @property
    def begin(self) -> int:
        """Number of the oldest trial that is there."""
        return self._decode(0)

    @property
    def end(self) -> int:
        """Number that the next trial gets."""
        return self._decode(1)

    @property
    def written(self) -> int:
        """Steps written so far, those of evicted trials included."""
        for _ in range(_EPISODES):
            end = self.end
            last = self._read(max(end - 1, 0), end)
            if last is not None:  # else written over just now
                return int(last["stop"].sum())
        raise self._damage("a last entry that isn't what was written")

    def look(self) -> tuple[int, np.ndarray]:
        """Return the number of the oldest trial, and the entries of all; only new ones are read."""
        while True:
            begin, end, (since, known) = self.begin, self.end, self._known
            if not 0 <= end - begin <= self.capacity:
                if begin == self.begin:
                    raise self._damage("a count that cannot be")
                continue  # others wrote between the two looks
            known = known[begin - since :] if begin >= since else known[:0]
            new = self._read(begin + len(known), end)
            if new is not None:
                if len(new) or begin != since:
                    self._known = begin, np.concatenate([known, new])
                return self._known

    def _read(self, begin: int, end: int) -> np.ndarray | None:
        numbers = np.arange(begin, end)
        entries = self._ring[numbers % (self.capacity + 1)]
        if (_checks(numbers, entries) == entries["check"]).all():
            return entries
        if begin >= self.begin:
            raise self._damage("an entry that isn't what was written")
        return None  # evicted just now, and written over

    def verify(self) -> None:
        """Raise DamagedError if trials overwrite one another."""
        overlap, begin = True, -1
        while overlap and begin != self.begin:  # else others have written meanwhile
            begin, entries = self.look()
            order = entries["first"].argsort()
            first, length = (entries[x][order].astype(np.int64) for x in ("first", "length"))
            overlap = (first[1:] <= (first + length)[:-1]).any() or length.sum() > self.capacity
            overlap |= (np.diff(entries["stop"]) != entries["length"][1:]).any()
        if overlap:
            raise self._damage("trials that overwrite one another")

    # -- writing, by one process at a time -------------------------------------------------------

    def place(self, lengths: list[int]) -> tuple[np.ndarray, int]:
        """Find rows for new trials of together at most `capacity` steps; nothing is changed.

        Returns:
            Their entries, and the number of the oldest trial that can stay.
        """
        begin, old = self.look()
        new = np.zeros(len(lengths), ENTRY)
        new["length"], new["stop"] = lengths, self.written + np.cumsum(lengths)
        trials, oldest = np.concatenate([old, new]), 0
        first, length, stop = (trials[x].astype(np.int64) for x in ("first", "length", "stop"))
        for n in range(len(old), len(trials)):
            oldest += np.searchsorted(stop[oldest:n] - length[oldest:n], stop[n] - self.capacity)
            cursor = first[n - 1] + length[n - 1] + 1 if oldest < n else 0
            if (
                oldest < n and length[n] < first[oldest] < cursor
            ):  # there is room at the front again
                cursor = 0
            while oldest < n and cursor <= first[oldest] <= cursor + length[n]:
                oldest += 1
            first[n] = cursor
        if oldest > len(old):  # they would overwrite one another, which an empty storage rules out
            oldest, first[len(old) :] = len(old), np.cumsum(new["length"] + 1) - new["length"] - 1
        new["first"] = first[len(old) :]
        return new, begin + int(oldest)

    def evict(self, begin: int) -> None:
        """Give up the trials before this number."""
        self._counters[0] = _encode(begin, _SALTS[0])

    def announce(self, entries: np.ndarray) -> np.ndarray:
        """List new trials, whose rows are complete; return their numbers."""
        numbers = np.arange(self.end, self.end + len(entries))
        entries["check"] = _checks(numbers, entries)
        self._ring[numbers % (self.capacity + 1)] = entries
        self._counters[1] = _encode(self.end + len(entries), _SALTS[1])
        return numbers

    def bytes_for(self, count: int) -> int:
        """Bytes of the file up to the end of the next `count` entries."""
        slots = self.capacity + 1
        return _HEADER + min(self.end % slots + count, slots) * ENTRY.itemsize

    def copy_to(self, file: Path, begin: int, entries: np.ndarray) -> None:
        """Write a table of those trials of a :meth:`look` before that are still there."""
        TrialTable.create(file, self.capacity)
        end = begin + len(entries)
        if not len(entries):  # the last one tells how many steps were written
            entries = self._read(max(end - 1, 0), end)
        slot = np.arange(end - len(entries), end) % (self.capacity + 1)
        counters = (min(max(begin, self.begin), end), end)
        words = [_encode(x, salt) for x, salt in zip(counters, _SALTS, strict=True)]
        # Not through a map: writing to one on a full disk ends the process.
        with file.open("r+b") as stream:
            stream.write(np.array(words, "<u8").tobytes())
            for run in np.split(np.arange(len(slot)), np.flatnonzero(np.diff(slot) != 1) + 1):
                if len(run):
                    stream.seek(_HEADER + int(slot[run[0]]) * ENTRY.itemsize)
                    stream.write(entries[run].tobytes())

    def flush(self) -> None:
        """Wait until the file is on the disk."""
        self._map.flush()

    def _decode(self, place: int) -> int:
        word = int(self._counters[place])
        if _encode(word >> 16, _SALTS[place]) != word:
            raise self._damage("a counter that isn't what was written")
        return word >> 16

    def _damage(self, what: str) -> DamagedError:
        return DamagedError(
            f"{self.file} has {what}: the table of trials is damaged. Use another copy of the folder, "
            "or load a checkpoint"
        )


def _encode(number: int, salt: int) -> int:
    """Put a number and 16 bits of its CRC-32 into 64 bits."""
    return number << 16 | zlib.crc32(number.to_bytes(6, "little"), salt) & 0xFFFF


def _checks(numbers: np.ndarray, entries: np.ndarray) -> np.ndarray:
    """CRC-32 of each entry, which begins with the trial's number."""
    content, size = entries.tobytes(), ENTRY.itemsize
    pieces = (content[at : at + size - 4] for at in range(0, len(content), size))
    return np.array([*map(zlib.crc32, pieces, (numbers + 1).tolist())], "<u4")
