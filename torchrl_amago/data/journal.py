"""Which trials a storage holds, as an append-only file that survives the death of its writers.

A record is 32 bytes with a checksum, appended by one system call: after a crash the file ends in
whole records, or in a piece that is recognised and cut off. Rows of trials are written between
the record that gives up old trials and those that announce the new ones, so a record never speaks
of rows that aren't there.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path

import numpy as np

try:
    import fcntl
except ImportError:  # Windows: one process at a time there
    fcntl = None

START, TRIAL, EVICT = 1, 2, 3

#: ``START``: numbering begins at ``number``, with counters of what came before.
#: ``TRIAL``: trial ``number`` of ``steps`` steps lies at row ``first``.
#: ``EVICT``: trials before ``number`` are gone.
RECORD = np.dtype(
    [("kind", "<u4"), ("checksum", "<u4"), ("number", "<i8"), ("first", "<i8"), ("steps", "<i8")]
)


def make_records(kind: int, number, first=0, steps=0) -> np.ndarray:
    """Records of one kind; numbers or arrays of them.

    Example:
        >>> len(make_records(TRIAL, [0, 1], first=[0, 6], steps=[5, 8]))
        2
    """
    number = np.atleast_1d(np.asarray(number, dtype=np.int64))
    records = np.zeros(len(number), RECORD)
    records["kind"], records["number"] = kind, number
    records["first"], records["steps"] = first, steps
    records["checksum"] = [_checksum(record) for record in records]
    return records


def _checksum(record: np.ndarray) -> int:
    content = record.tobytes()
    return zlib.crc32(content[8:], zlib.crc32(content[:4]))


def intact(records: np.ndarray) -> np.ndarray:
    """The records before the first one whose checksum is wrong."""
    for position, record in enumerate(records):
        if _checksum(record) != record["checksum"]:
            return records[:position]
    return records


class Journal:
    """A file of records that several processes read, and write in turns.

    Args:
        path: the file; must exist.
        writable: whether this object may append.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder, "journal.bin")
        ...     path.touch()
        ...     journal, reader = Journal(path), Journal(path, writable=False)
        ...     with exclusive(path.parent):
        ...         journal.append(make_records(TRIAL, 0, first=0, steps=5))
        ...     records = reader.read()
        >>> int(records["steps"][0])
        5
    """

    def __init__(self, path: Path, writable: bool = True) -> None:
        self.path, self.writable = Path(path), writable
        self._open()

    def _open(self) -> None:
        self._file = open(self.path, "r+b" if self.writable else "rb", buffering=0)  # noqa: SIM115
        weakref.finalize(self, self._file.close)
        self._inode = os.fstat(self._file.fileno()).st_ino
        self._offset = 0

    @property
    def num_records(self) -> int:
        """Records read so far."""
        return self._offset // RECORD.itemsize

    def read(self) -> np.ndarray:
        """What was appended since the last call; all of it if the file was replaced meanwhile."""
        if os.stat(self.path).st_ino != self._inode:
            self._file.close()
            self._open()
        if os.fstat(self._file.fileno()).st_size <= self._offset:
            return np.empty(0, RECORD)
        self._file.seek(self._offset)
        content = self._file.readall()
        records = intact(np.frombuffer(content, RECORD, len(content) // RECORD.itemsize))
        self._offset += records.nbytes
        return records

    def append(self, records: np.ndarray, sync: bool = False) -> None:
        """Append records, for everybody to read; the caller holds the lock and has read what was there.

        Raises:
            OSError: where the disk is full; the file is as it was then.
        """
        # Cuts off what a writer that died in the middle of a record left.
        self._file.truncate(self._offset)
        self._file.seek(self._offset)
        try:
            written = self._file.write(records.tobytes())
            if written != records.nbytes:
                raise OSError(errno.ENOSPC, f"{written} of {records.nbytes} bytes were written")
        except OSError:
            self._file.truncate(self._offset)
            raise
        if sync:
            os.fsync(self._file.fileno())

    def rewrite(self, records: np.ndarray) -> None:
        """Replace the file at once by these records; the caller holds the lock."""
        beside = self.path.with_name(f".{self.path.name}.partial")
        with beside.open("wb") as stream:
            stream.write(records.tobytes())
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(beside, self.path)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; whoever else wants it waits."""
    # Opened anew each time: a descriptor that was inherited by a fork would share its lock.
    with (folder / "lock").open("ab") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
