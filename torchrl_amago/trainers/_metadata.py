"""Settings, options and shapes of a run, saved with it and compared before it is resumed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from torch import Tensor


def run_metadata(trainer: Any) -> dict[str, dict[str, Any]]:
    """Return a trainer's settings, which a resumed run must share, and its options."""
    policy = policy_settings(trainer.policy)
    loss = getattr(trainer.loss_module, "settings", {})
    rates = [group["lr"] for group in trainer.optimizer.param_groups]
    tau, env = getattr(trainer.target_updater, "eps", None), getattr(trainer.collector, "env", None)
    settings = {
        **{f"policy.{name}": value for name, value in policy.items()},
        **{f"loss.{name}": value for name, value in loss.items()},
        **trainer.settings,
        "seed": trainer.seed,
    }
    options = {
        "total_updates": trainer.total_updates,
        "updates_per_round": trainer.updates_per_round,
        "online_after": trainer.online_after,
        **{f"{name}_interval": value for name, value in asdict(trainer.intervals).items()},
        "learning_rate": max(getattr(trainer.scheduler, "base_lrs", rates)),
        "clip_norm": trainer.stepper.clip_norm,
        "precision": trainer.stepper.precision,
        "tau": None if tau is None else round(1 - tau, 12),
        "batch_size": trainer.replay_buffer.batch_size,
        "num_envs": None if env is None else env.batch_size.numel(),
        "frames_per_batch": getattr(trainer.collector, "requested_frames_per_batch", None),
        **trainer.options,
    }
    return {"settings": as_json(settings), "options": as_json(options)}


def policy_settings(policy: object) -> dict[str, Any]:
    """Return the settings that decide how a policy acts, without those of its exploration."""
    settings = getattr(policy, "settings", {})
    return {k: value for k, value in settings.items() if k.partition(".")[0] != "exploration"}


def describe_architecture(state: Mapping[str, Any]) -> dict[str, str]:
    """Describe the tensors of loss and exploration, and the optimiser's parameter groups."""
    described = {
        f"{part}.{name}": text
        for part in ("loss", "exploration")
        for name, text in describe_tensors(state.get(part, {})).items()
    }
    groups = state["optimizer"]["optimizer"]["param_groups"]
    sizes = {f"optimizer.group_{i}": len(group["params"]) for i, group in enumerate(groups)}
    return described | {name: f"{size} parameters" for name, size in sizes.items()}


def describe_tensors(state: Mapping[str, Any]) -> dict[str, str]:
    """Map names to shape and dtype, such as ``"2x3 float32"``."""
    tensors = {name: x for name, x in state.items() if isinstance(x, Tensor)}
    return {
        name: f"{'x'.join(map(str, x.shape)) or 'scalar'} {str(x.dtype).removeprefix('torch.')}"
        for name, x in tensors.items()
    }


def as_json(values: Any) -> Any:
    """Return values as a JSON file gives them back: tuples as lists, other objects as text."""
    return json.loads(json.dumps(values, default=str))


def differences(
    saved: Mapping[str, object], current: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """Map each name whose values differ to both of them, ``"absent"`` for a missing one."""
    names = {**saved, **current}
    pairs = {name: (saved.get(name, "absent"), current.get(name, "absent")) for name in names}
    return {name: (old, new) for name, (old, new) in pairs.items() if old != new}


def check_same(
    what: str, path: Path, saved: Mapping[str, object], current: Mapping[str, object]
) -> None:
    """Raise ValueError, with the first three differences, if saved values are not the current ones."""
    differing = differences(saved, current)
    if differing:
        shown = [f"{name}: {old} there, {new} here" for name, (old, new) in differing.items()]
        raise ValueError(
            f"the {what} saved in {path} must be those of what loads it, but differ in "
            f"{len(differing)} entries: {'; '.join(shown[:3])}. Build environment, policy, loss and "
            "optimizer with the arguments of that run, or start anew in another run_dir."
        )
