"""Which trials a storage holds, as an append-only file that survives the death of its writers.

A record is 32 bytes with a checksum, appended by one system call: after a crash the file ends in
whole records, or in a piece that is recognised and cut off. Rows of trials are written between
the record that gives up old trials and those that announce the new ones, so a record never speaks
of rows that aren't there. Nothing is read or written at a file's position: after a fork, two processes
would share it.
"""

from __future__ import annotations

import contextlib
import errno
import os
import time
import weakref
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

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

# Seconds to wait before damage is believed: a record may be read while it is written.
_PATIENCE = (0.001, 0.01, 0.1)


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


def _is_intact(record: np.ndarray) -> bool:
    return _checksum(record) == record["checksum"]


def intact(records: np.ndarray) -> np.ndarray:
    """The records before the first one whose checksum is wrong."""
    for position, record in enumerate(records):
        if not _is_intact(record):
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
        self.inode = os.fstat(self._file.fileno()).st_ino
        self._offset = self._reserved = 0

    @property
    def num_records(self) -> int:
        """Records read so far."""
        return self._offset // RECORD.itemsize

    def read(self) -> np.ndarray:
        """What was appended since the last call; all of it if the file was replaced meanwhile.

        Raises:
            RuntimeError: where a record is damaged: one with a wrong checksum and intact ones after it.
        """
        if os.stat(self.path).st_ino != self.inode:
            self._file.close()
            self._open()
        size = os.fstat(self._file.fileno()).st_size
        if size <= self._offset:
            return np.empty(0, RECORD)
        for seconds in _PATIENCE:
            content = _read_at(self._file, size - self._offset, self._offset)
            records = np.frombuffer(content, RECORD, len(content) // RECORD.itemsize)
            found = intact(records)
            behind = records[len(found) :]
            # A write that was cut short has no intact record behind it. Reserved space is zero.
            if not any(_is_intact(record) for record in behind[behind["kind"] != 0]):
                self._offset += found.nbytes
                return found
            time.sleep(seconds)
        raise RuntimeError(
            f"every record of {self.path} must have its checksum, and number "
            f"{self.num_records + len(found)} hasn't, with intact ones behind it: the journal is damaged. "
            "Nothing was changed. Use another copy of the folder, or load a checkpoint into a new one."
        )

    def reserve(self, count: int) -> None:
        """Take disk space for the next records, so that appending them can't fail for want of it.

        The caller holds the lock and has read what was there.

        Raises:
            OSError: where the disk is full; the file is as it was then.
        """
        # Cuts off what a writer that died in the middle of a record left.
        self._file.truncate(self._offset)
        self._write(bytes(count * RECORD.itemsize))
        self._reserved = count * RECORD.itemsize

    def append(self, records: np.ndarray, sync: bool = False) -> None:
        """Append records, for everybody to read; the caller holds the lock and has read what was there.

        Raises:
            OSError: where the disk is full; the file is as it was then.
        """
        if self._reserved < records.nbytes:
            self.reserve(len(records))
        self._write(records.tobytes())
        self._reserved -= records.nbytes
        if sync:
            os.fsync(self._file.fileno())

    def _write(self, content: bytes) -> None:
        try:
            written = _write_at(self._file, content, self._offset)
            if written != len(content):
                raise OSError(errno.ENOSPC, f"{written} of {len(content)} bytes were written")
        except OSError:
            self._file.truncate(self._offset)
            self._reserved = 0
            raise

    def prepare(self, records: np.ndarray) -> None:
        """Write the records that :meth:`replace` puts in place of all; the caller holds the lock.

        Raises:
            OSError: where the disk is full; nothing has changed then.
        """
        try:
            write_file(self._beside, records.tobytes(), sync=True)
        except OSError:
            self._beside.unlink(missing_ok=True)
            raise

    def replace(self, sync: bool = False) -> None:
        """Replace the file at once by what was prepared; takes no disk space."""
        os.replace(self._beside, self.path)
        if sync:
            sync_folder(self.path.parent)

    @property
    def _beside(self) -> Path:
        return self.path.with_name(f".{self.path.name}.partial")


def _read_at(file: BinaryIO, size: int, offset: int) -> bytes:
    if hasattr(os, "pread"):
        return os.pread(file.fileno(), size, offset)
    file.seek(offset)  # Windows, which has no forks
    return file.read(size)


def _write_at(file: BinaryIO, content: bytes, offset: int) -> int:
    if hasattr(os, "pwrite"):
        return os.pwrite(file.fileno(), content, offset)
    file.seek(offset)
    return file.write(content)


def write_file(path: Path, content: bytes, sync: bool) -> None:
    """Write a file; with `sync`, wait for the disk."""
    with path.open("wb") as stream:
        stream.write(content)
        if sync:
            stream.flush()
            os.fsync(stream.fileno())


def sync_folder(path: Path) -> None:
    """Wait until the disk has the names of a folder's files."""
    if fcntl is None:  # Windows can't open folders
        return
    folder = os.open(path, os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


@contextlib.contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Hold the lock of a folder; whoever else wants it waits."""
    # Opened anew each time: a descriptor that was inherited by a fork would share its lock.
    with (folder / "lock").open("ab") as lock:
        if fcntl is not None:
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield
