"""Which trials a folder holds, and where: what makes a write count, at one moment, for all processes.

A memory-mapped file: two counters, then a ring with an entry for each trial, that of trial n at n
modulo the capacity. Trials `begin` to `end - 1` are there. A writer raises `begin` before it
overwrites rows and `end` once rows and entries are complete, each by one aligned store, so a process
may die at any moment. Readers look at `begin` again after they have read rows. Counters and
entries carry checks of their own: no flipped bit goes unnoticed.
"""

from __future__ import annotations

import binascii
from pathlib import Path

import numpy as np

from torchrl_amago.files import DamagedError

#: A trial: number of its first step among all ever written, that of its round's first step, first row,
#: steps, CRC-32 of its values, and a check of its number and of all this.
ENTRY = np.dtype(
    [
        ("start", "<u8"),
        ("round", "<u8"),
        *((x, "<u4") for x in ("first", "length", "values", "check")),
    ]
)
_HEADER = 4096  # a page of its own for the counters
_SALTS = (0x5A17, 0xC3E9)  # keep one counter's bytes from passing for the other's, or for zeros
# Odd, with all bits mixed: the flip of any bit changes the upper half of the sum of multiples (Knuth, TAOCP
# volume 3, section 6.4, on multiplicative hashing).
_FACTORS = np.array(
    [
        0x9E3779B97F4A7C15, 0xC2B2AE3D27D4EB4F, 0x165667B19E3779F9,
        0xD6E8FEB86659FD93, 0xA0761D6478BD642F,
    ],
    "<u8",
)  # fmt: skip


class TrialTable:
    """Entries of the trials in a folder of `capacity` steps.

    A trial of L steps takes L + 1 rows side by side. Rows are filled from the front; once a round has placed
    `capacity` steps and there is room at the front again, the next round begins there. So the oldest
    trials always lie right ahead of the newest. `3 * capacity + 2` rows are always enough, and ordinary
    trials touch few more than `capacity`.

    Args:
        file: made by :meth:`create`.
        capacity: most steps kept.
        writable: for a writer.

    Raises:
        DamagedError: for a file of another size, or one that can't be right.
    """

    def __init__(self, file: Path, capacity: int, writable: bool = True) -> None:
        self.file, self.capacity = file, capacity
        size, expected = file.stat().st_size, _HEADER + capacity * ENTRY.itemsize
        if size != expected:
            raise DamagedError(f"{file} must have {expected} bytes, it has {size}")
        self._map = np.memmap(file, np.uint8, "r+" if writable else "r")
        memory = np.asarray(self._map)  # slices faster than a memmap
        self._counters, self._ring = memory[:16].view("<u8"), memory[_HEADER:].view(ENTRY)
        self._begin, self._known = 0, np.empty(0, ENTRY)
        self.verify()

    @classmethod
    def create(cls, file: Path, capacity: int) -> TrialTable:
        """Make the file of an empty table; it takes no disk space until it is filled."""
        with file.open("wb") as stream:
            stream.write(b"".join(_encode(0, salt).to_bytes(8, "little") for salt in _SALTS))
            stream.truncate(_HEADER + capacity * ENTRY.itemsize)
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
        last = None
        while last is None:
            begin, entries = self.look()
            last = entries[-1:] if len(entries) else self._read(max(begin - 1, 0), begin)
        return int(last["start"][0]) + int(last["length"][0]) if len(last) else 0

    def look(self) -> tuple[int, np.ndarray]:
        """Return the number of the oldest trial, and the entries of all; only new ones are read."""
        while True:
            begin, end = self.begin, self.end
            if not 0 <= end - begin <= self.capacity:
                raise self._damage("a count that cannot be")
            known = self._known[begin - self._begin :] if begin >= self._begin else self._known[:0]
            new = self._read(begin + len(known), end)
            if new is not None:
                if len(new) or begin != self._begin:
                    self._begin, self._known = begin, np.concatenate([known, new])
                return begin, self._known

    def _read(self, begin: int, end: int) -> np.ndarray | None:
        if begin == end:
            return self._ring[:0]
        numbers = np.arange(begin, end)
        entries = self._ring[numbers % self.capacity]
        if (_checks(numbers, entries) == entries["check"]).all():
            return entries
        if begin >= self.begin:
            raise self._damage("an entry that isn't what was written")
        return None  # evicted just now, and written over

    def verify(self) -> None:
        """Raise DamagedError if trials overwrite one another."""
        while True:
            begin, entries = self.look()
            start, length = (entries[x].astype(np.int64) for x in ("start", "length"))
            rows = np.sort(entries[["first", "length"]], order="first")
            stop = rows["first"].astype(np.int64) + rows["length"] + 1
            overlap = (rows["first"][1:] < stop[:-1]).any() or length.sum() > self.capacity
            if not overlap and (start[1:] == (start + length)[:-1]).all():
                return
            if begin == self.begin:
                raise self._damage("trials that overwrite one another")

    # -- writing, by one process at a time -------------------------------------------------------

    def place(self, lengths: list[int]) -> tuple[np.ndarray, int]:
        """Find rows for new trials of together at most `capacity` steps; nothing is changed.

        Returns:
            Their entries, and the number of the oldest trial that can stay.
        """
        begin, alive = self.look()
        end, written, capacity = self.end, self.written, self.capacity
        cursor = round_start = oldest = 0
        if end:
            _, round_start, first, length, *_ = self._read(end - 1, end)[0].tolist()
            cursor = first + length + 1
        placed: list[tuple[int, ...]] = []

        def front() -> tuple[int, int, int]:
            """Start, first row and row after the last of the oldest trial that stays."""
            if oldest == len(alive) + len(placed):
                return written, 3 * capacity, 3 * capacity
            is_old = oldest < len(alive)
            old = alive[oldest].tolist() if is_old else placed[oldest - len(alive)]
            return old[0], old[2], old[2] + old[3] + 1

        for length in lengths:
            while written + length - front()[0] > capacity:
                oldest += 1
            if written + length - round_start > capacity and front()[1] > length:
                cursor, round_start = 0, written
            while front()[1] < cursor + length + 1 and cursor < front()[2]:
                oldest += 1
            placed.append((written, round_start, cursor, length, 0, 0))
            cursor, written = cursor + length + 1, written + length
        entries = np.array(placed, ENTRY)
        if oldest > len(
            alive
        ):  # they would overwrite one another, which an empty storage rules out
            rows, oldest = np.asarray(lengths) + 1, len(alive)
            entries["first"], entries["round"] = np.cumsum(rows) - rows, placed[0][0]
        return entries, begin + oldest

    def evict(self, begin: int) -> None:
        """Give up the trials before this number."""
        self._counters[0] = _encode(begin, _SALTS[0])

    def announce(self, entries: np.ndarray) -> np.ndarray:
        """List new trials, whose rows are complete; return their numbers."""
        numbers = np.arange(self.end, self.end + len(entries))
        entries["check"] = _checks(numbers, entries)
        self._ring[numbers % self.capacity] = entries
        self._counters[1] = _encode(self.end + len(entries), _SALTS[1])
        return numbers

    def bytes_for(self, count: int) -> int:
        """Bytes of the file up to the end of the next `count` entries."""
        return _HEADER + min(self.end % self.capacity + count, self.capacity) * ENTRY.itemsize

    def copy_to(self, file: Path) -> None:
        """Write a table of the trials that are there now."""
        copy = TrialTable.create(file, self.capacity)
        begin, entries = self.look()
        end = begin + len(entries)
        # The last one says how many steps were written, evicted or not.
        for number in (np.arange(begin, end), np.arange(max(0, end - 1), end)):
            copy._ring[number % self.capacity] = self._ring[number % self.capacity]
        copy._counters[:] = [_encode(x, salt) for x, salt in zip((begin, end), _SALTS, strict=True)]
        copy.flush()

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
            f"{self.file} has {what}: the table of trials is damaged. Nothing was changed. Use another "
            "copy of the folder, or load a checkpoint"
        )


def _encode(number: int, salt: int) -> int:
    """Put a number and a check of it into 64 bits."""
    return number << 16 | binascii.crc_hqx(number.to_bytes(6, "little"), salt)


def _checks(numbers: np.ndarray, entries: np.ndarray) -> np.ndarray:
    words = np.empty((len(entries), len(_FACTORS)), "<u8")
    words[:, 0], words[:, 1:] = numbers + 1, entries.view("<u8").reshape(-1, 4)
    words[:, -1] &= 0xFFFFFFFF  # without the check itself
    return ((words * _FACTORS).sum(1) >> np.uint64(32)).astype("<u4")
