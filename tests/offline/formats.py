"""Trials as a collector writes them, and the same ones in every format that can be read."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import torch
from tensordict import TensorDict
from torchrl.envs import EnvBase, InitTracker, TransformedEnv

from tests.toy_env import ACTIONS, Toy
from torchrl_amago import DarkKeyDoor, MetaFrozenLake, PreviousStepTransform, make_trial_env
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.data import TrialCollector, make_trial_buffer
from torchrl_amago.offline.trajectory import TrajectoryChecker


class Collected(NamedTuple):
    """Trials of an environment, and the environment."""

    env: EnvBase
    trials: list[TensorDict]
    action_scale: float = 1.0  # from the policy's to the environment's

    @property
    def own_keys(self) -> list:
        """Entries of the task, without those of transforms."""
        return [*TrajectoryChecker(self.env).given]


def vector_env(env_id: str, steps: int, rows: int = 3, **options) -> EnvBase:
    together = gym.vector.SyncVectorEnv(
        [lambda: gym.make(env_id, max_episode_steps=steps)] * rows,
        autoreset_mode=gym.vector.AutoresetMode.DISABLED,
    )
    return make_trial_env(together, **options)


def toy_env(action: str) -> EnvBase:
    return make_trial_env(Toy(ACTIONS[action]), horizon=7, trial_end="truncated")


ENVS: dict[str, Callable[[], EnvBase]] = {
    "lake": lambda: make_trial_env(MetaFrozenLake(batch_size=(4,), seed=0), episodes=3),
    "room": lambda: make_trial_env(
        DarkKeyDoor(3, max_episode_steps=5, batch_size=(4,), seed=0), horizon=12
    ),
    "pendulum": lambda: vector_env("Pendulum-v1", 9, episodes=1, trial_end="episode"),
    "cart pole": lambda: vector_env("CartPole-v1", 12, episodes=2, trial_end="episode"),
    "cart pole once": lambda: vector_env(
        "CartPole-v1", 15, episodes=1, trial_end="episode", show_progress=False
    ),
    **{f"toy {name}": lambda name=name: toy_env(name) for name in ACTIONS},
}


def collect(name: str, rounds: int = 3) -> Collected:
    """At least a few complete trials with random actions."""
    torch.manual_seed(0)
    env = ENVS[name]()
    env.set_seed(0)
    buffer = make_trial_buffer(3000, slice_length=4, batch_size=2, warn_short=False)
    collector = TrialCollector(
        env,
        env.rand_action,
        replay_buffer=buffer,
        frames_per_batch=env.batch_size.numel() * 30,
        total_frames=env.batch_size.numel() * 30 * rounds,
    )
    for _ in collector:
        pass
    return Collected(env, split(buffer[:]), 2.0 if name == "pendulum" else 1.0)


def split(steps: TensorDict) -> list[TensorDict]:
    """Steps side by side as a list of trials."""
    ends = steps["next", "done"].reshape(-1).nonzero().reshape(-1).tolist()
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [steps[start : end + 1] for start, end in zip(starts, ends, strict=True)]


def env_action(collected: Collected, trial: TensorDict) -> np.ndarray:
    """Actions as the environment under the transforms took them."""
    action = trial["action"]
    return (collected.action_scale * action if action.is_floating_point() else action).numpy()


def rows_of(trial: TensorDict, key) -> np.ndarray:
    return torch.cat([trial[key], trial["next", key][-1:]]).numpy()


def episodes_of(collected: Collected, trial: TensorDict) -> list[dict]:
    """The trial cut into its episodes, as mappings of arrays with what the task shows alone."""
    begins = trial["soft_reset"].reshape(-1).nonzero().reshape(-1).tolist()
    action = env_action(collected, trial)
    episodes = []
    for start, stop in zip(begins, [*begins[1:], len(trial)], strict=True):
        observations = {}
        for key in collected.own_keys:
            rows = rows_of(trial, key)[start : stop + 1].copy()
            if stop < len(trial):
                rows[-1] = rows[0]  # what the episode led to isn't known: the next one's is there
            observations[key] = rows
        last = np.arange(start, stop) == stop - 1
        is_end = stop == len(trial)
        truncated = bool(trial["next", "truncated"][-1]) and is_end
        episodes.append(
            {
                "observations": observations,
                "actions": action[start:stop],
                "rewards": trial["next", "reward"][start:stop].numpy().reshape(-1),
                "terminations": last & (not truncated),
                "truncations": last & truncated,
            }
        )
    return episodes


def save_as_amago(collected: Collected, trial: TensorDict, path) -> None:
    """The arrays of AMAGO's .npz files, what the environment shows by its prefixed names."""
    space = ActionSpace.from_spec(
        collected.env.full_action_spec_unbatched[collected.env.action_keys[0]]
    )
    vector = space.to_vector(trial["action"]).numpy()
    entries = [*collected.own_keys, "soft_reset"]
    rl2s = np.concatenate([rows_of(trial, "prev_reward"), rows_of(trial, "prev_action")], -1)
    np.savez(
        path,
        **{f"_OBS_KEY_{key}": rows_of(trial, key) for key in entries},
        rl2s=rl2s,
        time_idxs=rows_of(trial, "time_idx"),
        rews=trial["next", "reward"].numpy(),
        dones=trial["next", "terminated"].numpy(),
        actions=vector,
    )


def plain_toy(action: str) -> EnvBase:
    """Without a trial transform; never ends."""
    env = TransformedEnv(Toy(ACTIONS[action]), PreviousStepTransform())
    env.append_transform(InitTracker())
    return env
