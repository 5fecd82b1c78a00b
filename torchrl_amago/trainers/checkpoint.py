"""Checkpoints of a run: replaced in one step, verified before anything is loaded.

A checkpoint is a folder ``<run>/checkpoints/update_0000500``::

    manifest.json    counts, architecture, settings, versions, size and SHA-256 of the other files
    state.npz        every tensor and number but the replay's
    replay/          the replay buffer (see torchrl_amago.data.save_replay)

Nothing in it is pickled.
"""

from __future__ import annotations

import json
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensordict
import torch
import torchrl
from torch import nn
from torch.optim import Optimizer
from torchrl.data import ReplayBuffer

from torchrl_amago import files
from torchrl_amago.data import TrialReplayBuffer, load_replay, save_replay
from torchrl_amago.state_file import load_state, save_state
from torchrl_amago.trainers.progress import PROGRESS_FILE

CHECKPOINTS_FOLDER = "checkpoints"
FORMAT_VERSION = 3
_STATE, _REPLAY = "state.npz", "replay"
_NAME = re.compile(r"update_\d{7,}")


class CheckpointStore:
    """The checkpoints of one run.

    Args:
        run_dir: the run's folder.
        keep: number of intact checkpoints to keep, newest first. Only folders that the manifests
            list as written by the run are ever removed.

    Example:
        >>> import tempfile
        >>> from torchrl_amago.data import make_trial_buffer
        >>> rb = make_trial_buffer(capacity=10, slice_length=2, batch_size=1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     store = CheckpointStore(folder)
        ...     path = store.save(500, {"x": torch.ones(2)}, rb, {"settings": {"tau": 0.1}})
        ...     path.name, store.load(path, {"settings": {"tau": 0.1}})
        ('update_0000500', {'x': tensor([1., 1.])})
    """

    def __init__(self, run_dir: str | Path, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(
                f"keep_checkpoints must be at least 1, got {keep}. A run without one cannot be "
                "resumed; use a larger checkpoint interval to write them less often."
            )
        self.run_dir, self.keep = Path(run_dir), keep
        self.folder = self.run_dir / CHECKPOINTS_FOLDER

    # -- finding -------------------------------------------------------------------------------

    def paths(self) -> list[Path]:
        """Every checkpoint, last written first; those whose manifest cannot be read come before."""
        found = [path for path in self.folder.glob("update_*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (_sequence(path), path.name), reverse=True)

    def latest(self) -> Path | None:
        """The checkpoint written last, or None."""
        return next(iter(self.paths()), None)

    def find(self, path: str | Path | None = None) -> Path:
        """Return the checkpoint at ``path``: itself, or the last one of a run's folder."""
        path = self.run_dir if path is None else Path(path)
        latest = CheckpointStore(path).latest()
        if latest is not None:
            return latest
        # A damaged checkpoint is known by its place; a run may lie in a folder of that name, too.
        has_its_place = path.parent.name == CHECKPOINTS_FOLDER and path.match("update_*")
        if path.is_dir() and (has_its_place or (path / files.MANIFEST).exists()):
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
        state: Mapping[str, Any],
        replay_buffer: ReplayBuffer,
        facts: Mapping[str, Any],
    ) -> Path:
        """Write a checkpoint; it appears under its name only when complete and on the disk.

        Args:
            update: number of updates done; names the folder.
            state: see :func:`~torchrl_amago.state_file.save_state`.
            replay_buffer: see :func:`~torchrl_amago.data.save_replay`.
            facts: JSON values for the manifest; :meth:`load` compares ``"architecture"`` and
                ``"settings"``.
        """
        final = self.folder / f"update_{update:07d}"
        manifests = [files.read_manifest(path) or {} for path in self.paths()]
        kept = {name for manifest in manifests for name in manifest.get("kept", ())}
        with files.replace_folder(final) as folder:
            save_state(folder / _STATE, state)
            # TorchRL's storages can't be saved before the first step is there.
            if isinstance(replay_buffer, TrialReplayBuffer) or len(replay_buffer):
                save_replay(replay_buffer, folder / _REPLAY)
            facts = {
                "format_version": FORMAT_VERSION,
                "update": update,
                "sequence": 1 + max((m.get("sequence", -1) for m in manifests), default=-1),
                "kept": sorted({*kept, final.name}),
                **facts,
                "versions": {
                    "python": platform.python_version(),
                    **{module.__name__: module.__version__ for module in (torch, torchrl, tensordict)},
                },
            }  # fmt: skip
            files.write_manifest(folder, facts)
        own = [path for path in self.paths() if path.name in facts["kept"]]
        for path in [path for path in own if files.read_manifest(path) is not None][self.keep :]:
            files.remove_folder(path)
        return final

    # -- reading -------------------------------------------------------------------------------

    def verify(self, path: Path) -> dict[str, Any]:
        """Check every file of a checkpoint and return its manifest.

        Raises:
            DamagedError: naming what is wrong, and the newest other checkpoint that is intact.
        """
        problem = _problem(path)
        if problem is None:
            return files.read_manifest(path)
        others = [other for other in CheckpointStore(path.parent.parent).paths() if other != path]
        intact = next((other for other in others if _problem(other) is None), None)
        remedy = (
            "There is no other intact checkpoint in this run: start anew in another run_dir."
            if intact is None
            else f"The newest intact one is {intact}: resume from that path."
        )
        raise files.DamagedError(
            f"a checkpoint must be complete and unchanged, but {problem}. {remedy}"
        )

    def load(self, path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Verify a checkpoint, compare its facts and read its state; nothing is changed.

        Raises:
            DamagedError: for a damaged checkpoint.
            ValueError: for one of another architecture, or with other settings.
        """
        manifest = self.verify(path)
        for kind in ("architecture", "settings"):
            saved, here = manifest.get(kind, {}), as_json(facts.get(kind, {}))
            if saved != here:
                raise ValueError(
                    f"a checkpoint can only be loaded into the {kind} it was saved from; {path} "
                    f"differs in {show_differences(saved, here, 'in the checkpoint')}. Build "
                    "environment, policy, critic, loss and optimizer with the arguments of that "
                    "run, or start anew in another run_dir."
                )
        return load_state(path / _STATE)

    @staticmethod
    def load_replay(path: Path, replay_buffer: ReplayBuffer) -> None:
        """Fill ``replay_buffer`` from a checkpoint."""
        if (path / _REPLAY).exists():
            load_replay(replay_buffer, path / _REPLAY)


def refuse_existing_run(run_dir: str | Path) -> None:
    """Raise FileExistsError if the folder holds a run; nothing is touched."""
    run_dir = Path(run_dir)
    latest = CheckpointStore(run_dir).latest()
    for path in (run_dir / PROGRESS_FILE, latest or run_dir / CHECKPOINTS_FOLDER / "none"):
        if path.exists():
            name = path.relative_to(run_dir)
            raise FileExistsError(
                f"a new run needs a folder without one, but {run_dir} holds {name}. Choose another "
                "run_dir, resume that run, or delete the folder."
            )


def describe_architecture(
    modules: Mapping[str, nn.Module], optimizer: Optimizer | None = None
) -> dict[str, str]:
    """Shape and dtype of every parameter and buffer, and the size of every parameter group.

    Example:
        >>> describe_architecture({"net": nn.Linear(2, 1, bias=False)})
        {'net.weight': '1x2 float32'}
    """
    described = {
        f"{prefix}.{name}": f"{'x'.join(map(str, x.shape)) or 'scalar'} {str(x.dtype)[6:]}"
        for prefix, module in modules.items()
        for name, x in module.state_dict().items()
        if isinstance(x, torch.Tensor)
    }
    groups = [] if optimizer is None else optimizer.param_groups
    for number, group in enumerate(groups):
        described[f"optimizer.group_{number}"] = f"{len(group['params'])} parameters"
    return described


def as_json(values: Any) -> Any:
    """Return values as they come back from a JSON file: tuples as lists, other objects as text."""
    return json.loads(json.dumps(values, default=str))


def differing_entries(saved: Mapping[str, object], here: Mapping[str, object]) -> list[str]:
    """Names that only one of two mappings has, or that they map to different values.

    Example:
        >>> differing_entries({"a": 1, "b": 2}, {"a": 1, "c": 2})
        ['b', 'c']
    """
    names = [*saved, *(name for name in here if name not in saved)]
    return [name for name in names if saved.get(name, "absent") != here.get(name, "absent")]


def show_differences(saved: Mapping[str, object], here: Mapping[str, object], where: str) -> str:
    """Describe the first few entries in which a saved mapping differs from the one here."""
    differing = differing_entries(saved, here)
    shown = "; ".join(
        f"{name}: {saved.get(name, 'absent')} {where}, {here.get(name, 'absent')} here"
        for name in differing[:3]
    )
    return f"{len(differing)} entries: {shown}"


def _problem(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    version = (files.read_manifest(path) or {}).get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        return (
            f"{path / files.MANIFEST} has format version {version}, and this code reads "
            f"{FORMAT_VERSION} only"
        )
    try:
        files.verify_manifest(path)
    except files.DamagedError as error:
        return str(error)
    return None


def _sequence(path: Path) -> float:
    manifest = files.read_manifest(path)
    return float("inf") if manifest is None else manifest.get("sequence", 0)
