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
        "replay_buffer": type(trainer.online_buffer).__name__,
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


def facts(state: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """Describe what must not change: settings, parts, shapes and dtypes, parameter groups."""
    described = {**as_json(settings), **dict.fromkeys(state, "present")}
    for part in state.keys() & {"loss", "exploration", "weights"}:
        for name, x in state[part].items():
            if isinstance(x, Tensor):
                shape = "x".join(map(str, x.shape)) or "scalar"
                described[f"{part}.{name}"] = f"{shape} {str(x.dtype).removeprefix('torch.')}"
    groups = state["optimizer"]["optimizer"]["param_groups"] if "optimizer" in state else ()
    sizes = {f"optimizer.group_{i}": len(group["params"]) for i, group in enumerate(groups)}
    return described | {name: f"{size} parameters" for name, size in sizes.items()}


def as_json(values: Any) -> Any:
    """Return values as a JSON file gives them back: tuples as lists, other objects as text."""
    return json.loads(json.dumps(values, default=str))


def differences(
    saved: Mapping[str, object], current: Mapping[str, object]
) -> dict[str, tuple[object, object]]:
    """Map each name whose values differ to both of them, ``"absent"`` for a missing one."""
    pairs = {x: (saved.get(x, "absent"), current.get(x, "absent")) for x in {**saved, **current}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_same(path: Path, saved: Mapping[str, object], current: Mapping[str, object]) -> None:
    """Raise ValueError, with the first three differences, if saved facts differ from current."""
    differing = differences(saved, current)
    if differing:
        shown = [f"{name}: {old} there, {new} here" for name, (old, new) in differing.items()]
        raise ValueError(
            f"{path} must have been saved with the same architecture, settings and parts, but "
            f"they differ in {len(differing)} entries: {'; '.join(shown[:3])}. Build environment, "
            "policy, loss and optimizer with the arguments of that run, or start anew elsewhere."
        )
