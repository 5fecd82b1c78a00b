"""Several environments as one: who plays, padded observations, masks, labels."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest

from torchrl_amago.envs.libs import MultiDomain


def make(env_id):
    return lambda: gym.make(env_id)


IDS = ["CartPole-v1", "Acrobot-v1", "MountainCar-v0"]


def make_domains(*ids, **options):
    return MultiDomain({env_id: make(env_id) for env_id in ids}, **options)


def test_the_seed_decides_environment_and_luck():
    env = make_domains(*IDS)
    seen = {}
    for seed in range(60):
        first, info = env.reset(seed=seed)
        again, info_again = env.reset(seed=seed)
        assert info["task"] == info_again["task"] == IDS[info["task_id"]]
        np.testing.assert_array_equal(first["observation"], again["observation"])
        seen.setdefault(info["task"], set()).add(first["observation"].tobytes())
    assert sorted(seen) == sorted(IDS)
    assert sum(map(len, seen.values())) == 60


def test_observations_are_the_environments_own_padded():
    env = make_domains(*IDS)
    sizes = {"CartPole-v1": 4, "Acrobot-v1": 6, "MountainCar-v0": 2}
    for seed in range(20):
        observation, info = env.reset(seed=seed)
        own = env._envs[info["task_id"]]
        for _ in range(3):
            size = sizes[info["task"]]
            values = observation["observation"]
            np.testing.assert_array_equal(
                values[:size],
                np.float32(
                    own.unwrapped.state if info["task"] != "Acrobot-v1" else own.unwrapped._get_ob()
                ),
            )
            assert (values[size:] == 0).all()
            assert observation["action_mask"].tolist() == [1, 1, info["task"] != "CartPole-v1"]
            assert env.observation_space.contains(observation)
            observation = env.step(1)[0]


def test_probabilities():
    env = make_domains(*IDS, probabilities=[3, 0, 1])
    env.reset(seed=0)
    drawn = np.bincount([env.reset()[1]["task_id"] for _ in range(400)], minlength=3) / 400
    np.testing.assert_allclose(drawn, [0.75, 0, 0.25], atol=0.07)


def test_equal_spaces_stay():
    env = MultiDomain({"a": make("CartPole-v1"), "b": make("CartPole-v1")}, show_domain=True)
    space = gym.make("CartPole-v1").observation_space
    assert env.observation_space == gym.spaces.Dict(
        observation=space, domain=gym.spaces.Discrete(2)
    )
    observation, info = env.reset(seed=0)
    assert observation["domain"] == info["task_id"]


def test_an_action_that_the_environment_lacks():
    env = make_domains(*IDS, probabilities=[1, 0, 0])
    env.reset(seed=0)
    with pytest.raises(ValueError, match="CartPole-v1 has 2 actions, got action 2"):
        env.step(2)


@pytest.mark.parametrize(
    ("ids", "options"),
    [([], {}), (IDS, {"probabilities": [1.0]}), (["Pendulum-v1"], {})],
)
def test_domains_that_do_not_fit(ids, options):
    with pytest.raises(ValueError, match="got|has"):
        make_domains(*ids, **options)
