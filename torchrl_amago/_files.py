"""Files and folders replaced in one step, checksums, disk space and locks.

Everything that a run keeps (checkpoints, policies, tables, replay) is written through these
functions: a crash at any moment leaves the old version or the new one, a full disk is an
:class:`OSError` with the path and the sizes, and damage is found before anything is loaded.
"""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import tempfile
import weakref
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows: no locks between processes there
    fcntl = None

MANIFEST = "manifest.json"

_PARTIAL, _PREVIOUS = "partial", "previous"
_CHUNK = 1 << 20


class DamagedError(RuntimeError):
    """Files that are incomplete or have changed since they were written."""


# -- replacing -----------------------------------------------------------------------------------


@contextlib.contextmanager
def replace_file(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """Open a file that takes the place of `path` once it is complete and on the disk.

    Args:
        path: file to replace; missing parent folders are made.
        mode: a mode for writing, as in `open`.
        options: further arguments of `open`.

    Raises:
        OSError: where the disk is full; `path` stays as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Path(folder) / "note.txt"
        ...     with replace_file(path, "w") as file:
        ...         _ = file.write("whole")
        ...     path.read_text()
        'whole'
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path, _PARTIAL)
    try:
        with explain_full_disk(path), partial.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
    except BaseException:
        partial.unlink(missing_ok=True)
        raise
    os.replace(partial, path)


@contextlib.contextmanager
def replace_folder(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Give an empty folder that takes the place of `path` once it is complete and on the disk.

    Args:
        path: folder to replace; missing parent folders are made.
        flush: wait for the disk. Without, what is there survives the death of the process, but not the
            failure of the machine.

    Raises:
        OSError: where the disk is full; `path` stays as it was.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as root:
        ...     path = Path(root) / "checkpoint"
        ...     with replace_folder(path) as folder:
        ...         _ = (folder / "note.txt").write_text("whole")
        ...     sorted(file.name for file in path.iterdir())
        ['note.txt']
    """
    path = path.resolve() if path.is_symlink() else path  # a link stays one
    partial, previous = _beside(path, _PARTIAL), _beside(path, _PREVIOUS)
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with explain_full_disk(path):
            yield partial
            for entry in [*partial.rglob("*"), partial] if flush else []:
                sync(entry)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        os.replace(path, previous)
    os.replace(partial, path)
    if flush:
        sync(path.parent)
    shutil.rmtree(previous, ignore_errors=True)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a crash leaves no half of it under its name."""
    previous = _beside(path, _PREVIOUS)
    shutil.rmtree(previous, ignore_errors=True)
    os.replace(path, previous)
    shutil.rmtree(previous, ignore_errors=True)


def recover(folder: Path, name: str | None = None) -> None:
    """Finish or undo the replacements that a crash interrupted in a folder.

    Call it only while no other process writes there, such as under :func:`lock`.

    Args:
        folder: where they were made.
        name: the file or folder that was replaced; by default any, in a folder that is all our own.
    """
    name = "*" if name is None else glob.escape(name)
    for previous in folder.glob(f".{name}.{_PREVIOUS}"):
        path = folder / previous.name.removeprefix(".").removesuffix(f".{_PREVIOUS}")
        # Between its two renames a replacement has neither version under the name.
        if _beside(path, _PARTIAL).exists() and not path.exists():
            os.replace(previous, path)
    for leftover in (*folder.glob(f".{name}.{_PARTIAL}"), *folder.glob(f".{name}.{_PREVIOUS}")):
        if leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Force a file, or a folder's list of names, onto the disk."""
    if path.is_dir() and os.name == "nt":
        return  # Windows cannot open folders; its renames are journalled
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")


# -- checksums -----------------------------------------------------------------------------------


def write_manifest(folder: Path, facts: Mapping[str, Any]) -> None:
    """Write `manifest.json`: facts, size and SHA-256 of every other file, and a checksum of all this.

    Args:
        folder: its files are complete.
        facts: JSON values by name; `"files"` and `"crc32"` are taken.
    """
    files = {
        file.relative_to(folder).as_posix(): {
            "bytes": file.stat().st_size,
            "sha256": sha256(file),
        }
        for file in sorted(_files(folder))
    }
    manifest = json.loads(json.dumps({**facts, "files": files}))
    text = json.dumps({**manifest, "crc32": _manifest_crc32(manifest)}, indent=1) + "\n"
    (folder / MANIFEST).write_text(text, encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder, None where it is missing or not as it was written."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_manifest = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)
    # Other versions' manifests, which have no checksum, are read to tell their version.
    is_intact = is_manifest and manifest.get("crc32") in (None, _manifest_crc32(manifest))
    return manifest if is_intact else None


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder whose files are exactly those that it lists.

    Raises:
        DamagedError: for a file that is missing, changed or not listed. An unlisted file could
            stand in for a verified one.
    """
    manifest = read_manifest(folder)
    if manifest is None or "crc32" not in manifest:
        raise DamagedError(f"{folder / MANIFEST} is missing or cannot be read, or has changed")
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            raise DamagedError(f"{file} is missing")
        size = file.stat().st_size
        if size != expected["bytes"]:
            raise DamagedError(f"{file} has {size} bytes instead of {expected['bytes']}")
        if sha256(file) != expected["sha256"]:
            raise DamagedError(f"{file} has changed since it was written (SHA-256 differs)")
    found = {file.relative_to(folder).as_posix() for file in _files(folder)}
    unlisted = sorted(found - manifest["files"].keys())
    if unlisted:
        raise DamagedError(f"{folder / unlisted[0]} is not listed in {MANIFEST}")
    return manifest


def _manifest_crc32(manifest: Mapping[str, Any]) -> int:
    return _crc32({key: value for key, value in manifest.items() if key != "crc32"})


def sha256(file: Path) -> str:
    """Compute the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _files(folder: Path) -> list[Path]:
    # Everything that is not a plain folder counts, dangling links included.
    found = [path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir()]
    return [path for path in found if path != folder / MANIFEST]


# -- disk space ----------------------------------------------------------------------------------


def reserve(file: Path, start: int, stop: int) -> None:
    """Claim disk space for the bytes of a file from `start` to `stop`, which may lie past its end.

    Writing to mapped memory that has no disk space ends the process with SIGBUS.

    Raises:
        OSError: where the disk is full.
    """
    if stop <= start:
        return
    if hasattr(os, "posix_fallocate"):
        descriptor = os.open(file, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            with explain_full_disk(file, stop - start):
                os.posix_fallocate(descriptor, start, stop - start)
        finally:
            os.close(descriptor)
    elif shutil.disk_usage(file.parent).free < stop - start:
        with explain_full_disk(file, stop - start):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def explain_full_disk(path: Path, needed: int | None = None) -> Iterator[None]:
    """Name path, need and free space in the error of a full disk.

    Args:
        path: file or folder that is written.
        needed: bytes, where known.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT) or getattr(error, "explained", False):
            raise
        place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
        need = "" if needed is None else f"{needed} bytes are needed, "
        explained = OSError(
            error.errno,
            f"the disk must have room for {path}: {need}{shutil.disk_usage(place).free} bytes are "
            "free. What was there before is intact. Free some space, or choose another disk",
        )
        explained.explained = True
        raise explained from error


# -- locks ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def lock(file: Path, *, wait: bool = True) -> Iterator[None]:
    """Hold a lock between processes; the death of its holder releases it.

    Args:
        file: lock file; it is made where it is missing, and never removed.
        wait: wait for other holders.

    Raises:
        BlockingIOError: with `wait=False`, while another process holds the lock.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder, lock(Path(folder) / "lock"):
        ...     (Path(folder) / "lock").exists()
        True
    """
    if fcntl is None:
        yield
        return
    # Opened anew each time: a descriptor that is shared after a fork would share the lock.
    with file.open("a+", encoding="utf-8") as stream:
        try:
            fcntl.flock(stream, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            stream.seek(0)
            holder = stream.read().strip() or "another process"
            raise BlockingIOError(
                error.errno, f"{file.parent} is in use by {holder}. Wait for it, or stop it"
            ) from error
        if not wait:
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            stream.flush()
        yield


# -- small things ----------------------------------------------------------------------------------


def write_json(file: Path, value: Any) -> None:
    """Write a JSON value beside its checksum, for :func:`read_json`."""
    text = json.dumps({"value": value, "crc32": _crc32(value)}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    """Return the value that :func:`write_json` wrote.

    Raises:
        DamagedError: for a file that is missing, or isn't what was written.
    """
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        value, is_intact = found["value"], found["crc32"] == _crc32(found["value"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise DamagedError(f"{file} is missing or cannot be read ({error})") from error
    if not is_intact:
        raise DamagedError(f"{file} has changed since it was written")
    return value


def _crc32(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def temporary_folder(owner: object, prefix: str) -> Path:
    """Make a folder that is removed with its owner, or at exit, but not by a process forked off."""
    path, process = tempfile.mkdtemp(prefix=prefix), os.getpid()
    weakref.finalize(owner, lambda: os.getpid() == process and shutil.rmtree(path, True))
    return Path(path)


def make_writable(folder: Path) -> None:
    """Make a folder where it is missing, with a file `lock` that is written to.

    Raises:
        PermissionError: where that isn't allowed.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").open("ab").close()
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise PermissionError(
            error.errno,
            f"the folder must be one that can be written to, and {folder} can't ({error.strerror}). "
            "Choose another path, or only read it with mode='read'",
        ) from error
