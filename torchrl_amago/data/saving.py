"""Saving a replay buffer so that it comes back exactly, or says why not.

A folder that holds a manifest with the size and checksum of each of its files, and nothing pickled.
It is written beside its destination and moved there when complete, so a crash leaves the previous
one; it is verified as a whole before the buffer that it is loaded into is touched.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from pathlib import Path
from typing import Any, Protocol

MANIFEST = "manifest.json"
_FORMAT = "torchrl_amago replay 2"
_CHUNK = 1 << 20


class Saveable(Protocol):
    """What can be saved: a :class:`TrialReplayBuffer`, or something made of several."""

    def dumps(self, path: Path) -> None:
        """Write everything to a folder that is there."""

    def loads(self, path: Path) -> None:
        """Bring it back; raise ValueError, with nothing changed, if it doesn't fit."""


def save_replay(rb: Saveable, path: str | Path) -> None:
    """Write trials, priorities and generator of a replay buffer to a folder.

    Batches that `prefetch` has drawn ahead are not saved: with prefetch, a resumed run is right, but
    does not repeat the uninterrupted one.

    Args:
        rb: a buffer from :func:`make_trial_buffer`; of a mixture, its buffer ``online``.
        path: the folder; a replay folder that is there already is replaced as a whole.

    Raises:
        FileExistsError: where `path` is there and is something else than a replay folder.
    """
    path = Path(path)
    if path.exists() and not (path / MANIFEST).exists():
        raise FileExistsError(
            f"save_replay replaces only replay folders, and {path} has no {MANIFEST}. "
            "Choose another path, or remove it."
        )
    partial, previous = _beside(path, "partial"), _beside(path, "previous")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    rb.dumps(partial)
    files = sorted(file for file in partial.rglob("*") if file.is_file())
    manifest: dict[str, Any] = {"format": _FORMAT, "kind": type(rb).__name__}
    manifest["files"] = {
        file.relative_to(partial).as_posix(): _fingerprint(file, sync=True) for file in files
    }
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=1))
    _fingerprint(partial / MANIFEST, sync=True)
    if path.exists():
        shutil.rmtree(previous, ignore_errors=True)
        path.rename(previous)
    partial.rename(path)
    shutil.rmtree(previous, ignore_errors=True)


def load_replay(rb: Saveable, path: str | Path) -> None:
    """Bring a buffer back to what :func:`save_replay` wrote; on any error, leave it as it was.

    Args:
        rb: a buffer made with the same arguments as the saved one; its content is replaced.
        path: the folder.

    Raises:
        RuntimeError: where a file is missing, cut short or changed.
        ValueError: where the saved buffer doesn't fit this one.
    """
    path = Path(path)
    if not path.exists() and _beside(path, "previous").exists():
        path = _beside(path, "previous")  # a crash fell between save_replay's two renames
    kind = _verified_manifest(path)["kind"]
    if kind != type(rb).__name__:
        raise ValueError(
            f"a replay folder must be loaded into what it was saved from: {path} is of a {kind}, got "
            f"a {type(rb).__name__}. Make the buffer as it was made then."
        )
    rb.loads(path)


def _verified_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    remedy = "Load another checkpoint, or leave the replay folder out and collect anew."
    try:
        manifest = json.loads(file.read_text())
    except (OSError, ValueError) as error:
        raise RuntimeError(
            f"A replay folder must hold a readable {MANIFEST}; {file} is missing or damaged "
            f"({error}). {remedy}"
        ) from error
    if manifest.get("format") != _FORMAT:
        raise ValueError(
            f"{file} must be of the format {_FORMAT!r}, got {manifest.get('format')!r}. Load it with "
            "the version of torchrl_amago that wrote it."
        )
    for name, (size, checksum) in manifest["files"].items():
        part = path / name
        if not part.is_file():
            raise RuntimeError(
                f"{part} must be there, as {MANIFEST} lists it; it's missing. {remedy}"
            )
        actual = part.stat().st_size
        if actual != size:
            raise RuntimeError(f"{part} must have {size} bytes, it has {actual}. {remedy}")
        if _fingerprint(part)[1] != checksum:
            raise RuntimeError(
                f"{part} must have the checksum {checksum} that {MANIFEST} lists: its content has "
                f"changed since it was saved. {remedy}"
            )
    return manifest


def _fingerprint(file: Path, sync: bool = False) -> list[int]:
    """Size in bytes and CRC-32 of a file; with `sync`, after forcing it onto the disk."""
    size, checksum = 0, 0
    with file.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        while chunk := stream.read(_CHUNK):
            size += len(chunk)
            checksum = zlib.crc32(chunk, checksum)
    return [size, checksum]


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")
