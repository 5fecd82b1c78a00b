"""DeepMind's own Alchemy: the message without it, and with it trials that keep the chemistry."""

from __future__ import annotations

import sys

import pytest
import torch
from torchrl.envs.utils import check_env_specs

from torchrl_amago.envs import make_trial_env
from torchrl_amago.envs.libs import DMAlchemy
from torchrl_amago.envs.tasks import SymbolicAlchemy


def test_without_dm_alchemy_its_address_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_alchemy", None)
    with pytest.raises(ImportError, match="github.com/google-deepmind/dm_alchemy"):
        DMAlchemy()


@pytest.fixture
def env():
    pytest.importorskip("dm_alchemy.symbolic_alchemy", reason="needs dm_alchemy")
    return make_trial_env(
        DMAlchemy(), episodes=2, repeat="options", options=DMAlchemy.SAME_CHEMISTRY
    )


def test_specs_are_those_of_the_native_task(env):
    check_env_specs(env)
    native = make_trial_env(SymbolicAlchemy(), episodes=2)
    for key in ("observation", "reward", "done"):
        ours, theirs = (each.fake_tensordict()["next", key] for each in (native, env))
        assert ours.shape == theirs.shape
        assert ours.dtype == theirs.dtype
    assert env.action_spec.n == native.action_spec.n == 40


def test_a_trial_keeps_the_chemistry_and_a_new_one_draws_another(env):
    env.set_seed(0)
    level = env.base_env._env.unwrapped._level
    trial = env.rollout(100)
    assert len(trial) == 40
    assert trial["soft_reset"].flatten().nonzero().flatten().tolist() == [0, 20]
    env.reset()
    chemistry = level._chemistry
    td = env.reset()
    assert level._chemistry != chemistry
    chemistry = level._chemistry
    for _ in range(40):
        td = env.step(td.set("action", torch.tensor(0)))["next"]
        assert level._chemistry is chemistry
    assert td["done"]


def test_a_reset_in_mid_episode_repeats_the_chemistry(env):
    alchemy = env.base_env._env.unwrapped
    alchemy.reset(seed=1)
    chemistry = alchemy._level._chemistry
    alchemy.step(3)
    alchemy.reset(options=DMAlchemy.SAME_CHEMISTRY)
    assert alchemy._level._chemistry is chemistry
    assert not any(alchemy.step(0)[2] for _ in range(19))
    assert alchemy.step(0)[2]
