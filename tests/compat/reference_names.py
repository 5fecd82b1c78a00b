"""Reverse translation for round trips, independent of `compat`: our weights by AMAGO's names."""

from __future__ import annotations

import re

from torch import Tensor

from torchrl_amago.modules import Policy, PopArt
from torchrl_amago.objectives import AMAGOLoss

Weights = dict[str, Tensor]


def agent_state_dict(policy: Policy, loss: AMAGOLoss) -> Weights:
    """Return the state dict that AMAGO would save of this agent."""
    timestep, trajectory = policy.encoder.module
    networks = {
        "tstep_encoder": timestep.state_dict(),
        "traj_encoder": trajectory.state_dict(),
        "actor": policy.actor.module.state_dict(),
        "target_actor": _flat(loss.target_actor_network_params),
        "critics": _flat(loss.critic_network_params),
        "target_critics": _flat(loss.target_critic_network_params),
        "maximized_critics": _flat(loss.critic_network_params),
    }
    saved = _statistics(getattr(loss.value_codec, "popart", loss.value_codec))
    for part, weights in networks.items():
        for name, value in weights.items():
            if name.endswith("discounts"):
                continue
            theirs, value = _BACK[part](name, value.detach().clone(), trajectory)
            saved[f"{part}.{theirs}"] = value
    return saved


def _statistics(popart: PopArt) -> Weights:
    names = {"mu": "mu", "nu": "nu", "weight": "w", "bias": "b", "count": "_t"}
    return {
        f"popart.{theirs}": popart.get_buffer(ours).clone().expand(len(popart.mu)).unsqueeze(-1)
        for ours, theirs in names.items()
    }


def _flat(params) -> Weights:
    return {n.removeprefix("module."): p for n, p in params.flatten_keys(".").items()}


def _mlp(name: str, first: str, others: str, last: str) -> str:
    kind, *rest = name.split(".")
    if kind == "out":
        return f"{last}.{rest[0]}"
    index = int(rest[0])
    if kind == "norms":
        return f"in_norm.norm.{rest[1]}" if not index else f"norms.{index - 1}.norm.{rest[1]}"
    return f"{first}.{rest[1]}" if not index else f"{others}.{index - 1}.{rest[1]}"


def _base(name: str) -> str:
    return "base." + _mlp(name.removeprefix("mlp."), "in_layer", "layers", "out_layer")


def _timestep(name, value, trajectory):
    if name == "input_norm.t":
        return "in_norm._t", value
    if name.startswith("input_norm."):
        return name.replace("input_norm", "in_norm"), value
    if name.startswith("out_norm."):
        return name.replace("out_norm.", "out_norm.norm."), value
    return _base(name), value


_BLOCK = {
    "head_scale": "attention_layer.head_scaler",
    "qkv": "attention_layer.qkv_projection",
    "attention_out": "attention_layer.out_projection",
    "norm_attention": "norm1.norm",
    "norm_attention_out": "norm2.norm",
    "norm_ff": "norm3.norm",
    "norm_ff_hidden": "norm4.norm",
    "ff_in": "ff1",
    "ff_out": "ff2",
}
_FF_BLOCK = {"ff_in": "ff1", "ff_out": "ff2", "norm_in": "norm1.norm", "norm_out": "norm2.norm"}
_TOP = {
    "TransformerEncoder": {
        "embed": "tformer.inp",
        "position_table": "tformer.position_embedding.embeddings",
        "norm": "tformer.norm.norm",
    },
    "FeedForwardEncoder": {"embed": "traj_emb", "out": "traj_last", "out_norm": "out_norm.norm"},
    "GRUEncoder": {"rnn": "rnn", "out": "out", "out_norm": "out_norm.norm"},
    "MambaEncoder": {"embed": "inp", "norm": "out_norm.norm"},
}


def _trajectory(name, value, trajectory):
    encoder = type(trajectory).__name__
    top, _, rest = name.partition(".")
    if top not in ("blocks", "norms"):
        return f"{_TOP[encoder][top]}.{rest}", value
    index, _, rest = rest.partition(".")
    if encoder == "MambaEncoder":
        return f"mambas.{index}." + ("norm.norm." if top == "norms" else "mamba.") + rest, value
    part, _, leaf = rest.partition(".")
    if encoder == "FeedForwardEncoder":
        return f"traj_blocks.{index}.{_FF_BLOCK[part]}.{leaf}", value
    if part == "head_scale":
        return f"tformer.layers.{index}.{_BLOCK[part]}", value.view(1, 1, -1, 1)
    if part == "qkv" and leaf in ("weight", "u"):
        # Row (part, head, feature) of ours is row (part, feature, head) of theirs.
        heads = trajectory.num_heads
        rows = value.reshape(3, heads, -1, *value.shape[1:])
        value = rows.movedim(1, 2).reshape(value.shape)
    return f"tformer.layers.{index}.{_BLOCK[part]}.{leaf}", value


def _actor(name, value, trajectory):
    if name.startswith("mlp."):
        return _base(name), value
    if name.startswith("embed."):
        mlp = _mlp(name.removeprefix("embed."), "in_layer", "layers", "out_layer")
        return f"inp.{mlp}", value
    match = re.fullmatch(r"blocks\.(\d+)\.([14])\.(\w+)", name)
    if match:
        return "residual_blocks.{}.{}.norm.{}".format(*match.groups()), value
    return name.replace("blocks.", "residual_blocks."), value


def _critic(name, value, trajectory):
    if name.endswith("bias"):
        value = value[None, None]
    return "net." + _mlp(name, "inp_layer", "core_layers", "output_layer"), value


_BACK = {
    "tstep_encoder": _timestep,
    "traj_encoder": _trajectory,
    "actor": _actor,
    "target_actor": _actor,
    "critics": _critic,
    "target_critics": _critic,
    "maximized_critics": _critic,
}
