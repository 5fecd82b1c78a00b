"""Policies with any timestep encoder act and learn in an environment."""

from __future__ import annotations

import gymnasium as gym
import pytest
import torch
from torch import nn
from torchrl.data import Bounded, Categorical, MultiCategorical, NonTensor
from torchrl.envs import Transform
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.objectives import SoftUpdate

from torchrl_amago import AMAGOLoss, MetaFrozenLake, make_critic, make_policy, make_trial_env
from torchrl_amago.modules import (
    TIMESTEP_ENCODERS,
    CombinedTimestepEncoder,
    MLPTimestepEncoder,
    TimestepEncoder,
    make_timestep_encoder,
)
from torchrl_amago.modules.timestep import flatten_and_join

SMALL = {
    "context_length": 12,
    "seq_model_options": {"d_model": 16, "num_heads": 2, "num_layers": 1},
    "actor_options": {"hidden_size": 16},
    "discounts": (0.9, 0.99),
}
SHOWN = {
    "pixels": Bounded(0, 255, shape=(9, 9, 3), dtype=torch.uint8),
    "cards": MultiCategorical([13, 4]),
    "instruction": Categorical(20, shape=(5,)),
}
OPTIONS = {
    "mlp": {"hidden_size": 16, "output_size": 16},
    "cnn": {"trunk": "grid", "output_size": 16, "random_shift": 1},
    "combined": {
        "hidden_size": 16,
        "output_size": 16,
        "entries": {"pixels": {"trunk": "grid"}, "instruction": {"kind": "tokens"}},
    },
}


class Show(Transform):
    """Adds observations at random."""

    def __init__(self, *names: str) -> None:
        super().__init__()
        self.names = names

    def _call(self, tensordict):
        for name in self.names:
            tensordict.set(name, SHOWN[name].expand(*tensordict.shape, *SHOWN[name].shape).rand())
        return tensordict

    def _reset(self, tensordict, tensordict_reset):
        return self._call(tensordict_reset)

    def transform_observation_spec(self, spec):
        for name in self.names:
            spec[name] = SHOWN[name].expand(*spec.shape, *SHOWN[name].shape)
        return spec


def make_env(*names: str):
    lake = MetaFrozenLake(batch_size=(3,), seed=0)
    return make_trial_env(lake, episodes=2).append_transform(Show(*names))


class OwnEncoder(TimestepEncoder):
    """A user's encoder: one class, one method."""

    def __init__(self, shapes, output_size=16, **options):
        super().__init__(shapes, output_size, **options)
        self.linear = nn.Linear(sum(torch.Size(s).numel() for s in shapes.values()), output_size)

    def encode(self, inputs, mask):
        return self.linear(flatten_and_join(inputs, self.shapes))


def act_and_learn(env, **options) -> TimestepEncoder:
    """A rollout, and a gradient for every parameter of the timestep encoder."""
    policy = make_policy(env, **SMALL, **options)
    with set_exploration_type(ExplorationType.RANDOM):
        rollout = env.rollout(8, policy, break_when_any_done=False)
    assert env.action_spec.is_in(rollout["action"][:, 0])
    critic = make_critic(policy, hidden_size=16)
    loss = AMAGOLoss(policy, critic)
    loss.target_update = SoftUpdate(loss, tau=0.1)
    rollout["collector", "mask"] = torch.arange(8) < torch.tensor([[8], [5], [2]])
    out = loss(rollout)
    (out["loss_actor"] + out["loss_qvalue"]).backward()
    encoder = policy.encoder.module[0]
    for name, parameter in encoder.named_parameters():
        assert parameter.grad.any(), name
        assert parameter.grad.isfinite().all(), name
    return encoder


@pytest.mark.parametrize(
    ("name", "shown"),
    [("mlp", ()), ("cnn", ("pixels",)), ("combined", ("pixels", "cards", "instruction"))],
)
def test_named_encoders_act_and_learn(name, shown):
    env = make_env(*shown)
    encoder = act_and_learn(env, timestep_encoder=name, timestep_options=OPTIONS[name])
    assert type(encoder) is TIMESTEP_ENCODERS[name]
    assert {*shown, "prev_reward", "prev_action", "soft_reset"} <= set(encoder.in_keys)


@pytest.mark.parametrize("shown", [(), ("cards",), ("pixels",), ("cards", "pixels")])
def test_the_default_combines_if_there_are_categories(shown):
    encoder = make_policy(make_env(*shown), **SMALL).encoder.module[0]
    assert type(encoder) is (CombinedTimestepEncoder if shown == ("cards",) else MLPTimestepEncoder)


def test_a_policy_tells_rooms_apart():
    rows = gym.vector.SyncVectorEnv([lambda: gym.make("Taxi-v4")] * 2, autoreset_mode="Disabled")
    env = make_trial_env(rows, episodes=1, trial_end="episode")
    encoder = make_policy(env, **SMALL).encoder.module[0]
    with torch.no_grad():  # 500 rooms, and the same previous step in each
        step = env.reset()[:1].expand(500).clone()
        out = encoder(step.set("observation", torch.arange(500)))["timestep"]
    assert torch.cdist(out, out).fill_diagonal_(torch.inf).min() > 1e-2


@pytest.mark.parametrize("form", ["class", "function", "module"])
def test_ones_own_encoder_acts_and_learns(form):
    env = make_env()
    own = {
        "class": lambda: OwnEncoder,
        "function": lambda: lambda specs: OwnEncoder.from_specs(specs),
        "module": lambda: make_timestep_encoder(env, OwnEncoder),
    }
    assert type(act_and_learn(env, timestep_encoder=own[form]())) is OwnEncoder


def test_options_reach_ones_own_encoder():
    options = {"hide_prev_step": True, "output_size": 6}
    policy = make_policy(make_env(), timestep_encoder=OwnEncoder, timestep_options=options, **SMALL)
    encoder = policy.encoder.module[0]
    assert encoder.hidden_keys == {"prev_reward", "prev_action"}
    assert encoder.output_size == 6


def test_chosen_entries():
    encoder = make_timestep_encoder(
        make_env("pixels", "cards"), "combined", obs_keys=["cards"], output_size=8
    )
    assert encoder.in_keys == ["cards", "prev_reward", "prev_action"]


def test_an_entry_that_is_no_tensor_raises():
    with pytest.raises(ValueError, match=r"\['text'\] are none. Choose obs_keys"):
        OwnEncoder.from_specs({"text": NonTensor(())})


def test_errors_name_the_rule():
    env = make_env("pixels", "cards")
    with pytest.raises(ValueError, match=r"must be one of \['cnn', 'combined', 'mlp'\], .* 'rnn'"):
        make_policy(env, timestep_encoder="rnn", **SMALL)
    with pytest.raises(ValueError, match=r"\['cards'\] are categories"):
        make_policy(env, timestep_encoder="cnn", **SMALL)
    with pytest.raises(ValueError, match="at least 36 x 36 pixels, got 9 x 9"):
        make_policy(env, timestep_encoder="combined", **SMALL)
    with pytest.raises(ValueError, match="needs one image"):
        make_policy(make_env(), timestep_encoder="cnn", **SMALL)
    with pytest.raises(KeyError, match="'colour'.* not among the environment's observations"):
        make_timestep_encoder(env, obs_keys=["colour"])
