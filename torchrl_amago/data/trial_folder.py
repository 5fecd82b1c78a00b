"""The folder that trials are kept in: made, checked, described, and given disk space.

It holds::

    schema.json    format, capacity, and the entries of a row
    rows.bin       the rows of all trials, memory-mapped (see row_layout)
    journal.bin    which trials are there (see journal)
    lock           held by whoever writes
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torchrl_amago.data.journal import RECORD

SCHEMA, ROWS, JOURNAL = "schema.json", "rows.bin", "journal.bin"
FORMAT = "torchrl_amago trials 1"


def make_temporary(owner: object) -> Path:
    """A folder that is removed with its owner, or at exit."""
    path = Path(tempfile.mkdtemp(prefix="trials_"))
    weakref.finalize(owner, _remove, path, os.getpid())
    return path


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # not in a process that was forked off
        shutil.rmtree(path, ignore_errors=True)


def make_writable(path: Path) -> None:
    """Make the folder if need be.

    Raises:
        PermissionError: where nothing can be written to it.
    """
    try:
        path.mkdir(parents=True, exist_ok=True)
        with (path / "lock").open("ab"):
            pass
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise PermissionError(
            error.errno,
            f"a buffer that is written to needs a folder that can be, and {path} can't "
            f"({error.strerror}). Choose another path, or only read it with mode='read'",
        ) from error


def check_remains(path: Path) -> None:
    """Refuse trials whose description is gone, but not what a process left that died making a folder.

    Raises:
        RuntimeError: for the former.
    """
    # The order in which they are made, backwards, as another process may be making them now. Trials are
    # recorded when all of them are there.
    rows, recorded = (_size(path / name) for name in (ROWS, JOURNAL))
    is_rest = recorded > RECORD.itemsize or (rows > 0 and recorded == 0)
    if is_rest and not (path / SCHEMA).exists():
        raise RuntimeError(
            f"{path / SCHEMA} must be there, as there are {ROWS} and {JOURNAL} with trials: the folder is "
            "incomplete. Bring the file back, use another copy of the folder, or choose another path."
        )


def _size(file: Path) -> int:
    return file.stat().st_size if file.exists() else 0


def read_schema(path: Path) -> dict[str, Any]:
    """The description of a folder's trials.

    Raises:
        RuntimeError: where it can't be read.
        ValueError: where it is of another format.
    """
    try:
        schema = json.loads((path / SCHEMA).read_text())
        found = schema.get("format")
    except (ValueError, AttributeError) as error:
        raise RuntimeError(
            f"{path / SCHEMA} must describe the trials of its folder, and can't be read ({error}). "
            "Bring the file back, or use another copy of the folder."
        ) from error
    if found != FORMAT:
        raise ValueError(
            f"{path} must be of the format {FORMAT!r}, got {found!r}. Open it with the version of "
            "torchrl_amago that wrote it, or choose another path."
        )
    return schema


def allocate(file: Path, start: int, stop: int) -> None:
    """Claim the bytes of a file from `start` to `stop`."""
    if hasattr(os, "posix_fallocate"):
        descriptor = os.open(file, os.O_RDWR)
        try:
            os.posix_fallocate(descriptor, start, stop - start)
        finally:
            os.close(descriptor)
    elif shutil.disk_usage(file.parent).free < stop - start:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def full_disk_explained(path: Path) -> Iterator[None]:
    """Say what a full disk means for the trials of a folder."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        raise OSError(
            error.errno,
            f"the disk of {path} must have room for the trials of a write, and is full "
            f"({error.strerror}). What the buffer lists is whole. Free some space and go on, or use "
            "a smaller capacity",
        ) from error
