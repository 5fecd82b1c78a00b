"""The symbolic level of DeepMind's own Alchemy, for comparison with ``SymbolicAlchemy``."""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

LEVEL = "alchemy/perceptual_mapping_randomized_with_rotation_and_random_bottleneck"


class DMAlchemy(gym.Env):
    """Symbolic Alchemy of the package ``dm_alchemy`` (`arXiv <https://arxiv.org/abs/2102.02926>`_).

    Its trial of 20 steps is an episode here, so that a trial of ten is
    ``make_trial_env(env, episodes=10, repeat="options", options=DMAlchemy.SAME_CHEMISTRY)``.
    Observations and actions are those of :class:`~torchrl_amago.envs.tasks.SymbolicAlchemy`, which
    is hundreds to thousands of times as fast. ``seed`` sets the generator that draws the chemistry.

    Args:
        level: name of the level.
        options: further arguments of ``dm_alchemy.symbolic_alchemy.get_symbolic_alchemy_level``,
            such as ``end_trial_action``.

    Raises:
        ImportError: if dm_alchemy isn't installed.

    Example:
        >>> env = DMAlchemy()  # doctest: +SKIP
        >>> observation, info = env.reset(seed=0)  # doctest: +SKIP
    """

    SAME_CHEMISTRY: ClassVar = {"same_chemistry": True}

    def __init__(self, level: str = LEVEL, **options: Any) -> None:
        try:
            from dm_alchemy import symbolic_alchemy
        except ImportError as error:
            raise ImportError(
                "DMAlchemy needs dm_alchemy, which isn't installed, nor on PyPI. Install it from "
                "github.com/google-deepmind/dm_alchemy, or use SymbolicAlchemy, which is the same."
            ) from error
        # A number of trials that is never reached: the caller decides when the chemistry changes.
        options |= {"num_trials": 2**62}
        make_level = symbolic_alchemy.get_symbolic_alchemy_level
        self._make = partial(make_level, level, **options)
        self._level = self._make(seed=0)
        shape = self._level.observation_spec()["symbolic_obs"].shape
        self.observation_space = gym.spaces.Box(-1.0, 2.0, shape, np.float32)
        self.action_space = gym.spaces.Discrete(int(self._level.action_spec().maximum) + 1)
        self._begun = False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode, with a new chemistry unless ``options`` has ``same_chemistry``."""
        super().reset(seed=seed)
        if seed is not None or not self._begun:
            self._level = self._make(seed=int(self.np_random.integers(2**32)))
        if not (self._begun and (options or {}).get("same_chemistry", False)):
            self._level.reset()
        elif not self._level.is_new_trial():
            self._level.end_trial()
        self._begun = True
        return self._observe(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one step; the last one of an episode returns the next episode's observation."""
        reward = self._level.step(int(action)).reward
        return self._observe(), reward, self._level.is_new_trial(), False, {}

    def _observe(self) -> np.ndarray:
        return self._level.observation()["symbolic_obs"].astype(np.float32)
