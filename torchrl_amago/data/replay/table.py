"""Which trials a folder holds and where: what makes a write count, at one moment, for all processes.

A memory-mapped file: two counters, then a ring with an entry for each trial, that of trial n at n
modulo the capacity. Trials `begin` to `end - 1` are there. A writer raises `begin` before it
overwrites rows and `end` once rows and entries are complete, each by a single aligned store, so that a
process may die at any moment. Readers look at `begin` again after they have read rows. Counters and
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
        0x9E3779B97F4A7C15,
        0xC2B2AE3D27D4EB4F,
        0x165667B19E3779F9,
        0xD6E8FEB86659FD93,
        0xA0761D6478BD642F,
    ],
    "<u8",
)


class EvictedError(Exception):
    """A trial that other processes gave up while it was looked at."""


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
        DamagedError: for a file of another size.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     table = TrialTable.create(Path(folder) / "table.bin", capacity=10)
        ...     table.announce(table.place([4, 5])[0])
        ...     entries, begin = table.place([4])
        ...     table.written, entries["first"].tolist(), begin
        (9, [0], 1)
    """

    def __init__(self, file: Path, capacity: int, writable: bool) -> None:
        self.file, self.capacity = file, capacity
        expected, size = _HEADER + capacity * ENTRY.itemsize, file.stat().st_size
        if size != expected:
            raise DamagedError(
                f"{file} must have {expected} bytes for a capacity of {capacity}, it has {size}"
            )
        self._map = np.memmap(file, np.uint8, "r+" if writable else "r")
        memory = np.asarray(self._map)  # slices faster than a memmap
        self._counters, self._ring = memory[:16].view("<u8"), memory[_HEADER:].view(ENTRY)

    @classmethod
    def create(cls, file: Path, capacity: int) -> TrialTable:
        """Make the file of an empty table; it takes no disk space until it is filled."""
        with file.open("wb") as stream:
            stream.write(b"".join(_encode(0, salt).to_bytes(8, "little") for salt in _SALTS))
            stream.truncate(_HEADER + capacity * ENTRY.itemsize)
        return cls(file, capacity, writable=True)

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
        return self.start_of(self.end)

    def start_of(self, number: int) -> int:
        """Number of a trial's first step; also of the trial that comes next."""
        if not number:
            return 0
        start, length = self.read([number - 1])[["start", "length"]][0].tolist()
        return start + length

    def read(self, numbers: np.ndarray | list[int]) -> np.ndarray:
        """Copy the entries of these trials.

        Raises:
            EvictedError: where one isn't there any more.
            DamagedError: where one isn't what was written.
        """
        numbers = np.asarray(numbers, np.int64)
        entries = self._ring[numbers % self.capacity]
        if (_checks(numbers, entries) != entries["check"]).any():
            if numbers.min() < self.begin:
                raise EvictedError
            raise DamagedError(
                f"{self.file} has an entry that isn't what was written: the table of trials is "
                "damaged. Nothing was changed. Use another copy of the folder, or load a checkpoint"
            )
        return entries

    def verify(self) -> tuple[int, np.ndarray]:
        """Check the whole table; return `begin` and the entries of the trials that are there.

        Raises:
            DamagedError: for counters or entries that can't be.
        """
        while True:
            begin, end = self.begin, self.end
            try:
                if not 0 <= end - begin <= self.capacity:
                    raise DamagedError(f"{self.file} lists the impossible trials {begin} to {end}")
                entries = self.read(np.arange(begin, end))
                start, length = (entries[x].astype(np.int64) for x in ("start", "length"))
                rows = np.sort(entries[["first", "length"]], order="first")
                stop = rows["first"].astype(np.int64) + rows["length"] + 1
                follows = (start[1:] == (start + length)[:-1]).all()
                overlap = (rows["first"][1:] < stop[:-1]).any()
                if not follows or overlap or length.sum() > self.capacity:
                    raise DamagedError(
                        f"{self.file} lists trials that overwrite one another: its counters are damaged"
                    )
            except (EvictedError, DamagedError):
                if self.begin == begin:
                    raise
            else:
                return begin, entries

    # -- writing, by one process at a time ---------------------------------------------------------

    def place(self, lengths: list[int]) -> tuple[np.ndarray, int]:
        """Find rows for new trials of together at most `capacity` steps; nothing is changed.

        Returns:
            Their entries, and the number of the oldest trial that can stay.
        """
        oldest, end, capacity = self.begin, self.end, self.capacity
        cursor = round_start = written = 0
        if end:
            written, round_start, cursor = self.written, *self._place_after(end - 1)
        placed: list[tuple[int, ...]] = []
        began = written

        def front() -> tuple[int, int, int]:
            """Start, first row and row after the last of the oldest trial that stays."""
            stop = end + len(placed)
            if oldest == stop:
                return written, capacity * 3, capacity * 3
            old = self.read([oldest])[0].tolist() if oldest < end else placed[oldest - end]
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
        if oldest > end:  # they would overwrite one another, which an empty storage rules out
            rows = np.asarray(lengths) + 1
            entries["first"], entries["round"], oldest = np.cumsum(rows) - rows, began, end
        return entries, oldest

    def _place_after(self, number: int) -> tuple[int, int]:
        _, round_start, first, length = self.read([number])[0].tolist()[:4]
        return round_start, first + length + 1

    def evict(self, begin: int) -> None:
        """Give up the trials before this number."""
        self._counters[0] = _encode(begin, _SALTS[0])

    def announce(self, entries: np.ndarray) -> None:
        """List new trials, whose rows are complete."""
        end = self.end
        numbers = np.arange(end, end + len(entries))
        entries["check"] = _checks(numbers, entries)
        self._ring[numbers % self.capacity] = entries
        self._counters[1] = _encode(end + len(entries), _SALTS[1])

    def slot_bytes(self, count: int) -> int:
        """Bytes of the file up to the end of the next `count` entries."""
        stop = self.end % self.capacity + count
        return _HEADER + min(stop, self.capacity) * ENTRY.itemsize

    def copy_to(self, file: Path) -> None:
        """Write a table of the trials that are there now."""
        begin, end = self.begin, self.end
        copy = TrialTable.create(file, self.capacity)
        # The last one says how many steps were written, evicted or not.
        numbers = np.arange(max(0, min(begin, end - 1)), end)
        copy._ring[numbers % self.capacity] = self.read(numbers)
        copy._counters[:] = [_encode(x, salt) for x, salt in zip((begin, end), _SALTS, strict=True)]
        copy.flush()

    def flush(self) -> None:
        """Wait until the file is on the disk."""
        self._map.flush()

    def _decode(self, place: int) -> int:
        word = int(self._counters[place])
        if _encode(word >> 16, _SALTS[place]) != word:
            raise DamagedError(
                f"{self.file} has a counter that isn't what was written: the table of trials is "
                "damaged. Nothing was changed. Use another copy of the folder, or load a checkpoint"
            )
        return word >> 16


def _encode(number: int, salt: int) -> int:
    """Put a number and a check of it into 64 bits."""
    return number << 16 | binascii.crc_hqx(number.to_bytes(6, "little"), salt)


def _checks(numbers: np.ndarray, entries: np.ndarray) -> np.ndarray:
    words = np.empty((len(entries), len(_FACTORS)), "<u8")
    words[:, 0], words[:, 1:] = numbers + 1, entries.view("<u8").reshape(-1, 4)
    words[:, -1] &= 0xFFFFFFFF  # without the check itself
    return ((words * _FACTORS).sum(1) >> np.uint64(32)).astype("<u4")
