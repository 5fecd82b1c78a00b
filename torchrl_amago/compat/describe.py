"""What AMAGO's weights show of the agent they belong to, in our words and for our arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor

from torchrl_amago.compat.files import Source, read_amago_weights
from torchrl_amago.compat.kinds import PartDescription, kind_of, part_of


@dataclass(frozen=True)
class AMAGODescription:
    """What can be read off the weights of an AMAGO agent, see :func:`describe_amago_weights`.

    Args:
        timestep_encoder: likewise ``seq_model`` and ``actor``.
        critic: None if the weights are of a policy alone; likewise what follows.
        num_discounts: G.
        action_size: length of an action's vector; the number of actions if discrete.
        takes_actions: whether critics read the action or list the values of all.
        num_bins: bins of critics that classify; None for scalars.

    Example:
        >>> gru = PartDescription("gru", {"d_model": 8}, input_size=4, output_size=8)
        >>> mlp = PartDescription("mlp", {"hidden_size": 16}, input_size=9, output_size=4)
        >>> AMAGODescription(mlp, gru, mlp).policy_options()["seq_model_options"]
        {'d_model': 8}
    """

    timestep_encoder: PartDescription
    seq_model: PartDescription
    actor: PartDescription
    critic: PartDescription | None = None
    num_discounts: int | None = None
    action_size: int | None = None
    takes_actions: bool | None = None
    num_bins: int | None = None

    def policy_options(self) -> dict[str, Any]:
        """Arguments of :func:`~torchrl_amago.make_policy`, as far as the weights show them."""
        return {
            "timestep_encoder": self.timestep_encoder.kind,
            "timestep_options": self.timestep_encoder.options,
            "seq_model": self.seq_model.kind,
            "seq_model_options": self.seq_model.options,
            "actor": self.actor.kind,
            "actor_options": self.actor.options,
        }

    def critic_options(self) -> dict[str, Any]:
        """Arguments of :func:`~torchrl_amago.make_critic`; none if there are no critics."""
        if self.critic is None:
            return {}
        return {"takes_actions": self.takes_actions, **self.critic.options}


def describe_amago_weights(source: Source) -> AMAGODescription:
    """Read off AMAGO's weights how to build the policy that they fit.

    Shapes don't show everything: see "What weights don't show" in the page on migrating.

    Args:
        source: file or state dict, see :func:`read_amago_weights`.

    Raises:
        ValueError: if the weights aren't an AMAGO agent's, or an encoder or head is none of those
            that exist here.

    Example:
        >>> import torch
        >>> sizes = {"tstep_encoder.base.in_layer": (16, 9), "tstep_encoder.base.out_layer": (8, 16),
        ...          "actor.base.in_layer": (32, 8), "actor.base.out_layer": (15, 32)}
        >>> agent = {f"{name}.weight": torch.zeros(size) for name, size in sizes.items()}
        >>> description = describe_amago_weights(agent)
        >>> description.timestep_encoder.options
        {'hidden_size': 16, 'num_layers': 1, 'output_size': 8}
        >>> description.seq_model.kind, description.actor.output_size
        ('identity', 15)
    """
    weights = read_amago_weights(source)
    names = {name.partition(".")[0] for name in weights}
    if missing := {"tstep_encoder", "actor"} - names:
        raise ValueError(
            f"an AMAGO agent has a tstep_encoder and an actor, but there is no {sorted(missing)} among "
            f"{sorted(names)}. Give the agent's whole state dict."
        )
    timestep, actor = (_describe_part(part, weights) for part in ("tstep_encoder", "actor"))
    seq_model = _describe_part("traj_encoder", weights)
    if seq_model.kind == "identity":
        size = timestep.output_size
        seq_model = replace(seq_model, input_size=size, output_size=size)
    if not {"critics", "popart"} <= names:
        return AMAGODescription(timestep, seq_model, actor)
    critic = _describe_part("critics", weights)
    num_discounts = _describe_part("popart", weights).output_size
    takes_actions = critic.input_size > seq_model.output_size
    return AMAGODescription(
        timestep,
        seq_model,
        actor,
        critic,
        num_discounts,
        action_size=critic.input_size - seq_model.output_size - 1
        if takes_actions
        else critic.output_size // num_discounts,
        takes_actions=takes_actions,
        num_bins=critic.output_size if takes_actions and critic.output_size > 1 else None,
    )


def _describe_part(part: str, weights: Mapping[str, Tensor]) -> PartDescription:
    theirs = part_of(weights, part)
    kind = kind_of(part, theirs)
    try:
        return kind.measure(kind.translator(theirs)(theirs))
    except (KeyError, IndexError, RuntimeError) as error:
        raise ValueError(
            f"the sizes of AMAGO's {part} can't be read off its weights: {error}. They are incomplete, "
            "or not an AMAGO 3.x agent's; give its whole state dict."
        ) from error
