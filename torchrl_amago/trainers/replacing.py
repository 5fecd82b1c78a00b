"""Files that are replaced in one step: a crash leaves the old one or the new one, never half of it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any


@contextmanager
def replacing(path: Path, mode: str, **options: Any) -> Iterator[IO]:
    """Open a file beside `path` that takes its place when everything is written and on the disk.

    Args:
        path: the file to replace; folders above it are made.
        mode: for writing, as `open` has it.
        options: further arguments of `open`.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "note.txt"
        ...     with replacing(path, "w") as file:
        ...         _ = file.write("whole")
        ...     path.read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.tmp")
    with beside.open(mode, **options) as file:
        yield file
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)
