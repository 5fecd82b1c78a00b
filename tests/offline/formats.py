"""Trials as a collector writes them, and the same ones in every format that can be read."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

import gymnasium as gym
import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs import Compose, EnvBase, InitTracker, TransformedEnv

from tests.toy_env import ACTIONS, Toy
from torchrl_amago import DarkKeyDoor, MetaFrozenLake, PreviousStepTransform, make_trial_env
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.data import TrialCollector, make_trial_buffer
from torchrl_amago.offline import OfflineReport, RecordedEnv, TrajectoryError, load_trials
from torchrl_amago.offline.trajectory import TrajectoryChecker

NUMBER, ANSWER = Unbounded((1,)), Bounded(-1.0, 1.0, (1,))


class Collected(NamedTuple):
    """Trials of one of `ENVS`."""

    name: str
    env: EnvBase
    trials: list[TensorDict]
    own_keys: list  # entries of the task, without those of transforms


def vector_env(env_id: str, steps: int, rows=3, trial_end="episode", **options) -> EnvBase:
    rows = [lambda: gym.make(env_id, max_episode_steps=steps)] * rows
    together = gym.vector.SyncVectorEnv(rows, autoreset_mode="Disabled")
    return make_trial_env(together, trial_end=trial_end, **options)


def toy_env(action: TensorSpec, rows=3) -> EnvBase:
    return make_trial_env(Toy(action, rows), horizon=7, trial_end="truncated")


ENVS = {
    "lake": lambda: make_trial_env(MetaFrozenLake(batch_size=(4,), seed=0), episodes=3),
    "room": lambda: make_trial_env(
        DarkKeyDoor(3, max_episode_steps=5, batch_size=(4,), seed=0), horizon=12
    ),
    "pendulum": lambda: vector_env("Pendulum-v1", 9, episodes=1),
    "cart pole": lambda: vector_env("CartPole-v1", 12, episodes=2),
    "cart pole once": lambda: vector_env("CartPole-v1", 15, episodes=1, show_progress=False),
    **{f"toy {name}": lambda name=name: toy_env(ACTIONS[name]) for name in ACTIONS},
}


def collect(name: str) -> Collected:
    """At least a few complete trials with random actions."""
    torch.manual_seed(0)
    env = ENVS[name]()
    env.set_seed(0)
    buffer = make_trial_buffer(3000, slice_length=4, batch_size=2, warn_short=False)
    frames = 30 * env.batch_size.numel()
    options = dict(replay_buffer=buffer, frames_per_batch=frames, total_frames=3 * frames)
    list(TrialCollector(env, env.rand_action, **options))
    return Collected(name, env, split(buffer[:]), TrajectoryChecker(env).given)


def split(steps: TensorDict) -> list[TensorDict]:
    """Steps side by side as a list of trials."""
    ends = steps["next", "done"].reshape(-1).nonzero().reshape(-1).tolist()
    starts = [0, *(end + 1 for end in ends[:-1])]
    return [steps[start : end + 1] for start, end in zip(starts, ends, strict=True)]


def rows_of(trial: TensorDict, key) -> np.ndarray:
    return torch.cat([trial[key], trial["next", key][-1:]]).numpy()


def episodes_of(collected: Collected, trial: TensorDict) -> Iterator[dict]:
    """The trial cut into its episodes, as mappings of arrays with what the task shows alone."""
    begins = trial["soft_reset"].reshape(-1).nonzero().reshape(-1).tolist()
    action = trial["action"].numpy()
    if collected.name == "pendulum":
        action = 2.0 * action  # as the environment under the transforms took them
    for start, stop in zip(begins, [*begins[1:], len(trial)], strict=True):
        observations = {}
        for key in collected.own_keys:
            rows = rows_of(trial, key)[start : stop + 1].copy()
            if stop < len(trial):
                rows[-1] = rows[0]  # what the episode led to isn't known: the next one's is there
            observations[key] = rows
        last = np.arange(start, stop) == stop - 1
        truncated = bool(trial["next", "truncated"][-1]) and stop == len(trial)
        yield {
            "observations": observations,
            "actions": action[start:stop],
            "rewards": trial["next", "reward"][start:stop].numpy().reshape(-1),
            "terminations": last & (not truncated),
            "truncations": last & truncated,
        }


def save_as_amago(collected: Collected, trial: TensorDict, path) -> None:
    """The arrays of AMAGO's .npz files, what the environment shows by its prefixed names."""
    space = ActionSpace.from_spec(collected.env.full_action_spec_unbatched["action"])
    np.savez(
        path,
        **{f"_OBS_KEY_{key}": rows_of(trial, key) for key in [*collected.own_keys, "soft_reset"]},
        rl2s=np.concatenate([rows_of(trial, "prev_reward"), rows_of(trial, "prev_action")], -1),
        time_idxs=rows_of(trial, "time_idx"),
        rews=trial["next", "reward"].numpy(),
        dones=trial["next", "terminated"].numpy(),
        actions=space.to_vector(trial["action"]).numpy(),
    )


def two_steps(after: dict | None = None, **root) -> TensorDict:
    """A trial as a collector would write it, with some entries, or what is under next, changed."""
    done = torch.tensor([[False], [True]])
    following = {"observation": torch.tensor([[1.0], [2.0]]), "reward": torch.ones(2, 1)}
    before = {"observation": torch.tensor([[0.0], [1.0]]), "action": torch.zeros(2, 1)}
    following = TensorDict({**following, "done": done, **(after or {})}, [2])
    return TensorDict({**before, **root, "next": following}, [2])


def recorded(action: TensorSpec = ANSWER, **observation: TensorSpec) -> RecordedEnv:
    """An environment of specs alone: by default one number to see, and one to answer."""
    return RecordedEnv(Composite(observation or {"observation": NUMBER}), action)


def plain_env(action: TensorSpec = ANSWER, **observation: TensorSpec) -> EnvBase:
    """Its trials are its episodes."""
    transforms = Compose(PreviousStepTransform(), InitTracker())
    return TransformedEnv(recorded(action, **observation), transforms)


def trial_env(episodes=None, horizon=None, trial_end="terminated", **specs: TensorSpec) -> EnvBase:
    rule = dict(episodes=episodes, horizon=horizon, trial_end=trial_end)
    return make_trial_env(recorded(**specs), **rule)


def load(trajectories, env: EnvBase, **options) -> tuple[TensorDict, OfflineReport]:
    """The steps of a buffer into which trajectories were loaded, and the report."""
    buffer = make_trial_buffer(4000, slice_length=2, batch_size=1, warn_short=False)
    report = load_trials(buffer, trajectories, env, **options)
    return buffer[:], report


def wrong(count: str, first: int, value: str = "") -> str:
    rule = "must be finite numbers in the environment's space, and"
    return re.escape(f"{rule} {count} aren't, the first at step {first}: {value}")


def shape(wanted: list[int], got: list[int]) -> str:
    return re.escape(f"must have the shape {wanted}, got {got}")


def assert_bad_one_is_named(trajectories, env: EnvBase, bad: int, message: str) -> OfflineReport:
    """The bad one of several is named, or left out."""
    with pytest.raises(TrajectoryError, match=f"trajectory {bad}: .*{message}"):
        load(trajectories, env)
    steps, report = load(trajectories, env, on_error="skip")
    assert list(report.skipped) == [bad]
    assert len(steps) == sum(report.lengths)
    return report
