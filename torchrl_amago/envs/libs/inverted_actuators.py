"""Continuous control whose actuators may be inverted, which only their effects reveal."""

from __future__ import annotations

from typing import Any, ClassVar, Literal, get_args

import gymnasium as gym
import numpy as np

from torchrl_amago._validation import check_choice, check_counts, check_fractions

Inversion = Literal["all", "each"]


class InvertedActuators(gym.Wrapper):
    """Environment whose actions change sign, by trial or at a hidden step of an episode.

    The signs are the task. Observations don't show them; the policy must compare its actions with
    what they do. Actions are mirrored about the centre of their bounds.

    A reset draws a task from the generator that ``seed`` sets. ``reset(options={"same_task":
    True})`` keeps the signs and starts a new episode, which is what makes trials:
    ``make_trial_env(env, episodes=3, repeat="options", options=InvertedActuators.SAME_TASK)``.
    ``info["task_id"]`` is 1 where the first actuator is inverted at the episode's start, else 0.

    Args:
        env: environment of bounded continuous actions, or the id of one.
        inversion: ``"all"`` actuators change sign together, or ``"each"`` with a sign of its own.
        probability: of an inverted sign.
        change_within: if given, the signs are inverted in addition, all at once, at a step drawn
            from the first ``change_within`` of each episode.
        options: further arguments of ``gymnasium.make``.

    Raises:
        ValueError: if the actions are not bounded numbers.

    Example:
        >>> env = InvertedActuators("Pendulum-v1", probability=1.0)
        >>> _ = env.reset(seed=0)
        >>> env.action(np.array([0.5], np.float32))
        array([-0.5], dtype=float32)
    """

    SAME_TASK: ClassVar = {"same_task": True}

    def __init__(
        self,
        env: gym.Env | str,
        *,
        inversion: Inversion = "all",
        probability: float = 0.5,
        change_within: int | None = None,
        **options: Any,
    ) -> None:
        check_choice("inversion", inversion, get_args(Inversion))
        check_fractions("It is the probability of an inverted sign.", probability=probability)
        if change_within is not None:
            check_counts("It is a number of steps.", change_within=change_within)
        super().__init__(gym.make(env, **options) if isinstance(env, str) else env)
        space = self.action_space
        if not (isinstance(space, gym.spaces.Box) and space.is_bounded("both")):
            raise ValueError(f"actions that can be inverted are bounded numbers, got {space}.")
        self._center = (space.low + space.high) / 2
        self.inversion, self.probability = inversion, probability
        self.change_within = change_within
        self.signs: np.ndarray | None = None
        self._change_at: int | None = None
        self._num_steps = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode with new signs; with the option ``same_task``, with those before."""
        observation, info = self.env.reset(seed=seed)
        if self.signs is None or not (options or {}).get("same_task", False):
            shape = self.action_space.shape if self.inversion == "each" else ()
            inverted = self.np_random.random(shape) < self.probability
            self.signs = np.where(inverted, -1.0, 1.0)
        self._num_steps = 0
        if self.change_within is not None:
            self._change_at = int(self.np_random.integers(self.change_within))
        return observation, {**info, "task_id": self.task_id}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take a step with the action as the actuators receive it."""
        observation, reward, terminated, truncated, info = self.env.step(self.action(action))
        self._num_steps += 1
        return observation, reward, terminated, truncated, {**info, "task_id": self.task_id}

    def action(self, action: np.ndarray) -> np.ndarray:
        """Return what the actuators receive at this step."""
        has_changed = self._change_at is not None and self._num_steps >= self._change_at
        signs = -self.signs if has_changed else self.signs
        return (self._center + signs * (action - self._center)).astype(self.action_space.dtype)

    @property
    def task_id(self) -> int:
        """Return 1 if the first actuator is inverted at the episode's start, else 0."""
        return int(self.signs.flat[0] < 0)
