"""Adaptation tasks from any environment: the transforms in the order that works."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
from torchrl.envs import ActionScaling, Compose, EnvBase, InitTracker, TransformedEnv

from torchrl_amago.action_space import is_finitely_bounded, is_in_policy_scale
from torchrl_amago.envs.libs._gymnasium_env import GymnasiumEnv
from torchrl_amago.envs.transforms.previous_step import PreviousStepTransform
from torchrl_amago.envs.transforms.trial import TrialTransform


def make_trial_env(
    base: EnvBase | gym.Env | gym.vector.VectorEnv,
    *,
    episodes: int | None = None,
    horizon: int | None = None,
    **trial: Any,
) -> TransformedEnv:
    """Turn an environment into trials of several episodes at one task.

    Returns ``TransformedEnv(base, Compose(TrialTransform(...), PreviousStepTransform(),
    InitTracker()))``, the entries that a policy with memory needs, checked before the first reset.
    Continuous actions with bounds other than -1 and 1 are scaled by TorchRL's ``ActionScaling``
    before :class:`PreviousStepTransform`, so that policies act, and see their actions, in [-1, 1].

    Args:
        base: TorchRL environment, or a Gymnasium environment (wrapped with integer actions).
            Transforms that it already has stay in place, before the new ones. A Gymnasium vector
            environment needs ``autoreset_mode=AutoresetMode.DISABLED``.
        episodes, horizon, trial: length and other arguments of :class:`TrialTransform`.

    Examples:
        >>> env = make_trial_env(gym.make("CartPole-v1"), episodes=5)
        >>> trial = env.rollout(1000)
        >>> int(trial["episode_idx"].max())
        4
    """
    if isinstance(base, gym.Env | gym.vector.VectorEnv):
        base = GymnasiumEnv(base)
    actions = {key: base.full_action_spec[key] for key in base.action_keys}
    scaled = (k for k, x in actions.items() if is_finitely_bounded(x) and not is_in_policy_scale(x))
    scaling = [ActionScaling(in_keys_inv=[key]) for key in scaled]
    after = (*scaling, PreviousStepTransform(), InitTracker())
    transforms = Compose(TrialTransform(episodes, horizon, **trial), *after)
    # Joined with the transforms of `base`, so that no second TransformedEnv slows each step.
    env = TransformedEnv(base, transforms, auto_unwrap=True)
    _ = env.specs
    return env
