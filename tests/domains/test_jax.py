"""Environments in JAX: gymnax, XLand-MiniGrid and Craftax. Each test compiles what it plays."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tests.domains.contract import check_domain, check_pictures, need
from torchrl_amago import make_trial_env
from torchrl_amago.envs.libs import craftax_env, gymnax_env, xland_env

SMALL = {"hidden_size": 16, "output_size": 16}


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Breakout-MinAtar", "FrozenLake-misc"])
def test_gymnax(env_id):
    need("gymnax", "jax")
    rows = gymnax_env(env_id, 3, params={"max_steps_in_episode": 12}, seed=0)
    env = make_trial_env(rows, episodes=2)
    images = {"entries": {"observation": {"trunk": "grid"}}} if "MinAtar" in env_id else {}
    options = dict(timestep_encoder="combined", timestep_options={**SMALL, **images})
    check_domain(lambda _: env, num_steps=60, min_rows=0, **options)
    check_pictures(env)


@pytest.mark.slow
def test_xland():
    need("xminigrid", "jax")
    rows = xland_env(3, params={"max_steps": 9, "height": 5, "width": 7}, seed=0)
    env = make_trial_env(rows, episodes=2)
    # Observations don't show the ruleset: tests/envs/libs compares it.
    unseen = dict(same_task=lambda steps: torch.zeros(len(steps)), min_rows=0)
    options = dict(timestep_encoder="combined", timestep_options=SMALL)
    check_domain(lambda _: env, num_steps=40, **unseen, **options)
    check_pictures(env)


@pytest.mark.slow
def test_craftax():
    need("craftax", "jax")
    rows = craftax_env(3, params={"max_timesteps": 4}, seed=0)
    assert rows.max_episode_steps == 4
    env = make_trial_env(rows, episodes=2)
    seen = env.rollout(8)["observation"]
    assert seen.shape == (3, 8, 1345)
    assert torch.equal(seen[:, 0], seen[:, 4])
    check_domain(lambda _: env, num_steps=20, min_rows=3, timestep_options=SMALL)
    check_pictures(env)
    picture = rows.render(1)
    assert picture.shape == (144, 144, 3)
    assert picture.dtype == np.uint8
    assert picture.max() > 128
