"""Checkpoints and policies of a run: replaced in one step, verified before loading, never pickled.

A checkpoint is a folder ``<run>/checkpoints/update_0000500``::

    manifest.json    counts, settings, options, versions, size and SHA-256 of the other files
    state.npz        all tensors and numbers, but for the replay's
    replay/          the replay buffer, by its `dumps`, with a manifest of its own
"""

from __future__ import annotations

import math
import platform
import re
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from torch import nn
from torchrl.data import ReplayBuffer

from torchrl_amago import _files as files
from torchrl_amago._facts import as_json, check_same, facts, policy_settings
from torchrl_amago._state_file import load_state, save_state
from torchrl_amago._validation import check_counts
from torchrl_amago.modules.weights import save_policy
from torchrl_amago.progress import PROGRESS_FILE

CHECKPOINTS_FOLDER = "checkpoints"
FORMAT_VERSION = 6
STATE, REPLAY = "state.npz", "replay"
SAMPLING = ("slice_length", "crop", "sample_by", "padding", "min_trials", "alpha", "beta")
Values = Mapping[str, Any]
_NAME = "update_{:07d}"


class CheckpointStore:
    """The checkpoints of one run: the ``keep`` newest; copies under other names stay."""

    def __init__(self, run_dir: str | Path, keep: int = 2) -> None:
        check_counts("A run without a checkpoint cannot be resumed.", keep_checkpoints=keep)
        self.run_dir, self.keep = Path(run_dir), keep
        self.folder = self.run_dir / CHECKPOINTS_FOLDER

    def paths(self) -> list[Path]:
        """Return every checkpoint: unreadable ones, then the others, last written first."""
        found = [p for p in self.folder.glob("update_*") if re.fullmatch(r"\d{7,}", p.name[7:])]
        return sorted(found, key=lambda path: (_sequence(path), path.name), reverse=True)

    def latest(self) -> Path | None:
        return next(iter(self.paths()), None)

    def find(self, path: str | Path | None = None) -> Path:
        """Return the checkpoint at ``path``, or the last one of the run at ``path``."""
        path = (self.run_dir if path is None else Path(path)).absolute()
        if latest := CheckpointStore(path).latest():
            return latest
        # A damaged checkpoint may lack its manifest, and a copy may have another name.
        if path.is_dir() and (path.match("update_*") or (path / files.MANIFEST).exists()):
            return path
        raise FileNotFoundError(
            f"resuming needs a checkpoint, and {path} has none (looked for {CHECKPOINTS_FOLDER}/"
            "update_*). Pass the folder of a run that wrote one, or start anew without resuming."
        )

    def save(self, update: int, state: Values, buffer: ReplayBuffer | None, about: Values) -> Path:
        """Write a checkpoint, with ``about`` (JSON values) in its manifest; remove old ones."""
        final = self.folder / _NAME.format(update)
        numbers = [number for number in map(_sequence, self.paths()) if number < math.inf]
        sequence = 1 + max(numbers, default=-1)
        with files.replace_folder(final) as folder:
            save_state(folder / STATE, state)
            # TorchRL's storages can't be saved before the first step is there.
            if buffer is not None and (hasattr(buffer.storage, "trials") or len(buffer)):
                buffer.dumps(folder / REPLAY)
            numbers = {"format_version": FORMAT_VERSION, "update": update, "sequence": sequence}
            versions = {name: version(name) for name in ("torch", "torchrl", "tensordict")}
            versions["python"] = platform.python_version()
            files.write_manifest(folder, {**numbers, **about, "versions": versions})
        for path in [path for path in self.paths() if _is_own(path)][self.keep :]:
            files.remove_folder(path)
        return final

    @staticmethod
    def load(path: Path, state: Values, settings: Values) -> dict[str, Any]:
        """Verify a checkpoint and return its state.

        Raises:
            DamagedError: naming the problem, and the newest other checkpoint that is intact.
            ValueError: for other parts, shapes or settings than ``state`` and ``settings`` have.
        """
        if problem := _problem(path):
            remedy = "There is no other intact checkpoint in this run: start a new run."
            others = CheckpointStore(path.parents[1]).paths()
            if intact := next((other for other in others if not _problem(other)), None):
                remedy = f"The newest intact one is {intact}: resume from that path."
            raise files.DamagedError(
                f"a checkpoint must be complete and unchanged, but {problem}. {remedy}"
            )
        saved, saved_settings = load_state(path / STATE), files.read_manifest(path)["settings"]
        check_same(path, facts(saved, saved_settings), facts(state, settings))
        return saved


def _problem(path: Path) -> str | None:
    saved = (files.read_manifest(path) or {}).get("format_version", FORMAT_VERSION)
    if saved != FORMAT_VERSION:
        return f"{path} has format version {saved}, and this code reads {FORMAT_VERSION} only"
    return files.find_damage(path)


def _sequence(path: Path) -> float:
    return (files.read_manifest(path) or {"sequence": math.inf}).get("sequence", 0)


def _is_own(path: Path) -> bool:
    return path.name == _NAME.format((files.read_manifest(path) or {}).get("update", -1))


def check_no_existing_run(run_dir: str | Path) -> None:
    """Raise FileExistsError if the folder holds a run; change nothing."""
    for path in (Path(run_dir) / PROGRESS_FILE, *CheckpointStore(run_dir).paths()):
        if path.exists():
            name = path.relative_to(run_dir)
            raise FileExistsError(
                f"a new run needs a folder without one, but {run_dir} holds {name}. Choose another "
                "run_dir, resume that run, or delete it."
            )


def run_metadata(trainer: Any) -> dict[str, dict[str, Any]]:
    """Return a trainer's settings, which a resumed run must share, and its options."""
    collector, stepper, sampler = trainer.collector, trainer.stepper, trainer.online_buffer.sampler
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    tau, env = getattr(trainer.target_updater, "eps", None), getattr(collector, "env", None)
    settings = {
        **{f"policy.{k}": v for k, v in policy_settings(trainer.policy).items()},
        **{f"loss.{k}": v for k, v in getattr(trainer.loss_module, "settings", {}).items()},
        **trainer.settings,
        "replay_buffer": type(trainer.online_buffer).__name__,
        **({"replay": "in place"} if getattr(collector, "keeps_replay", False) else {}),
        "seed": trainer.seed,
    }
    options = {
        **{x: getattr(trainer, x) for x in ("total_updates", "updates_per_round", "online_after")},
        **{f"{name}_interval": value for name, value in asdict(trainer.intervals).items()},
        "learning_rate": max(getattr(trainer.scheduler, "base_lrs", rates)),
        **{x: getattr(stepper, x) for x in ("clip_norm", "clip_each", "precision")},
        **{x: getattr(sampler, x, None) for x in SAMPLING},
        "tau": None if tau is None else round(1 - tau, 12),
        "batch_size": trainer.replay_buffer.batch_size,
        "ranks": trainer.ranks.size,
        "num_envs": None if env is None else env.batch_size.numel(),
        "frames_per_batch": getattr(collector, "requested_frames_per_batch", None),
        "fragment_length": getattr(collector, "fragment_length", None),
        **trainer.options,
    }
    return {"settings": as_json(settings), "options": as_json(options)}


class PolicyFiles:
    """A run's `policy.npz` (last checkpoint) and `best_policy.npz`, if the policy is a module."""

    def __init__(self, run_dir: str | Path, policy: object) -> None:
        self.last, self.best = Path(run_dir) / "policy.npz", Path(run_dir) / "best_policy.npz"
        self.policy = policy
        self.best_value: float | None = None  # mean return in the best evaluation so far

    def save_last(self) -> None:
        if isinstance(self.policy, nn.Module):
            save_policy(self.last, self.policy)

    def save_if_best(self, evaluation: Mapping[str, float]) -> None:
        """Write the policy unless an earlier evaluation had a larger mean return."""
        value = evaluation.get("eval/trial_return", math.nan)
        is_best = value >= (-math.inf if self.best_value is None else self.best_value)
        if is_best and isinstance(self.policy, nn.Module):
            save_policy(self.best, self.policy)
            self.best_value = value

    def state_dict(self) -> dict[str, Any]:
        return {"best_value": self.best_value}

    def load_state_dict(self, state: Values) -> None:
        """Go on from that evaluation, unless its policy isn't in the run's folder."""
        self.best_value = state["best_value"] if self.best.exists() else None
