"""Atomic replacement of files and folders, checksums, disk space and locks.

A crash at any moment leaves the old version or the new one, a full disk raises :class:`OSError`
with the path and the sizes, and damage is found before anything is loaded.
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
_DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_READ_ONLY = (errno.EACCES, errno.EPERM, errno.EROFS)


class DamagedError(RuntimeError):
    """Files that are incomplete or have changed since they were written."""


@contextlib.contextmanager
def replace_file(path: Path, mode: str = "wb", **options: Any) -> Iterator[IO]:
    """Open a file that replaces `path` once it is complete and on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = _beside(path, _PARTIAL)
    try:
        with explain_full_disk(path), partial.open(mode, **options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


@contextlib.contextmanager
def replace_folder(path: Path, *, flush: bool = True) -> Iterator[Path]:
    """Make an empty folder that replaces `path` once it is complete; on an error it doesn't.

    Without `flush` the content survives the death of the process, but not of the machine.
    """
    path = path.resolve() if path.is_symlink() else path  # a link stays one
    partial, previous = _beside(path, _PARTIAL), _beside(path, _PREVIOUS)
    path.parent.mkdir(parents=True, exist_ok=True)
    with _turn(path.parent):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
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


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """Wait while another process or thread replaces a folder inside this one."""
    with contextlib.ExitStack() as held:
        if fcntl is not None:
            held.callback(os.close, descriptor := os.open(folder, os.O_RDONLY))
            with contextlib.suppress(OSError):  # some network file systems lock no folders
                held.enter_context(_flock(descriptor, fcntl.LOCK_EX))
        yield


@contextlib.contextmanager
def _flock(file: int | IO, kind: int) -> Iterator[None]:
    """Lock an open file until the end, although a process forked meanwhile keeps it open."""
    fcntl.flock(file, kind)
    owner = os.getpid()
    try:
        yield
    finally:
        if os.getpid() == owner:
            fcntl.flock(file, fcntl.LOCK_UN)


def remove_folder(path: Path) -> None:
    """Remove a folder so that a crash leaves no half of it under its name."""
    previous = _beside(path, _PREVIOUS)
    shutil.rmtree(previous, ignore_errors=True)
    os.replace(path, previous)
    shutil.rmtree(previous, ignore_errors=True)


def recover(folder: Path, name: str | None = None) -> None:
    """Finish or undo interrupted replacements in a folder: of one name, or by default of any.

    Call it only while no other process writes files there, such as under :func:`lock`.
    """
    name = "*" if name is None else glob.escape(name)
    with _turn(folder) if folder.is_dir() else contextlib.nullcontext():
        for previous in folder.glob(f".{name}.{_PREVIOUS}"):
            path = folder / previous.name.removeprefix(".").removesuffix(f".{_PREVIOUS}")
            # Between its two renames a replacement has neither version under the name.
            if _beside(path, _PARTIAL).exists() and not path.exists():
                os.replace(previous, path)
        for suffix in (_PARTIAL, _PREVIOUS):
            for leftover in folder.glob(f".{name}.{suffix}"):
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


def write_manifest(folder: Path, metadata: Mapping[str, Any]) -> None:
    """Write `manifest.json`: metadata (JSON values), size and SHA-256 of every file, a checksum."""
    sizes = {name: (folder / name).stat().st_size for name in _names(folder)}
    files = {x: {"bytes": size, "sha256": _sha256(folder / x)} for x, size in sizes.items()}
    text = json.dumps(_with_crc32({**metadata, "files": files}), indent=1)
    (folder / MANIFEST).write_text(text + "\n", encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return the manifest of a folder, or None if it is missing or damaged."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    is_manifest = isinstance(manifest, dict) and isinstance(manifest.get("files"), dict)
    # Manifests of other versions have no checksum; they are read for their version.
    is_intact = is_manifest and ("crc32" not in manifest or manifest == _with_crc32(manifest))
    return manifest if is_intact else None


def verify_manifest(folder: Path) -> dict[str, Any]:
    """Return the manifest of a folder, or raise DamagedError unless its files are those listed."""
    if problem := find_damage(folder):
        raise DamagedError(problem)
    return read_manifest(folder)


def find_damage(folder: Path) -> str | None:
    """Describe the first difference between a folder and its manifest, or return None."""
    manifest = read_manifest(folder)
    if manifest is None or "crc32" not in manifest:
        return f"{folder / MANIFEST} is missing or cannot be read, or has changed"
    for name, expected in manifest["files"].items():
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if (size := file.stat().st_size) != expected["bytes"]:
            return f"{file} has {size} bytes instead of {expected['bytes']}"
        if _sha256(file) != expected["sha256"]:
            return f"{file} has changed since it was written (SHA-256 differs)"
    # An unlisted file could stand in for a verified one.
    unlisted = next((name for name in _names(folder) if name not in manifest["files"]), None)
    return unlisted and f"{folder / unlisted} is not listed in {MANIFEST}"


def _names(folder: Path) -> list[str]:
    # Everything that is not a plain folder counts, dangling links included.
    found = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(folder).as_posix() for path in found} - {MANIFEST})


def _with_crc32(manifest: Mapping[str, Any]) -> dict[str, Any]:
    content = {key: value for key, value in manifest.items() if key != "crc32"}
    return {**content, "crc32": _crc32(content)}


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return digest(stream, file.stat().st_size)


def digest(stream: IO[bytes], length: int) -> str:
    """Compute the SHA-256 of the first bytes of a file, in hexadecimal."""
    stream.seek(0)
    sha256 = hashlib.sha256()
    while length > 0 and (chunk := stream.read(min(1 << 20, length))):
        sha256.update(chunk)
        length -= len(chunk)
    return sha256.hexdigest()


def reserve(file: Path, start: int, stop: int) -> None:
    """Allocate disk space for bytes `start` to `stop` of a file, which may lie past its end.

    Writing to mapped memory that has no disk space ends the process with SIGBUS.
    """
    if stop <= start:
        return
    if not hasattr(os, "posix_fallocate"):
        return check_space(file.parent, stop - start)
    with explain_full_disk(file, stop - start), file.open("ab") as stream:
        os.posix_fallocate(stream.fileno(), start, stop - start)


def check_space(folder: Path, needed: int) -> None:
    """Raise the OSError of a full disk unless so many bytes are free."""
    with explain_full_disk(folder, needed):
        if shutil.disk_usage(folder).free < needed:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextlib.contextmanager
def explain_full_disk(path: Path, needed: int | None = None) -> Iterator[None]:
    """Add path, bytes needed and free space to the error of a full disk."""
    try:
        yield
    except OSError as error:
        if error.errno in _DISK_FULL and not getattr(error, "is_explained", False):
            place = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
            need = "" if needed is None else f"{needed} bytes are needed, "
            error.strerror = (
                f"the disk must have room for {path}: {need}{shutil.disk_usage(place).free} bytes "
                "are free. Earlier content is intact. Free some space, or choose another disk"
            )
            error.is_explained = True
        raise


@contextlib.contextmanager
def lock(file: Path, *, wait: bool = True, shared: bool = False) -> Iterator[None]:
    """Hold a lock between processes, released by the death of its holder; the file stays.

    Several may hold a `shared` lock at once, for which the file must exist. With `wait=False`, it
    is a BlockingIOError if another process holds the lock.
    """
    if fcntl is None:
        yield
        return
    # Opened anew each time: a descriptor that is shared after a fork would share the lock.
    with contextlib.ExitStack() as held:
        stream = held.enter_context(open(file, "rb" if shared else "a+b", buffering=0))
        try:
            kind = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
            held.enter_context(_flock(stream, kind | (0 if wait else fcntl.LOCK_NB)))
        except BlockingIOError as error:
            stream.seek(0)
            holder = stream.read().decode().strip() or "another process"
            error.strerror = f"{file.parent} is in use by {holder}. Wait for it, or stop it"
            raise
        if not wait:
            stream.truncate(0)
            stream.write(f"process {os.getpid()} on {socket.gethostname()}\n".encode())
        yield


@contextlib.contextmanager
def folder_lock(folder: Path, *, shared: bool = False) -> Iterator[None]:
    """Hold a folder's lock in the order of asking for it: readers that share it starve no writer.

    Who shares it makes no files: without them, nobody has opened the folder for writing.
    """
    queue = folder / "queue"
    with contextlib.ExitStack() as held:
        if not shared or queue.exists():
            with lock(queue, shared=shared):  # until the lock is had
                held.enter_context(lock(folder / "lock", shared=shared))
        yield


def make_writable(folder: Path) -> None:
    """Make a folder if it is missing, with a file `lock`; OSError if that isn't allowed."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "lock").open("ab").close()
    except OSError as error:
        if error.errno in _READ_ONLY:
            error.strerror += ". Choose another folder, or only read this one with mode='read'"
        raise


def temporary_folder(owner: object, prefix: str) -> Path:
    """Make a folder that is removed with its owner, or at exit, but not by a forked process."""
    path, process = tempfile.mkdtemp(prefix=prefix), os.getpid()
    weakref.finalize(owner, lambda: os.getpid() == process and shutil.rmtree(path, True))
    return Path(path)


def write_json(file: Path, value: Any) -> None:
    """Write a JSON value beside its checksum, for :func:`read_json`."""
    text = json.dumps({"value": value, "crc32": _crc32(value)}, indent=1)
    file.write_text(text + "\n", encoding="utf-8")


def read_json(file: Path) -> Any:
    """Return the value that :func:`write_json` wrote, or raise DamagedError."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if found["crc32"] == _crc32(found["value"]):
            return found["value"]
        problem = "has changed since it was written"
    except (OSError, ValueError, KeyError, TypeError) as error:
        problem = f"is missing or cannot be read ({error})"
    raise DamagedError(f"{file} {problem}")


def _crc32(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())
