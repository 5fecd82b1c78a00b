"""One line from an environment to an adaptation task: the transforms in the order that works."""

from __future__ import annotations

from typing import Literal

import gymnasium as gym
from torchrl.envs import Compose, EnvBase, GymWrapper, InitTracker, TransformedEnv

from torchrl_amago.envs.transforms.previous_step import PreviousStepTransform
from torchrl_amago.envs.transforms.repeat import RepeatMode, ResetOptions
from torchrl_amago.envs.transforms.trial import TrialTransform

__all__ = ["make_trial_env"]


def make_trial_env(
    base: EnvBase | gym.Env | gym.vector.VectorEnv,
    *,
    episodes: int | None = None,
    horizon: int | None = None,
    repeat: RepeatMode | None = None,
    options: ResetOptions | None = None,
    show_progress: bool = True,
    trial_end: Literal["terminated", "truncated"] = "terminated",
) -> TransformedEnv:
    """Turn an environment into trials of several attempts at one task.

    Returns ``TransformedEnv(base, Compose(TrialTransform(...), PreviousStepTransform(),
    InitTracker()))``: what a policy with memory needs, checked before the first reset.

    Args:
        base: TorchRL environment, or a Gymnasium environment (wrapped with integer actions).
            Transforms that it already has stay in place, before the new ones. A Gymnasium vector
            environment needs ``autoreset_mode=AutoresetMode.DISABLED``.
        episodes: number of attempts; likewise the arguments below, see :class:`TrialTransform`.

    Raises:
        ValueError: if the arguments don't describe a trial, the environment cannot repeat a task,
            or its action space is not supported.

    Examples:
        >>> import gymnasium as gym
        >>> from torchrl_amago.envs.transforms import make_trial_env
        >>> env = make_trial_env(gym.make("CartPole-v1"), episodes=5)
        >>> trial = env.rollout(1000)
        >>> int(trial["episode_idx"].max())
        4
    """
    if isinstance(base, gym.Env | gym.vector.VectorEnv):
        base = GymWrapper(base, categorical_action_encoding=True)
    trial = TrialTransform(
        episodes,
        horizon,
        repeat=repeat,
        options=options,
        show_progress=show_progress,
        trial_end=trial_end,
    )
    # Joined with the transforms of `base`, so that no second TransformedEnv slows each step.
    env = TransformedEnv(
        base, Compose(trial, PreviousStepTransform(), InitTracker()), auto_unwrap=True
    )
    _ = env.specs
    return env
