"""Policies and losses for the recorded agents, built from nothing but what `compat` reads off them."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Bounded, Categorical

from tests.golden_utils import GoldenCase
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.compat import describe_amago_weights
from torchrl_amago.modules import (
    ACTORS,
    SEQ_MODELS,
    TIMESTEP_ENCODERS,
    ActorModule,
    Encoder,
    HLGauss,
    Policy,
    PopArt,
    TwoHot,
    ValueCodec,
    make_distribution,
)
from torchrl_amago.objectives import AMAGOLoss, amago_loss


def agent_weights(case: GoldenCase) -> dict[str, Tensor]:
    return case.starting("w/")


def build_policy(case: GoldenCase) -> Policy:
    description, hp = describe_amago_weights(agent_weights(case)), case.hyperparameters
    size = description.action_size
    shapes = {
        "observation": (case["batch/obs_observation"].shape[-1],),
        "prev_reward": (1,),
        "prev_action": (size,),
    }
    spec = Categorical(size) if hp["discrete"] else Bounded(-1.0, 1.0, shape=(size,))
    distribution = make_distribution(ActionSpace.from_spec(spec))
    timestep = TIMESTEP_ENCODERS[description.timestep_encoder.kind](
        shapes, **description.timestep_encoder.options
    )
    trajectory = SEQ_MODELS[description.seq_model.kind](
        timestep.output_size, context_length=hp["max_seq_len"], **description.seq_model.options
    )
    for name in ("dropout_ff", "dropout_emb"):  # rates aren't weights
        setattr(trajectory, name, 0.0)
    for block in getattr(trajectory, "blocks", ()):
        block.dropout_ff = 0.0
    actor = ACTORS[description.actor.kind](
        trajectory.output_size,
        distribution.num_params,
        description.num_discounts,
        **description.actor.options,
    )
    head = ActorModule(actor, in_keys=["state"], out_keys=["action_params"])
    return Policy(Encoder(timestep, trajectory), head, distribution, discounts=hp["gammas"])


def build_loss(case: GoldenCase, policy: Policy) -> AMAGOLoss:
    description = describe_amago_weights(agent_weights(case))
    return amago_loss(
        policy, value_codec=build_codec(case), critic_options=description.critic_options()
    )


def build_codec(case: GoldenCase) -> ValueCodec:
    hp, description = case.hyperparameters, describe_amago_weights(agent_weights(case))
    popart = PopArt(description.num_discounts, enabled=hp["popart_enabled"])
    if description.num_bins is None:
        return popart
    head = {name.rpartition(".")[2]: value for name, value in hp["head"].items()}
    codec = HLGauss if head.get("label_type") == "hlgauss" else TwoHot
    limits = {name: head[name] for name in ("min_return", "max_return") if name in head}
    return codec(
        description.num_discounts,
        num_bins=description.num_bins,
        symlog=hp["use_symlog"],
        popart=popart,
        **limits,
    )


def inputs_of(case: GoldenCase) -> TensorDict:
    """The recorded inputs of T + 1 steps, with a mask."""
    rl2s = case["batch/rl2s"]
    lengths = torch.tensor(case.hyperparameters["seq_lengths"])
    real = torch.arange(rl2s.shape[1]) <= lengths[:, None]
    return TensorDict(
        observation=case["batch/obs_observation"],
        prev_reward=rl2s[..., :1],
        prev_action=rl2s[..., 1:],
        time_idx=case["batch/time_idxs"],
        is_init=torch.zeros(*real.shape, 1, dtype=torch.bool),
        collector=TensorDict(mask=real, batch_size=real.shape),
        batch_size=real.shape,
    )
