from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from torchrl.envs import Compose, RewardSum, TransformedEnv

from tests.evaluation.scripted import ScriptedTrials, act
from torchrl_amago.evaluation import rollout_pictures


def test_pictures_of_one_environment_by_episode():
    from torchrl_amago.envs import MetaFrozenLake, make_trial_env

    lake = MetaFrozenLake(3, batch_size=(3,))
    env = make_trial_env(lake, episodes=3)
    episodes = rollout_pictures(env.rand_action, env, env_index=1, greedy=False, seed=5)
    assert len(episodes) == 3
    assert all(2 <= len(episode) <= lake.max_episode_steps + 1 for episode in episodes)
    starts = [episode[0] for episode in episodes]
    # Each episode starts at the same cell of the same lake, and ends elsewhere or at the limit.
    assert all((start == starts[0]).all() for start in starts)
    for episode in episodes:
        assert len(episode) == lake.max_episode_steps + 1 or (episode[-1] != starts[0]).any()
    again = rollout_pictures(env.rand_action, env, env_index=1, greedy=False, seed=5)
    assert [len(episode) for episode in again] == [len(episode) for episode in episodes]


def test_every_step_has_a_picture_while_others_start_new_trials():
    script = [[[[1.0]], [[1.0]]], [[[0.0, 0.0], [0.0, 0.0, 1.0]]]]
    env = TransformedEnv(ScriptedTrials(script), Compose(RewardSum()))
    episodes = rollout_pictures(act, env, env_index=1)
    values = [[int(picture[0, 0, 0]) for picture in episode] for episode in episodes]
    # This environment draws its next state, so an episode's last picture is the next start.
    assert values == [[0, 1, 10], [10, 11, 12, 20]]


def test_the_given_environment_keeps_its_transforms():
    env = TransformedEnv(ScriptedTrials([[[[1.0]]]]), Compose(RewardSum()))
    rollout_pictures(act, env)
    assert [type(transform) for transform in env.transform] == [RewardSum]
    assert env.transform[0].parent is not None
    assert env.rollout(3, act, break_when_any_done=False)["next", "episode_reward"].tolist() == [
        [[1.0], [1.0], [1.0]]
    ]


class PaintedSteps(gym.Env):
    """Environment of three steps; its picture is one pixel of its number and the step."""

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012
    observation_space = gym.spaces.Box(0.0, 1.0, (1,))
    action_space = gym.spaces.Discrete(2)
    render_mode = "rgb_array"

    def __init__(self, number: int) -> None:
        self.number, self.time = number, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.time += 1
        return np.zeros(1, np.float32), 0.0, self.time == 3, False, {}

    def render(self):
        return np.array([[[self.number, self.time, 0]]], np.uint8)


@pytest.mark.parametrize("num_rows", [None, 3])
def test_gymnasium_environments_are_drawn(num_rows):
    from torchrl_amago.envs import make_trial_env

    base, row = PaintedSteps(0), 0
    if num_rows is not None:
        row = 2
        base = gym.vector.SyncVectorEnv(
            [lambda number=number: PaintedSteps(number) for number in range(num_rows)],
            autoreset_mode=gym.vector.AutoresetMode.DISABLED,
        )
    env = make_trial_env(base, episodes=2)
    episodes = rollout_pictures(env.rand_action, env, env_index=row, greedy=False)
    drawn = [[picture[0, 0].tolist() for picture in episode] for episode in episodes]
    assert drawn == [[[row, time, 0] for time in range(4)]] * 2


def test_errors():
    env = ScriptedTrials([[[[0.0] * 5]]])
    with pytest.raises(IndexError):
        rollout_pictures(act, env, env_index=1)
    with pytest.raises(RuntimeError, match="within max_steps=3 steps"):
        rollout_pictures(act, env, max_steps=3)
    assert torch.is_grad_enabled()
