"""Small environments whose every step can be predicted, and a plain-Python reference of trials.

In all of them the agent decides when an episode ends: action 0 goes on, 1 terminates, 2 truncates.
Observations show what is hidden in real tasks: the task, and the step within the episode.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, Composite, Unbounded
from torchrl.envs import EnvBase, GymWrapper, step_mdp

NUM_ACTIONS = 3


class CountingEnv(EnvBase):
    """Natively batched: observation [task, step of the episode], reward 10 * task + step.

    Row r's n-th task (from 0) is number ``first_task + 100 * r + n``.
    """

    repeats_task = True

    def __init__(self, batch_size=(), first_task: int = 0) -> None:
        super().__init__(batch_size=torch.Size(batch_size))
        shape = self.batch_size
        flag = Categorical(2, shape=(*shape, 1), dtype=torch.bool)
        self.observation_spec = Composite(observation=Unbounded((*shape, 2)), shape=shape)
        self.action_spec = Categorical(NUM_ACTIONS, shape=shape)
        self.reward_spec = Unbounded((*shape, 1))
        self.done_spec = Composite(
            done=flag, terminated=flag.clone(), truncated=flag.clone(), shape=shape
        )
        self.first = (torch.arange(shape.numel()) * 100 + first_task - 1).view(*shape, 1)
        self.task = self.first.clone()
        self.time = torch.zeros_like(self.task)

    def _set_seed(self, seed: int | None) -> None:
        self.task = self.first.clone()

    def _reset(self, tensordict=None, *, repeat_task: bool | Tensor = False, **kwargs):
        mask = None if tensordict is None else tensordict.get("_reset", None)
        mask = torch.ones_like(self.task, dtype=torch.bool) if mask is None else mask
        if tensordict is not None:
            repeat_task = tensordict.get("repeat_task", repeat_task)
        self.task = self.task + (mask & ~torch.as_tensor(repeat_task))
        self.time = torch.where(mask, 0, self.time)
        return TensorDict({"observation": self._observe()}, batch_size=self.batch_size)

    def _observe(self) -> Tensor:
        return torch.cat([self.task, self.time], -1).float()

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict["action"].view(self.task.shape)
        reward = (10.0 * self.task + self.time).float()
        self.time = self.time + 1
        return TensorDict(
            {
                "observation": self._observe(),
                "reward": reward,
                "done": action != 0,
                "terminated": action == 1,
                "truncated": action == 2,
            },
            batch_size=self.batch_size,
        )


class TensordictOnlyEnv(CountingEnv):
    """Knows `repeat_task` as an entry of the reset tensordict only."""

    def _reset(self, tensordict=None, **kwargs):
        return super()._reset(tensordict)


class ForgetfulEnv(CountingEnv):
    """Cannot repeat a task."""

    repeats_task = False


class SeededGoal(gym.Env):
    """A Gymnasium environment whose reset seed picks a hidden goal; observation [goal, step].

    Without a seed the goal is drawn from its generator, so it is another one at each reset, unless
    the options say otherwise.
    """

    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gym.spaces.Discrete(NUM_ACTIONS)

    def __init__(self) -> None:
        self.goal = 0.0
        self.received: list[tuple[int | None, Any]] = []

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        super().reset(seed=seed)
        self.received.append((seed, dict(options or {})))
        options = {} if options is None else options
        if not options.get("keep", False):
            self.goal = float(self.np_random.uniform(1, 2))
        self.goal = options.get("goal", self.goal)
        self.time = 0
        return self._observe(), {}

    def _observe(self) -> np.ndarray:
        return np.array([self.goal, self.time], np.float32)

    def step(self, action):
        reward = 10 * self.goal + self.time
        self.time += 1
        return self._observe(), reward, bool(action == 1), bool(action == 2), {}


class SilentGoal(SeededGoal):
    """Doesn't call ``super().reset``, so that its seed is unknown outside."""

    def reset(self, *, seed: int | None = None, options: dict | None = None):
        self.goal = float(np.random.default_rng(seed).uniform(1, 2))
        self.time = 0
        return self._observe(), {}


def make_seeded_goal(base: gym.Env | None = None) -> GymWrapper:
    return GymWrapper(base or SeededGoal(), categorical_action_encoding=True)


def make_vector_goal(num_rows: int, **kwargs) -> gym.vector.SyncVectorEnv:
    mode = kwargs.pop("autoreset_mode", gym.vector.AutoresetMode.DISABLED)
    return gym.vector.SyncVectorEnv([SeededGoal] * num_rows, autoreset_mode=mode, **kwargs)


def drive(env: EnvBase, actions: Tensor) -> TensorDictBase:
    """Step with given actions ``[*B, T]``, resetting what is done; returns steps ``[*B, T]``.

    Asserts that root of step t+1 is `next` of step t wherever the trial goes on.
    """
    tensordict = env.reset()
    steps = []
    for action in actions.unbind(-1):
        tensordict["action"] = action
        step, tensordict = env.step_and_maybe_reset(tensordict)
        steps.append(step.clone())
    out = torch.stack(steps, -1)
    assert_continuous(out)
    return out


def assert_continuous(steps: TensorDictBase) -> None:
    """``next`` of step t equals the root of step t+1 unless the trial ended at t."""
    following = step_mdp(steps[..., :-1], exclude_action=True)
    goes_on = ~steps["next", "done"][..., :-1, 0]
    assert goes_on.any()
    root = steps[..., 1:]
    for key in following.keys(True, True):
        assert torch.equal(following[key][goes_on], root[key][goes_on]), key


def simulate_row(
    actions: list[int], first_task: int = 0, episodes: int | None = None, horizon: int | None = None
) -> list[dict[str, Any]]:
    """Trials of :class:`CountingEnv`, one row, in plain Python: one dict per step."""
    task, time, episode, step, episode_return = first_task, 0, 0, 0, 0.0
    prev_action, prev_reward = None, 0.0
    steps = []
    is_first_of_episode = True
    for action in actions:
        root = {
            "observation": [task, time],
            "soft_reset": is_first_of_episode,
            "episode_idx": episode,
            "episode_return": episode_return,
            "time_idx": step,
            "is_init": step == 0,
            "prev_reward": prev_reward,
            "prev_action": [float(prev_action == a) for a in range(NUM_ACTIONS)],
        }
        reward = 10.0 * task + time
        episode_return = reward + (0.0 if is_first_of_episode else episode_return)
        time, step, prev_action, prev_reward = time + 1, step + 1, action, reward
        is_last = episodes is not None and episode == episodes - 1
        trial_over = (action != 0 and is_last) or step == horizon
        is_first_of_episode = action != 0 and not trial_over
        if is_first_of_episode:
            time, episode = 0, episode + 1
        after = {
            "observation": [task, time],
            "soft_reset": is_first_of_episode,
            "episode_idx": episode,
            "episode_return": episode_return,
            "time_idx": step,
            "is_init": False,
            "prev_reward": reward,
            "prev_action": [float(action == a) for a in range(NUM_ACTIONS)],
            "reward": reward,
            "done": trial_over,
        }
        steps.append({"root": root, "next": after})
        if trial_over:
            task, time, episode, step, episode_return = task + 1, 0, 0, 0, 0.0
            prev_action, prev_reward, is_first_of_episode = None, 0.0, True
    return steps


def assert_row_equals(steps: TensorDictBase, expected: list[dict[str, Any]]) -> None:
    """Compare steps ``[T]`` of one row with the reference's."""
    for part, actual in (("root", steps), ("next", steps["next"])):
        for key in expected[0][part]:
            wanted = torch.tensor([step[part][key] for step in expected])
            got = actual[key].reshape(wanted.shape)
            assert torch.equal(got.to(wanted.dtype), wanted), (part, key, got, wanted)


def number_tasks(observation: Tensor) -> Tensor:
    """Replace the goals of :class:`SeededGoal` ``[T, 2]`` by 0, 1, ... in order of appearance."""
    goals = observation[:, 0].tolist()
    seen = list(dict.fromkeys(goals))
    return torch.tensor([seen.index(goal) for goal in goals])
