"""Gymnasium's own environments: classic control and Box2D."""

from __future__ import annotations

import gymnasium as gym
import pytest

from tests.domains.contract import check_domain, check_pictures, need
from torchrl_amago import make_trial_env


def make_env(env_id, rows, **options):
    disabled = gym.vector.AutoresetMode.DISABLED
    make = [lambda: gym.make(env_id, max_episode_steps=20, **options)] * rows
    return make_trial_env(gym.vector.SyncVectorEnv(make, autoreset_mode=disabled), episodes=2)


@pytest.mark.parametrize(
    "env_id", ["CartPole-v1", "LunarLander-v3", "LunarLanderContinuous-v3", "BipedalWalker-v3"]
)
def test_domain(env_id):
    if "Lunar" in env_id or "Walker" in env_id:
        need("Box2D", "classic")
    check_domain(lambda rows: make_env(env_id, rows), num_steps=90)


def test_pictures():
    need("Box2D", "classic")
    check_pictures(make_env("LunarLander-v3", 2, render_mode="rgb_array"))
