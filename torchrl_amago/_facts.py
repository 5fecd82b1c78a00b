"""Facts of a run that must not change: settings, parts, shapes and dtypes."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from tensordict import NestedKey
from torch import Tensor, nn

from torchrl_amago.keys import as_tuple


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
    for i, group in enumerate(groups):
        described[f"optimizer.group_{i}"] = f"{len(group['params'])} parameters"
    return described


def as_json(values: Any) -> Any:
    """Return values as a JSON file gives them back: tuples as lists, other objects as text."""
    return json.loads(json.dumps(values, default=str))


def differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> dict[str, tuple]:
    """Map each name whose values differ to both of them, ``"absent"`` for a missing one."""
    pairs = {x: (saved.get(x, "absent"), current.get(x, "absent")) for x in {**saved, **current}}
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def check_same(
    place: object,
    saved: Mapping[NestedKey, object],
    current: Mapping[NestedKey, object],
    what: str = "architecture, settings and parts",
    remedy: str = "Build environment, policy, loss and optimizer as then, or start anew elsewhere.",
) -> None:
    """Raise ValueError, with the first three differences, if saved facts differ from current."""
    if differing := differences(saved, current):
        pairs = ((".".join(as_tuple(name)), *pair) for name, pair in differing.items())
        shown = [f"{name}: {old} there, {new} here" for name, old, new in pairs]
        raise ValueError(
            f"{place} must have the same {what}, but they differ in {len(differing)} entries: "
            f"{'; '.join(shown[:3])}. {remedy}"
        )


def describe_policy(policy: nn.Module) -> dict[str, Any]:
    """Return settings and state dict, without the counters of exploration."""
    exploration = getattr(policy, "exploration", None)
    left_out = tuple(f"{name}." for name, module in policy.named_modules() if module is exploration)
    tensors = {name: x for name, x in policy.state_dict().items() if isinstance(x, Tensor)}
    weights = {name: x for name, x in tensors.items() if not name.startswith(left_out)}
    return {"weights": weights, "settings": as_json(policy_settings(policy))}
