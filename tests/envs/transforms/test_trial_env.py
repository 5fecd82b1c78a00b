"""Continuous actions: the policy's, those that reach the environment, those observed again."""

from __future__ import annotations

import gymnasium as gym
import numpy as np
import pytest
import torch
from torchrl.data import Bounded
from torchrl.envs import ActionScaling, GymWrapper, TransformedEnv, check_env_specs

from tests.envs.transforms.helpers import SeededGoal
from torchrl_amago.action_space import ActionSpace, is_in_policy_scale
from torchrl_amago.envs import make_trial_env


class SeenActions(gym.Wrapper):
    """Keeps the actions that reach the environment below."""

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.seen: list[np.ndarray] = []

    def step(self, action):
        self.seen.append(np.array(action))
        return self.env.step(action)


class BoxGoal(SeededGoal):
    """Takes numbers between any bounds; never ends."""

    def __init__(self, low, high) -> None:
        super().__init__()
        self.action_space = gym.spaces.Box(np.float32(low), np.float32(high))

    def step(self, action):
        return self._observe(), 0.0, False, False, {}


def _scalings(env: TransformedEnv) -> list[ActionScaling]:
    return [t for t in env.transform if isinstance(t, ActionScaling)]


def test_pendulum():
    base = SeenActions(gym.make("Pendulum-v1"))
    env = make_trial_env(base, horizon=20)
    check_env_specs(env)
    assert is_in_policy_scale(env.action_spec)
    space = ActionSpace.from_spec(env.full_action_spec_unbatched[env.action_key])
    assert (space.kind, space.size) == ("continuous", 1)
    assert env.observation_spec["prev_action"] == Bounded(-1.0, 1.0, shape=(1,))
    base.seen.clear()
    step = env.reset()
    assert step["prev_action"].tolist() == [0.0]
    for action in (0.25, -1.0, 1.0):
        step, following = env.step_and_maybe_reset(step.set("action", torch.tensor([action])))
        assert step["action"].tolist() == [action]
        assert step["next", "prev_action"].tolist() == [action]
        step = following
    assert np.concatenate(base.seen).tolist() == [0.5, -2.0, 2.0]


def test_each_number_is_scaled_by_its_own_bounds():
    base = SeenActions(BoxGoal([-2.0, 0.0, -1.0], [2.0, 10.0, 1.0]))
    env = make_trial_env(base, horizon=4)
    check_env_specs(env)
    base.seen.clear()
    action = torch.tensor([0.5, -0.5, 0.25])
    step = env.step(env.reset().set("action", action))
    assert base.seen[0].tolist() == [1.0, 2.5, 0.25]
    assert torch.equal(step["next", "prev_action"], action)


@pytest.mark.parametrize("num_rows", [None, 3])
def test_rollouts_observe_the_policys_own_actions(num_rows):
    kwargs = {"autoreset_mode": gym.vector.AutoresetMode.DISABLED}
    base = (
        gym.make("Pendulum-v1")
        if num_rows is None
        else gym.vector.SyncVectorEnv([lambda: gym.make("Pendulum-v1")] * num_rows, **kwargs)
    )
    env = make_trial_env(base, horizon=5)
    env.set_seed(0)
    steps = env.rollout(5)
    taken, shown = steps["action"][..., :-1, :], steps["prev_action"][..., 1:, :]
    assert torch.equal(taken, shown)
    assert taken.abs().max() <= 1
    assert taken.unique().numel() > 1


@pytest.mark.parametrize(
    "base",
    [
        lambda: BoxGoal([-1.0, -1.0], [1.0, 1.0]),
        lambda: BoxGoal([0.0], [np.inf]),
        lambda: SeededGoal(),
    ],
    ids=["in scale", "without bounds", "discrete"],
)
def test_nothing_is_scaled_needlessly(base):
    env = make_trial_env(base(), horizon=4)
    assert not _scalings(env)
    assert env.action_spec == GymWrapper(base(), categorical_action_encoding=True).action_spec


def test_actions_that_are_scaled_already_stay():
    base = TransformedEnv(GymWrapper(gym.make("Pendulum-v1")), ActionScaling())
    env = make_trial_env(base, horizon=4)
    assert len(_scalings(env)) == 1
    step = env.step(env.reset().set("action", torch.tensor([0.5])))
    assert step["next", "prev_action"].tolist() == [0.5]


def test_a_space_that_no_policy_fits():
    env = make_trial_env(BoxGoal([0.0], [np.inf]), horizon=4)
    with pytest.raises(ValueError, match="must have finite bounds"):
        ActionSpace.from_spec(env.full_action_spec_unbatched[env.action_key])
