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
from typing import Any

import torch
from tensordict import TensorDict
from torchrl.data import ReplayBuffer, Storage, TensorStorage
from torchrl.data.replay_buffers.checkpointers import TensorStorageCheckpointer

MANIFEST = "manifest.json"
_FORMAT = "torchrl_amago replay 1"
_CHUNK = 1 << 20


class FilledPartCheckpointer(TensorStorageCheckpointer):
    """Saves the filled part of a flat tensor storage instead of its whole capacity.

    Also checks every file's size before it is mapped: reading a mapped file that is shorter than
    its header says ends the process.
    """

    def dumps(self, storage: TensorStorage, path: str | Path) -> None:
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        filled = len(storage)
        if filled:
            storage[:filled].memmap(path / "steps", copy_existing=True)
        (path / "storage_metadata.json").write_text(json.dumps({"len": filled}))

    def loads(self, storage: TensorStorage, path: str | Path) -> None:
        path = Path(path)
        filled = json.loads((path / "storage_metadata.json").read_text())["len"]
        if filled > storage.max_size:
            raise ValueError(
                f"The saved {filled} steps must fit into the storage, whose capacity is "
                f"{storage.max_size}. Make the buffer with the capacity that it was saved with."
            )
        if filled:
            steps = _map_steps(path / "steps")
            if not storage.initialized:
                storage._init(steps[0])
            storage._storage[:filled].update_(steps)
        storage._len = filled


def save_replay(rb: ReplayBuffer, path: str | Path) -> None:
    """Write storage, cursor, table of trials and generator of a replay buffer to a folder.

    Batches that `prefetch` has drawn ahead are not saved: with prefetch, a resumed run is right, but
    does not repeat the uninterrupted one.

    Args:
        rb: a buffer over a flat tensor storage, such as :func:`make_trial_buffer` gives.
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
    # The locks that rb.sample() and rb.extend() take: nobody writes while the parts are saved.
    with rb._replay_lock, rb._write_lock:
        FilledPartCheckpointer().dumps(rb.storage, partial / "storage")
        rb.sampler.dumps(partial / "sampler")
        rb.writer.dumps(partial / "writer")
        manifest = _describe(rb)
    files = sorted(file for file in partial.rglob("*") if file.is_file())
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


def load_replay(rb: ReplayBuffer, path: str | Path) -> None:
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
    manifest = _verified_manifest(path)
    _check_fits(rb, manifest, path)
    with rb._futures_lock:
        rb._clear_prefetch_queue_locked()
        with rb._replay_lock, rb._write_lock:
            own, rb.storage.checkpointer = rb.storage.checkpointer, FilledPartCheckpointer()
            try:
                rb.storage.loads(path / "storage")
            finally:
                rb.storage.checkpointer = own
            rb.sampler.loads(path / "sampler")
            rb.writer.loads(path / "writer")
    if manifest["generator"] is not None:
        generator = torch.Generator()
        generator.set_state(
            torch.frombuffer(bytearray.fromhex(manifest["generator"]), dtype=torch.uint8)
        )
        rb.set_rng(generator)


def _describe(rb: ReplayBuffer) -> dict[str, Any]:
    generator = rb._rng
    return {
        "format": _FORMAT,
        "capacity": rb.storage.max_size,
        "length": len(rb.storage),
        "sampler": type(rb.sampler).__name__,
        "keys": _schema(rb.storage),
        "generator": None if generator is None else bytes(generator.get_state().tolist()).hex(),
    }


def _schema(storage: Storage) -> dict[str, list]:
    """Key -> [shape of one step, dtype] of an initialised storage."""
    if not storage.initialized or not len(storage):
        return {}
    steps = storage[:]
    return {
        ".".join(key if isinstance(key, tuple) else (key,)): [
            list(value.shape[1:]),
            str(value.dtype),
        ]
        for key, value in sorted(steps.items(True, True), key=str)
    }


def _check_fits(rb: ReplayBuffer, manifest: dict[str, Any], path: Path) -> None:
    if manifest["capacity"] != rb.storage.max_size:
        raise ValueError(
            f"A replay folder must be loaded into a buffer of the same capacity: {path} was saved "
            f"with {manifest['capacity']} steps, this buffer has {rb.storage.max_size}. Make the "
            "buffer with the saved capacity."
        )
    if manifest["sampler"] != type(rb.sampler).__name__:
        raise ValueError(
            f"A replay folder must be loaded into a buffer with the same sampler: {path} was saved "
            f"with {manifest['sampler']}, this buffer has {type(rb.sampler).__name__}. Make the "
            "buffer with the saved one."
        )
    here = _schema(rb.storage)
    if here and manifest["keys"] and here != manifest["keys"]:
        saved = manifest["keys"]
        differing = sorted(
            key for key in here.keys() | saved.keys() if here.get(key) != saved.get(key)
        )
        detail = "; ".join(
            f"{key}: saved {saved.get(key, 'nothing')}, here {here.get(key, 'nothing')}"
            for key in differing
        )
        raise ValueError(
            f"The steps in {path} must have the keys, shapes and dtypes of the buffer's, and differ "
            f"in {detail}. Use the environment and policy they were collected with, or a new buffer."
        )


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


def _map_steps(path: Path) -> TensorDict:
    """The saved steps, memory-mapped, once every file is known to be as long as its header says."""
    for meta in path.rglob("meta.json"):
        for name, leaf in json.loads(meta.read_text()).items():
            if not isinstance(leaf, dict) or "dtype" not in leaf:
                continue  # a nested tensordict has a folder and a header of its own
            file = meta.parent / f"{name}.memmap"
            item = getattr(torch, leaf["dtype"].removeprefix("torch.")).itemsize
            expected = torch.Size(leaf["shape"]).numel() * item
            actual = file.stat().st_size if file.is_file() else 0
            if actual < expected:
                raise RuntimeError(
                    f"{file} must have {expected} bytes, it has {actual}: the folder is incomplete. "
                    "Load another checkpoint, or collect anew."
                )
    return TensorDict.load_memmap(path)


def _beside(path: Path, suffix: str) -> Path:
    return path.with_name(f".{path.name}.{suffix}")
