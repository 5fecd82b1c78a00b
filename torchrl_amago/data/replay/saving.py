"""Saving a replay buffer so that it comes back exactly, or says why not; nothing is pickled."""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from torchrl_amago import files

_FORMAT = "torchrl_amago replay 3"


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
        OSError: where the disk is full; the folder stays as it was.
    """
    path = Path(path)
    if path.exists() and not (path / files.MANIFEST).exists():
        raise FileExistsError(
            f"save_replay replaces only replay folders, and {path} has no {files.MANIFEST}. "
            "Choose another path, or remove it."
        )
    with files.replace_folder(path) as folder:
        rb.dumps(folder)
        files.write_manifest(folder, {"format": _FORMAT, "kind": type(rb).__name__})


def load_replay(rb: Saveable, path: str | Path) -> None:
    """Bring a buffer back to what :func:`save_replay` wrote; on any error, leave it as it was.

    Args:
        rb: a buffer made with the same arguments as the saved one; its content is replaced.
        path: the folder.

    Raises:
        DamagedError: where a file is missing, changed or not the buffer's; a :class:`RuntimeError`.
        ValueError: where the saved buffer doesn't fit this one.
    """
    path = Path(path)
    if not path.exists():
        files.recover(path.parent)  # a crash fell between save_replay's two renames
    try:
        manifest = files.verify_manifest(path)
    except files.DamagedError as error:
        raise files.DamagedError(f"{error}. Load another checkpoint, or collect anew") from error
    saved, wanted = (manifest.get("format"), manifest.get("kind")), (_FORMAT, type(rb).__name__)
    if saved != wanted:
        raise ValueError(
            f"{path} must be of the format and kind {wanted}, got {saved}. Make the buffer as it was made "
            "then, with the version of torchrl_amago that saved it."
        )
    rb.loads(path)
