"""Checkpoints and policies of a run: replaced in one step, verified before anything is loaded.

A checkpoint is a folder ``<run>/checkpoints/update_0000500``::

    manifest.json    counts, architecture, settings, versions, size and SHA-256 of the other files
    state.npz        every tensor and number but the replay's
    replay/          the replay buffer (see torchrl_amago.data.save_replay)

A policy is a file like ``state.npz``. Nothing is pickled.
"""

from __future__ import annotations

import json
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
from torch.optim import Optimizer
from torchrl.data import ReplayBuffer

from torchrl_amago import _files as files
from torchrl_amago._state_file import load_state, save_state
from torchrl_amago._validation import check_counts
from torchrl_amago.data import TrialReplayBuffer, load_replay, save_replay
from torchrl_amago.trainers.report import PROGRESS_FILE

CHECKPOINTS_FOLDER, LAST, BEST = "checkpoints", "policy.npz", "best_policy.npz"
FORMAT_VERSION = 4
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
        """Every checkpoint, last written first; those whose manifest cannot be read come before."""
        found = [path for path in self.folder.glob("update_*") if _NAME.fullmatch(path.name)]
        return sorted(found, key=lambda path: (_sequence(path), path.name), reverse=True)

    def latest(self) -> Path | None:
        """The checkpoint written last, or None."""
        return next(iter(self.paths()), None)

    def find(self, path: str | Path | None = None) -> Path:
        """Return the checkpoint at ``path``: itself, or the last one of a run's folder."""
        path = (self.run_dir if path is None else Path(path)).absolute()
        latest = CheckpointStore(path).latest()
        if latest is not None:
            return latest
        # A damaged checkpoint is known by its place; a run may lie in a folder of that name, too.
        has_its_place = path.parent.name == CHECKPOINTS_FOLDER and path.match("update_*")
        if path.is_dir() and (has_its_place or (path / files.MANIFEST).exists()):
            return path
        raise FileNotFoundError(
            f"resuming needs a checkpoint, and {path} has none (looked for {CHECKPOINTS_FOLDER}/"
            "update_*). Pass the folder of a run that wrote one, or start anew without resuming."
        )

    def save(
        self, update: int, state: Mapping[str, Any], buffer: ReplayBuffer, facts: Mapping[str, Any]
    ) -> Path:
        """Write a checkpoint; ``facts`` are JSON values for the manifest, which :meth:`load` compares."""
        final = self.folder / f"update_{update:07d}"
        manifests = [files.read_manifest(path) or {} for path in self.paths()]
        kept = {final.name, *(name for manifest in manifests for name in manifest.get("kept", ()))}
        modules = (torch, torchrl, tensordict)
        with files.replace_folder(final) as folder:
            save_state(folder / _STATE, state)
            # TorchRL's storages can't be saved before the first step is there.
            if isinstance(buffer, TrialReplayBuffer) or len(buffer):
                save_replay(buffer, folder / _REPLAY)
            facts = {
                "format_version": FORMAT_VERSION,
                "update": update,
                "sequence": 1 + max((m.get("sequence", -1) for m in manifests), default=-1),
                "kept": sorted(kept),
                **facts,
                "versions": {m.__name__: m.__version__ for m in modules}
                | {"python": platform.python_version()},
            }
            files.write_manifest(folder, facts)
        own = [path for path in self.paths() if path.name in kept and files.read_manifest(path)]
        for path in own[self.keep :]:
            files.remove_folder(path)
        return final

    def load(self, path: Path, facts: Mapping[str, Any]) -> dict[str, Any]:
        """Verify a checkpoint, compare its facts and read its state; nothing is changed.

        Raises:
            DamagedError: naming what is wrong, and the newest other checkpoint that is intact.
            ValueError: for a checkpoint of another architecture, or with other settings.
        """
        problem = _problem(path)
        if problem is not None:
            others = [
                other for other in CheckpointStore(path.parent.parent).paths() if other != path
            ]
            intact = next((other for other in others if _problem(other) is None), None)
            remedy = (
                "There is no other intact checkpoint in this run: start anew in another run_dir."
                if intact is None
                else f"The newest intact one is {intact}: resume from that path."
            )
            raise files.DamagedError(
                f"a checkpoint must be complete and unchanged, but {problem}. {remedy}"
            )
        manifest = files.read_manifest(path)
        for kind in ("architecture", "settings"):
            _check_same(kind, path, manifest.get(kind, {}), as_json(facts.get(kind, {})))
        return load_state(path / _STATE)

    @staticmethod
    def load_replay(path: Path, replay_buffer: ReplayBuffer) -> None:
        """Fill ``replay_buffer`` from a checkpoint."""
        if (path / _REPLAY).exists():
            load_replay(replay_buffer, path / _REPLAY)


def _problem(path: Path) -> str | None:
    """Return what is wrong with a checkpoint, or None."""
    version = (files.read_manifest(path) or {}).get("format_version", FORMAT_VERSION)
    if version != FORMAT_VERSION:
        return f"{path} has format version {version}, and this code reads {FORMAT_VERSION} only"
    try:
        files.verify_manifest(path)
    except files.DamagedError as error:
        return str(error)
    return None


def _sequence(path: Path) -> float:
    manifest = files.read_manifest(path)
    return math.inf if manifest is None else manifest.get("sequence", 0)


def check_no_existing_run(run_dir: str | Path) -> None:
    """Raise FileExistsError if the folder holds a run; nothing is touched."""
    for path in (Path(run_dir) / PROGRESS_FILE, *CheckpointStore(run_dir).paths()):
        if path.exists():
            raise FileExistsError(
                f"a new run needs a folder without one, but {run_dir} holds "
                f"{path.relative_to(run_dir)}. Choose another run_dir, resume that run, or delete it."
            )


# -- policies --------------------------------------------------------------------------------------


class PolicyFiles:
    """A run's policy: `policy.npz` of the last checkpoint, `best_policy.npz` of the best evaluation.

    Nothing is written for a policy that isn't a module. Of equal evaluations the later one is kept.
    """

    def __init__(self, run_dir: str | Path, policy: object) -> None:
        self.last, self.best = Path(run_dir) / LAST, Path(run_dir) / BEST
        self.policy = policy
        #: Mean return in the best evaluation so far; None before there is one.
        self.best_value: float | None = None

    def save_last(self) -> None:
        """Write the policy as it is."""
        if isinstance(self.policy, nn.Module):
            save_state(self.last, _describe_policy(self.policy))

    def offer(self, evaluation: Mapping[str, float]) -> None:
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
    """Give a policy the weights that a run wrote; its exploration stays as it is.

    Args:
        path: `policy.npz` or `best_policy.npz` in a run's folder.
        policy: built with the run's settings; changed in place and returned.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedError: if it is not as it was written.
        ValueError: if weights or settings are another policy's. Nothing has been changed then.

    Example:
        >>> import tempfile
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
    if not path.exists():
        raise FileNotFoundError(
            f"there is no policy at {path}. A run writes {LAST} with each checkpoint, and {BEST} when "
            "its evaluator gives trials or a number 'trial_return'."
        )
    saved, own = load_state(path), _describe_policy(policy)
    if not (isinstance(saved, dict) and saved.keys() == own.keys()):
        raise files.DamagedError(f"{path} must hold a policy, and holds another state.")
    _check_same("settings", path, saved["settings"], own["settings"])
    _check_same("weights", path, _shapes(saved["weights"]), _shapes(own["weights"]))
    policy.load_state_dict(saved["weights"], strict=False)
    return policy


def _describe_policy(policy: nn.Module) -> dict[str, Any]:
    """Settings, and the state dict without what exploration counts."""
    exploration = getattr(policy, "exploration", None)
    prefixes = tuple(f"{name}." for name, module in policy.named_modules() if module is exploration)
    weights = {
        name: x
        for name, x in policy.state_dict().items()
        if isinstance(x, Tensor) and not name.startswith(prefixes)
    }
    return {"weights": weights, "settings": as_json(policy_settings(policy))}


def policy_settings(policy: object) -> dict[str, Any]:
    """Return the settings of a policy that decide how it acts, without those of its exploration."""
    settings = getattr(policy, "settings", {})
    return {k: value for k, value in settings.items() if k.partition(".")[0] != "exploration"}


# -- comparing -------------------------------------------------------------------------------------


def describe_architecture(
    modules: Mapping[str, nn.Module], optimizer: Optimizer | None = None
) -> dict[str, str]:
    """Shape and dtype of every parameter and buffer, and the size of every parameter group."""
    described = {
        f"{prefix}.{name}": f"{shape} {str(module.state_dict()[name].dtype)[6:]}"
        for prefix, module in modules.items()
        for name, shape in _shapes(module.state_dict()).items()
    }
    groups = [] if optimizer is None else optimizer.param_groups
    for number, group in enumerate(groups):
        described[f"optimizer.group_{number}"] = f"{len(group['params'])} parameters"
    return described


def _shapes(state: Mapping[str, Any]) -> dict[str, str]:
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    return {name: "x".join(map(str, x.shape)) or "scalar" for name, x in tensors.items()}


def as_json(values: Any) -> Any:
    """Return values as they come back from a JSON file: tuples as lists, other objects as text."""
    return json.loads(json.dumps(values, default=str))


def differences(
    saved: Mapping[str, object], here: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """Map each name whose values differ to both of them, ``"absent"`` where there is none."""
    pairs = {
        name: (saved.get(name, "absent"), here.get(name, "absent")) for name in {**saved, **here}
    }
    return {name: (there, own) for name, (there, own) in pairs.items() if there != own}


def _check_same(
    kind: str, path: Path, saved: Mapping[str, object], here: Mapping[str, object]
) -> None:
    differing = differences(saved, here)
    if differing:
        shown = [f"{name}: {there} there, {own} here" for name, (there, own) in differing.items()]
        raise ValueError(
            f"the {kind} saved in {path} must be those of what loads it, but differ in "
            f"{len(differing)} entries: {'; '.join(shown[:3])}. Build environment, policy, loss and "
            "optimizer with the arguments of that run, or start anew in another run_dir."
        )
