"""Half-Cheetah with a hidden target: the reward's formula, where targets come from, and trials."""

from __future__ import annotations

import builtins
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch

from torchrl_amago.envs import make_trial_env
from torchrl_amago.envs.libs import HalfCheetahVel


def test_velocities_in_the_wrong_order():
    with pytest.raises(ValueError, match="min_velocity must be at most max_velocity, got .*=2.0"):
        HalfCheetahVel(min_velocity=3.0, max_velocity=2.0)


def test_without_mujoco_the_extra_is_named(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, name)
    importing = builtins.__import__

    def without_mujoco(name, *args, **kwargs):
        if name.partition(".")[0] == "mujoco":
            raise ImportError("No module named 'mujoco'", name="mujoco")
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_mujoco)
    with pytest.raises(ImportError, match=r'pip install "torchrl-amago\[mujoco\]"'):
        HalfCheetahVel()


@pytest.fixture
def env():
    pytest.importorskip("mujoco", reason="needs the extra mujoco")
    env = HalfCheetahVel(max_episode_steps=5)
    yield env
    env.close()


def test_reward(env):
    env.reset(seed=0, options={"target_velocity": 2.5})
    before = env.unwrapped.data.qpos[0]
    action = np.array([0.5, -0.5, 0.25, 0.0, 1.0, -1.0], np.float32)
    _, reward, terminated, truncated, info = env.step(action)
    velocity = (env.unwrapped.data.qpos[0] - before) / 0.05
    assert reward == pytest.approx(-abs(velocity - 2.5) - 0.05 * 2.5625)
    assert info["reward_target"] + info["reward_ctrl"] == pytest.approx(reward)
    assert (terminated, truncated) == (False, False)
    flags = [env.step(action)[2:4] for _ in range(4)]
    assert flags == [(False, False)] * 3 + [(False, True)]


def test_targets(env):
    env.reset(seed=3)
    drawn = []
    for _ in range(300):
        first, _ = env.reset()
        drawn.append(env.target_velocity)
    assert 0.0 <= min(drawn) < 0.1
    assert 2.9 < max(drawn) <= 3.0
    assert np.mean(drawn) == pytest.approx(1.5, abs=0.2)
    again, _ = env.reset(options=HalfCheetahVel.SAME_TARGET)
    assert env.target_velocity == drawn[-1]
    assert not np.array_equal(first, again)  # another episode starts a little differently
    assert first.shape == (17,)  # the target isn't among what is observed
    env.reset(seed=3)
    env.reset()
    assert env.target_velocity == drawn[0]


def test_the_first_reset_draws_a_target_in_any_case(env):
    env.reset(seed=0, options=HalfCheetahVel.SAME_TARGET)
    assert 0.0 <= env.target_velocity <= 3.0


def test_trials_repeat_the_target_and_new_trials_change_it():
    pytest.importorskip("mujoco", reason="needs the extra mujoco")
    base = gym.vector.SyncVectorEnv(
        [lambda: HalfCheetahVel(max_episode_steps=4)] * 2,
        autoreset_mode=gym.vector.AutoresetMode.DISABLED,
    )
    env = make_trial_env(base, episodes=3, repeat="options", options=HalfCheetahVel.SAME_TARGET)
    env.set_seed(0)
    step, seen = env.reset(), []
    for _ in range(24):
        step["action"] = torch.zeros(2, 6)
        seen.append([row.target_velocity for row in base.envs])
        _, step = env.step_and_maybe_reset(step)
    trials = np.array(seen).reshape(2, 12, 2)  # two trials of three episodes of four steps
    assert (trials == trials[:, :1]).all()
    assert len(np.unique(trials[:, 0])) == 4
    base.close()
