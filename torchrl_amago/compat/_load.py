"""Strict loading of an AMAGO agent: every weight finds its place, or nothing changes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from torchrl_amago import keys
from torchrl_amago.compat._files import Source, read_amago_weights
from torchrl_amago.compat._rename import translate
from torchrl_amago.modules import CNNTimestepEncoder, Policy, PopArt
from torchrl_amago.objectives import AMAGOLoss

# AMAGO's networks that may stay out, with the reason.
_NO_LOSS = "for training, and no loss was given"
_UNUSED = {
    "maximized_critics": "a copy of the critics; the loss uses the critics themselves",
    **dict.fromkeys(("critics", "target_critics", "target_actor", "popart"), _NO_LOSS),
}
# Our buffers that AMAGO keeps in its configuration.
_CONFIGURATION = {"discounts", "bins", "num_outside"}


@dataclass(frozen=True)
class WeightReport:
    """Result of :func:`load_amago_weights`: the fate of every weight.

    Args:
        loaded: AMAGO's name -> ours.
        unused: AMAGO's name -> the reason why it has no place here.
        kept: our entries that AMAGO's weights lack, such as bins; they must equal the agent's.

    Example:
        >>> print(WeightReport({"actor.a": "actor.b"}, {"critics.c": "for training"}, ("bins",)))
        1 loaded
        1 unused: for training
            critics.c
        1 kept: bins
    """

    loaded: Mapping[str, str]
    unused: Mapping[str, str]
    kept: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"{len(self.loaded)} loaded"]
        for reason in dict.fromkeys(self.unused.values()):
            names = [name for name, why in self.unused.items() if why == reason]
            lines += [f"{len(names)} unused: {reason}", *(f"    {name}" for name in names)]
        if self.kept:
            lines.append(f"{len(self.kept)} kept: {', '.join(self.kept)}")
        return "\n".join(lines)


class _Network(NamedTuple):
    name: str
    module: nn.Module
    entries: Mapping[str, Tensor]


def load_amago_weights(
    source: Source, policy: Policy, loss: AMAGOLoss | None = None
) -> WeightReport:
    """Fill a policy, and a loss around it, with the weights of an AMAGO 3.x agent.

    The policy must have the agent's networks, sizes and discounts, and read the same inputs in the
    same order: observations sorted by name, then the previous reward and action. With a loss, built
    around this policy, critics, target networks and PopArt's statistics are filled too; make
    TorchRL's `SoftUpdate` before, since it copies the online weights to the targets. For sources
    and errors of files see :func:`read_amago_weights`.

    Raises:
        ValueError: if a weight has no place here, an entry of ours would stay unfilled, a shape
            differs, or inputs are read in another order. The message lists all of them by name, and
            nothing has changed.

    Example:
        >>> from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> policy = make_policy(
        ...     env, context_length=45, obs_keys=["observation"], preset="paper"
        ... )
        >>> load_amago_weights({"actor.base.out_layer.bias": torch.zeros(9)}, policy)
        Traceback (most recent call last):
        ...
        ValueError: AMAGO's weights do not fit this policy or loss; nothing was changed...
    """
    weights = read_amago_weights(source)
    networks = _networks(policy, loss)
    problems = defaultdict(list, _input_problems(policy))
    if "critics" in networks and (norm := networks["critics"].module.norm) != "none":
        problems["critics with a norm that AMAGO's lack"] = [f"norm={norm!r}"]
    if "popart.mu" in weights and len(weights["popart.mu"]) != len(policy.discounts):
        counts = f"{len(weights['popart.mu'])} -> {len(policy.discounts)}"
        problems["numbers of discounts that differ"].append(counts)
    loaded, unused, copies = {}, {}, []
    for theirs, value in weights.items():
        part, _, name = theirs.partition(".")
        network, ours = networks.get(part), None
        if network is not None:
            heads = getattr(network.module, "num_heads", 1)
            ours, value = translate(name, value, type(network.module), heads)
        if ours is not None and ours in network.entries:
            copies.append((network.entries[ours], value))
            loaded[theirs] = f"{network.name}.{ours}"
            here, there = (tuple(tensor.shape) for tensor in copies[-1])
            if here != there:
                line = f"{theirs} {there} -> {loaded[theirs]} {here}"
                problems["shapes that differ"].append(line)
        elif reason := _reason_to_omit(part, ours, value, networks):
            unused[theirs] = reason
        else:
            problems["no place for"].append(f"{theirs} {tuple(value.shape)}")
    names = [f"{network.name}.{name}" for network in networks.values() for name in network.entries]
    filled = set(loaded.values())
    empty = [name for name in names if name not in filled]
    kept = tuple(name for name in empty if name.rpartition(".")[2] in _CONFIGURATION)
    problems["not filled"] += [name for name in empty if name not in kept]
    if lists := [f"{k}:\n    " + "\n    ".join(lines) for k, lines in problems.items() if lines]:
        rule = "AMAGO's weights do not fit this policy or loss; nothing was changed."
        remedy = "Build them with preset='paper' and the agent's networks, sizes and discounts; "
        remedy += "docs/migrating_from_amago.md lists the arguments."
        raise ValueError("\n".join((rule, *lists, remedy)))
    with torch.no_grad():
        for entry, value in copies:
            entry.copy_(value)
    return WeightReport(loaded, unused, kept)


def _networks(policy: Policy, loss: AMAGOLoss | None) -> dict[str, _Network]:
    """Return our networks by AMAGO's names."""
    timestep, trajectory, actor = *policy.encoder.module, policy.actor.module
    networks = {
        theirs: _Network(ours, module, module.state_dict(keep_vars=True))
        for theirs, ours, module in (
            ("tstep_encoder", "timestep_encoder", timestep),
            ("traj_encoder", "seq_model", trajectory),
            ("actor", "actor", actor),
        )
    }
    if loss is None:
        return networks
    trained = {p.data_ptr() for p in loss.actor_network_params.values(True, True)}
    if not trained & {p.data_ptr() for p in policy.actor.parameters()}:
        raise ValueError("the loss must train this policy, but it has weights of its own.")
    critic = loss.critic_network.module
    for theirs, ours, module, params in (
        ("critics", "critic", critic, loss.critic_network_params),
        ("target_critics", "target_critic", critic, loss.target_critic_network_params),
        ("target_actor", "target_actor", actor, loss.target_actor_network_params),
    ):
        entries = {name.removeprefix("module."): p for name, p in params.flatten_keys(".").items()}
        networks[theirs] = _Network(ours, module, entries)
    codec = loss.value_codec
    popart = getattr(codec, "popart", codec)
    if isinstance(popart, PopArt):
        bins = {} if popart is codec else dict(codec.named_buffers(recurse=False))
        networks["popart"] = _Network("value_codec", popart, dict(popart.named_buffers()) | bins)
    return networks


def _reason_to_omit(
    part: str, ours: str | None, value: Tensor, networks: Mapping[str, _Network]
) -> str | None:
    """Return why a weight has no place here; None if it should have one."""
    if part not in networks:
        no_popart = part == "popart" and "critics" in networks
        return "the value codec has no PopArt" if no_popart else _UNUSED.get(part)
    if ours is None:
        return None
    module = networks[part].module
    if ours.startswith("input_norm.") and module.input_norm is None:
        return "statistics that normalize_inputs=False does not use"
    if ours.endswith("head_scale") and value.numel() == module.num_heads and (value == 1).all():
        return "all ones, the same as head_scaling=False"
    return None


def _input_problems(policy: Policy) -> dict[str, list[str]]:
    """Compare the order and scale of inputs with AMAGO's, since shapes do not depend on them."""
    encoder, problems = policy.encoder.module[0], {}
    read = list(encoder.in_keys)
    if isinstance(encoder, CNNTimestepEncoder):
        read = list(encoder.vector_shapes)
        if (scale := encoder.vector_scale) != "symlog":
            problems["vectors on another scale than AMAGO's symlog"] = [f"vector_scale={scale!r}"]
    previous = [key for key in (keys.PREV_REWARD, keys.PREV_ACTION) if key in read]
    expected = sorted((key for key in read if key not in previous), key=str) + previous
    if read != expected:
        problems["inputs in another order than AMAGO's"] = [f"{read} -> {expected} (obs_keys)"]
    return problems
