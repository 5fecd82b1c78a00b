"""Checkpoints: written beside their place and renamed into it, verified before anything is loaded.

A checkpoint is a folder ``<run>/checkpoints/update_0000500``::

    manifest.json    format, update, architecture, versions, size and SHA-256 of every other file
    state/           every tensor and number but the replay's, as one tensordict file and JSON
    replay/          the replay buffer (see torchrl_amago.data.save_replay)

Nothing in it is pickled.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensordict
import torch
import torchrl
from torchrl.checkpoint import StateDictCheckpointAdapter
from torchrl.data import ReplayBuffer

from torchrl_amago.data import load_replay, save_replay
from torchrl_amago.trainers.logging import PROGRESS_FILE

CHECKPOINTS_FOLDER = "checkpoints"
MANIFEST = "manifest.json"
FORMAT_VERSION = 2
_CHUNK = 1 << 20


class _StateHolder:
    """Lets a plain nested dict pass through TorchRL's state-dict adapter."""

    def __init__(self, state: dict[str, Any] | None = None) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return self.state

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = state


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        run_dir: the run's folder.
        keep: how many intact checkpoints to keep, newest first.

    Raises:
        ValueError: if ``keep`` is smaller than 1.

    Example:
        >>> import tempfile
        >>> from torchrl_amago.data import make_trial_buffer
        >>> rb = make_trial_buffer(capacity=10, slice_length=2, batch_size=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = CheckpointStore(folder)
        ...     path = store.save(500, {"x": torch.ones(2)}, rb, {"net.weight": "2 float32"})
        ...     path.name, store.load(path, {"net.weight": "2 float32"})
        ('update_0000500', {'x': tensor([1., 1.])})
    """

    def __init__(self, run_dir: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(
                f"keep_checkpoints must be at least 1, got {keep}. A run without one cannot be "
                "resumed; use checkpoint_interval to write them less often."
            )
        self.run_dir, self.keep = Path(run_dir), keep
        self.folder = self.run_dir / CHECKPOINTS_FOLDER

    # -- finding -------------------------------------------------------------------------------

    def paths(self) -> list[Path]:
        """Every checkpoint, intact or not, last written first.

        One whose manifest cannot be read comes first: only a person can say what it was.
        """
        found = [path for path in self.folder.glob("update_*") if path.is_dir()]
        return sorted(found, key=lambda path: (_sequence(path), path.name), reverse=True)

    def latest(self) -> Path | None:
        """The checkpoint written last, or None."""
        return next(iter(self.paths()), None)

    def find(self, path: str | Path | None = None) -> Path:
        """The checkpoint meant by ``path``: one itself, or the last one of a run's folder.

        Raises:
            FileNotFoundError: if there is none.
        """
        path = self.run_dir if path is None else Path(path)
        latest = CheckpointStore(path).latest()
        if latest is not None:
            return latest
        # A damaged checkpoint is known by its place; a run may lie in a folder of that name, too.
        has_its_place = path.parent.name == CHECKPOINTS_FOLDER and path.match("update_*")
        if path.is_dir() and (has_its_place or (path / MANIFEST).exists()):
            return path
        raise FileNotFoundError(
            f"resuming needs a checkpoint, and {path} has none (looked for "
            f"{CHECKPOINTS_FOLDER}/update_*). Pass the folder of a run that wrote one, or start "
            "anew without resuming."
        )

    # -- writing -------------------------------------------------------------------------------

    def save(
        self,
        update: int,
        state: dict[str, Any],
        replay_buffer: ReplayBuffer,
        architecture: Mapping[str, str],
        frames: int = 0,
    ) -> Path:
        """Write a checkpoint; it appears under its name only when complete and on the disk.

        Args:
            update: number of updates done; names the folder.
            state: nested dict of tensors and plain values.
            replay_buffer: saved by :func:`~torchrl_amago.data.save_replay`.
            architecture: see :func:`~torchrl_amago.trainers.describe_architecture`.
            frames: environment steps collected so far.
        """
        self.folder.mkdir(parents=True, exist_ok=True)
        final = self.folder / f"update_{update:07d}"
        stage, previous = _beside(final, "partial"), _beside(final, "previous")
        for leftover in (*self.folder.glob(".*.partial"), *self.folder.glob(".*.previous")):
            shutil.rmtree(leftover, ignore_errors=True)
        stage.mkdir()
        adapter = StateDictCheckpointAdapter(payload_format="consolidated")
        adapter.save(_StateHolder(state), stage / "state", args=(), kwargs={})
        save_replay(replay_buffer, stage / "replay")
        self._write_manifest(stage, {"update": update, "frames": frames}, architecture)
        if final.exists():
            os.replace(final, previous)
        os.replace(stage, final)
        _sync(self.folder)
        shutil.rmtree(previous, ignore_errors=True)
        self._rotate()
        return final

    def _write_manifest(
        self, stage: Path, counts: dict[str, int], architecture: Mapping[str, str]
    ) -> None:
        files = sorted(file for file in stage.rglob("*") if file.is_file())
        text = json.dumps(architecture, sort_keys=True)
        manifest = {
            "format_version": FORMAT_VERSION,
            "sequence": 1 + max((_sequence(path, damaged=-1) for path in self.paths()), default=-1),
            **counts,
            "architecture": dict(architecture),
            "architecture_sha256": hashlib.sha256(text.encode()).hexdigest(),
            "versions": {
                "python": platform.python_version(),
                "torch": torch.__version__,
                "torchrl": torchrl.__version__,
                "tensordict": tensordict.__version__,
            },
            "files": {
                file.relative_to(stage).as_posix(): {
                    "bytes": file.stat().st_size,
                    "sha256": _sha256(file, sync=True),
                }
                for file in files
            },
        }
        target = stage / MANIFEST
        target.write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")
        _sync(target)
        for folder in [*(path for path in stage.rglob("*") if path.is_dir()), stage]:
            _sync(folder)

    def _rotate(self) -> None:
        readable = [path for path in self.paths() if _read_manifest(path) is not None]
        for path in readable[self.keep :]:
            doomed = _beside(path, "previous")
            os.replace(path, doomed)  # a crash in the deletion must not leave half a checkpoint
            shutil.rmtree(doomed, ignore_errors=True)

    # -- reading -------------------------------------------------------------------------------

    def verify(self, path: Path) -> dict[str, Any]:
        """Check every file of a checkpoint and give its manifest.

        Raises:
            RuntimeError: naming the first file that is missing, cut short or changed, and the
                newest older checkpoint that is intact.
        """
        problem = _problem(path)
        if problem is None:
            return _read_manifest(path)
        others = [other for other in CheckpointStore(path.parent.parent).paths() if other != path]
        intact = next((other for other in others if _problem(other) is None), None)
        remedy = (
            "There is no other intact checkpoint in this run: start anew in another run_dir."
            if intact is None
            else f"The newest intact one is {intact}: resume from that path."
        )
        raise RuntimeError(f"a checkpoint must be complete and unchanged, but {problem}. {remedy}")

    def load(self, path: Path, architecture: Mapping[str, str]) -> dict[str, Any]:
        """Verify a checkpoint, compare its architecture and read its state; nothing is changed.

        Args:
            path: the checkpoint.
            architecture: that of the run it is for.

        Raises:
            RuntimeError: for a damaged checkpoint, see :meth:`verify`.
            ValueError: for one of another architecture or format.
        """
        manifest = self.verify(path)
        _check_architecture(manifest["architecture"], architecture, path)
        holder = _StateHolder()
        StateDictCheckpointAdapter().load(
            holder,
            path / "state",
            map_location="cpu",
            tensor_load_kwargs={},
            args=(),
            kwargs={},
        )
        return holder.state

    @staticmethod
    def load_replay(path: Path, replay_buffer: ReplayBuffer) -> None:
        """Fill ``replay_buffer`` from a checkpoint."""
        load_replay(replay_buffer, path / "replay")


def refuse_existing_run(run_dir: str | Path) -> None:
    """Raise FileExistsError if the folder holds a run; nothing is touched.

    Call it before expensive set-up; :meth:`AMAGOTrainer.train` does so in any case.
    """
    run_dir = Path(run_dir)
    for name in (PROGRESS_FILE, CHECKPOINTS_FOLDER):
        if (run_dir / name).exists():
            raise FileExistsError(
                f"a new run needs a folder without one, but {run_dir} holds {name}. Choose another "
                "run_dir, resume that run, or delete the folder."
            )


def _problem(path: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    manifest = _read_manifest(path)
    if manifest is None:
        return f"{path / MANIFEST} is missing or cannot be read"
    if manifest.get("format_version") != FORMAT_VERSION:
        return (
            f"{path / MANIFEST} has format version {manifest.get('format_version')}, and this "
            f"code reads {FORMAT_VERSION} only"
        )
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file():
            return f"{file} is missing"
        size = file.stat().st_size
        if size != expected["bytes"]:
            return f"{file} has {size} bytes instead of {expected['bytes']}"
        if _sha256(file) != expected["sha256"]:
            return f"{file} has changed since it was written (SHA-256 differs)"
    return None


def differing_entries(saved: Mapping[str, object], here: Mapping[str, object]) -> list[str]:
    """Names that only one of two descriptions has, or that they describe differently.

    Example:
        >>> differing_entries({"a": 1, "b": 2}, {"a": 1, "c": 2})
        ['b', 'c']
    """
    names = [*saved, *(name for name in here if name not in saved)]
    return [name for name in names if saved.get(name) != here.get(name)]


def _check_architecture(saved: dict[str, str], here: Mapping[str, str], path: Path) -> None:
    differing = differing_entries(saved, here)
    if not differing:
        return
    shown = "; ".join(
        f"{name}: {saved.get(name, 'absent')} in the checkpoint, {here.get(name, 'absent')} here"
        for name in differing[:3]
    )
    raise ValueError(
        f"a checkpoint can only be loaded into the architecture it was saved from; {path} differs "
        f"in {len(differing)} entries: {shown}. Build policy, critic, loss and optimizer with the "
        "arguments of that run, or start anew in another run_dir."
    )


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return manifest if isinstance(manifest, dict) and "files" in manifest else None


def _sequence(path: Path, damaged: float = float("inf")) -> float:
    manifest = _read_manifest(path)
    return damaged if manifest is None else manifest.get("sequence", 0)


def _sha256(file: Path, sync: bool = False) -> str:
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        while chunk := stream.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()


def _sync(path: Path) -> None:
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
