"""Checkpoints and policies of a run: replaced in one step, verified before loading, never pickled.

A checkpoint is a folder ``<run>/checkpoints/update_0000500``::

    manifest.json    counts, settings, options, versions, size and SHA-256 of the other files
    state.npz        all tensors and numbers, but for the replay's
    replay/          the replay buffer, by its `dumps`

A policy is a file like ``state.npz``.
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tensordict
import torch
import torchrl
from torch import Tensor, nn
from torchrl.data import ReplayBuffer

from torchrl_amago import _files as files
from torchrl_amago._state_file import load_state, save_state
from torchrl_amago._validation import check_counts
from torchrl_amago.data import TrialReplayBuffer
from torchrl_amago.trainers._metadata import as_json, check_same, facts, policy_settings
from torchrl_amago.trainers.report import PROGRESS_FILE

CHECKPOINTS_FOLDER = "checkpoints"
FORMAT_VERSION = 5
_STATE, _REPLAY = "state.npz", "replay"
_NAME = re.compile(r"update_\d{7,}")


class CheckpointStore:
    """The checkpoints of one run: the ``keep`` newest that are intact.

    Only folders that the manifests list as written by the run are ever removed.
    """

    def __init__(self, run_dir: str | Path, keep: int = 2) -> None:
        check_counts("A run without a checkpoint cannot be resumed.", keep_checkpoints=keep)
        self.run_dir, self.keep = Path(run_dir), keep
        self.folder = self.run_dir / CHECKPOINTS_FOLDER

    def paths(self) -> list[Path]:
        """Return every checkpoint: unreadable ones, then the others, last written first."""
        found = [path for path in self.folder.glob("update_*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (_sequence(path), path.name), reverse=True)

    def latest(self) -> Path | None:
        """Return the checkpoint written last, or None."""
        return next(iter(self.paths()), None)

    def find(self, path: str | Path | None = None) -> Path:
        """Return the checkpoint at ``path``, or the last one of the run at ``path``."""
        path = (self.run_dir if path is None else Path(path)).absolute()
        latest = CheckpointStore(path).latest()
        if latest is not None:
            return latest
        # A damaged checkpoint may lack its manifest, and a copy may have another name.
        if path.is_dir() and (path.match("update_*") or (path / files.MANIFEST).exists()):
            return path
        raise FileNotFoundError(
            f"resuming needs a checkpoint, and {path} has none (looked for {CHECKPOINTS_FOLDER}/"
            "update_*). Pass the folder of a run that wrote one, or start anew without resuming."
        )

    def save(
        self, update: int, state: Mapping[str, Any], buffer: ReplayBuffer, about: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint, with ``about`` (JSON values) in its manifest; remove old ones."""
        final = self.folder / f"update_{update:07d}"
        manifests = [files.read_manifest(path) or {} for path in self.paths()]
        kept = {final.name, *(name for manifest in manifests for name in manifest.get("kept", ()))}
        modules = (torch, torchrl, tensordict)
        with files.replace_folder(final) as folder:
            save_state(folder / _STATE, state)
            # TorchRL's storages can't be saved before the first step is there.
            if isinstance(buffer, TrialReplayBuffer) or len(buffer):
                buffer.dumps(folder / _REPLAY)
            manifest = {
                "format_version": FORMAT_VERSION,
                "update": update,
                "sequence": 1 + max((m.get("sequence", -1) for m in manifests), default=-1),
                "kept": sorted(kept),
                **about,
                "versions": {m.__name__: m.__version__ for m in modules}
                | {"python": platform.python_version()},
            }
            files.write_manifest(folder, manifest)
        own = [path for path in self.paths() if path.name in kept and files.read_manifest(path)]
        for path in own[self.keep :]:
            files.remove_folder(path)
        return final

    @staticmethod
    def load(path: Path, state: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
        """Verify a checkpoint and return its state.

        Raises:
            DamagedError: naming the problem, and the newest other checkpoint that is intact.
            ValueError: for other parts, shapes or settings than ``state`` and ``settings`` have.
        """
        problem = _problem(path)
        if problem is not None:
            others = [other for other in CheckpointStore(path.parents[1]).paths() if other != path]
            intact = next((other for other in others if _problem(other) is None), None)
            remedy = f"The newest intact one is {intact}: resume from that path."
            if intact is None:
                remedy = "There is no other intact checkpoint in this run: start a new run."
            raise files.DamagedError(
                f"a checkpoint must be complete and unchanged, but {problem}. {remedy}"
            )
        saved, saved_settings = load_state(path / _STATE), files.read_manifest(path)["settings"]
        check_same(path, facts(saved, saved_settings), facts(state, settings))
        return saved

    @staticmethod
    def load_replay(path: Path, replay_buffer: ReplayBuffer) -> None:
        """Fill ``replay_buffer`` from a checkpoint."""
        if (path / _REPLAY).exists():
            replay_buffer.loads(path / _REPLAY)


def _problem(path: Path) -> str | None:
    """Describe the damage of a checkpoint, or return None."""
    version = (files.read_manifest(path) or {}).get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        return f"{path} has format version {version}, and this code reads {FORMAT_VERSION} only"
    return files.find_damage(path)


def _sequence(path: Path) -> float:
    return (files.read_manifest(path) or {"sequence": math.inf}).get("sequence", 0)


def check_no_existing_run(run_dir: str | Path) -> None:
    """Raise FileExistsError if the folder holds a run; change nothing."""
    for path in (Path(run_dir) / PROGRESS_FILE, *CheckpointStore(run_dir).paths()):
        if path.exists():
            name = path.relative_to(run_dir)
            raise FileExistsError(
                f"a new run needs a folder without one, but {run_dir} holds {name}. Choose another "
                "run_dir, resume that run, or delete it."
            )


class PolicyFiles:
    """A run's `policy.npz` (last checkpoint) and `best_policy.npz` (best evaluation).

    Nothing is written for a policy that isn't a module. Of equal evaluations the later one is kept.
    """

    def __init__(self, run_dir: str | Path, policy: object) -> None:
        self.last, self.best = Path(run_dir) / "policy.npz", Path(run_dir) / "best_policy.npz"
        self.policy = policy
        #: Mean return in the best evaluation so far; None before there is one.
        self.best_value: float | None = None

    def save_last(self) -> None:
        """Write the policy as it is."""
        if isinstance(self.policy, nn.Module):
            save_state(self.last, _describe_policy(self.policy))

    def save_if_best(self, evaluation: Mapping[str, float]) -> None:
        """Write the policy if no earlier evaluation had a larger mean return."""
        value = evaluation.get("eval/trial_return", math.nan)
        is_best = value >= (-math.inf if self.best_value is None else self.best_value)
        if is_best and isinstance(self.policy, nn.Module):
            save_state(self.best, _describe_policy(self.policy))
            self.best_value = value

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from that evaluation, unless its policy isn't in the run's folder."""
        self.best_value = state["best_value"] if self.best.exists() else None


def load_policy(path: str | Path, policy: nn.Module) -> nn.Module:
    """Load the weights that a run wrote into a policy; its exploration stays as it is.

    Args:
        path: `policy.npz` (written with each checkpoint) or `best_policy.npz` (written after an
            evaluation with trials or a number `trial_return`) in a run's folder.
        policy: built with the run's settings; changed in place and returned.

    Raises:
        FileNotFoundError: if there is no such file; DamagedError if it is damaged.
        ValueError: if weights or settings are another policy's. Nothing has been changed then.

    Example:
        >>> import tempfile, torch
        >>> from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> trained, other = (make_policy(env, context_length=45) for _ in range(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = PolicyFiles(folder, trained)
        ...     files.save_last()
        ...     _ = load_policy(files.last, other)
        >>> all(torch.equal(a, b) for a, b in zip(trained.parameters(), other.parameters()))
        True
    """
    path = Path(path)
    saved, current = load_state(path), _describe_policy(policy)
    check_same(path, *(facts(policy, policy.get("settings", {})) for policy in (saved, current)))
    policy.load_state_dict(saved["weights"], strict=False)
    return policy


def _describe_policy(policy: nn.Module) -> dict[str, Any]:
    """Return settings and state dict, without the counters of exploration."""
    exploration = getattr(policy, "exploration", None)
    prefixes = tuple(f"{name}." for name, module in policy.named_modules() if module is exploration)
    weights = {
        name: x
        for name, x in policy.state_dict().items()
        if isinstance(x, Tensor) and not name.startswith(prefixes)
    }
    return {"weights": weights, "settings": as_json(policy_settings(policy))}
