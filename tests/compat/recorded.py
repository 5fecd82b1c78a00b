"""Policies and losses for the recorded agents, built with the recorded hyper-parameters."""

from __future__ import annotations

import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Bounded, Categorical

from tests.golden_utils import GoldenCase
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules import (
    Actor,
    ActorModule,
    Encoder,
    GRUEncoder,
    HLGauss,
    MLPTimestepEncoder,
    Policy,
    PopArt,
    TransformerEncoder,
    TwoHot,
    ValueCodec,
    make_distribution,
)
from torchrl_amago.objectives import AMAGOLoss, amago_loss


def agent_weights(case: GoldenCase) -> dict[str, Tensor]:
    return case.starting("w/")


def takes_actions(case: GoldenCase) -> bool:
    return case.hyperparameters["cls"] == "MultiTaskAgent" or not case.hyperparameters["discrete"]


def build_policy(case: GoldenCase) -> Policy:
    hp, traj = case.hyperparameters, case.hyperparameters["traj"]
    size = case["batch/actions"].shape[-1]
    spec = Categorical(size) if hp["discrete"] else Bounded(-1.0, 1.0, shape=(size,))
    distribution = make_distribution(ActionSpace.from_spec(spec))
    timestep = MLPTimestepEncoder(
        {
            "observation": (case["batch/obs_observation"].shape[-1],),
            "prev_reward": (1,),
            "prev_action": (size,),
        },
        hidden_size=hp["tstep"]["d_hidden"],
        num_layers=hp["tstep"]["n_layers"],
        output_size=hp["tstep"]["d_output"],
    )
    sizes = {"context_length": hp["max_seq_len"], "num_layers": traj["n_layers"]}
    if hp["encoder"] == "gru":
        sizes |= {"d_model": traj["d_output"], "hidden_size": traj["d_hidden"]}
        trajectory = GRUEncoder(timestep.output_size, **sizes)
    else:
        sizes |= {"d_model": traj["d_model"], "num_heads": traj["n_heads"], "d_ff": traj["d_ff"]}
        trajectory = TransformerEncoder(
            timestep.output_size, dropout_ff=0.0, dropout_emb=0.0, **sizes
        )
    actor = Actor(
        trajectory.output_size,
        distribution.num_params,
        len(hp["gammas"]),
        hidden_size=hp["actor_d_hidden"],
    )
    head = ActorModule(actor, in_keys=["state"], out_keys=["action_params"])
    return Policy(Encoder(timestep, trajectory), head, distribution, discounts=hp["gammas"])


def build_loss(case: GoldenCase, policy: Policy) -> AMAGOLoss:
    hp = case.hyperparameters
    critic = {
        "takes_actions": takes_actions(case),
        "num_critics": hp["num_critics"],
        "hidden_size": hp["critic_d_hidden"],
    }
    return amago_loss(policy, preset="paper", value_codec=build_codec(case), critic_options=critic)


def build_codec(case: GoldenCase) -> ValueCodec:
    hp = case.hyperparameters
    num_discounts = len(hp["gammas"])
    popart = PopArt(num_discounts, enabled=hp["popart_enabled"])
    if "num_bins" not in hp:
        return popart
    head = {name.rpartition(".")[2]: value for name, value in hp["head"].items()}
    codec = HLGauss if head.get("label_type") == "hlgauss" else TwoHot
    limits = {name: head[name] for name in ("min_return", "max_return") if name in head}
    return codec(
        num_discounts, num_bins=hp["num_bins"], symlog=hp["use_symlog"], popart=popart, **limits
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
