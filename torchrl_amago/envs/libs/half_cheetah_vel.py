"""Half-Cheetah with a hidden target velocity, the usual first benchmark of continuous meta-RL."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from torchrl_amago.envs.libs._extras import needs_extra


class HalfCheetahVel(gym.Wrapper):
    """Half-Cheetah with a hidden target velocity (MAML, arXiv 1703.03400, Section 5.3)::

        target ~ U[min_velocity, max_velocity]                          one per task, never observed
        reward = -|velocity - target| - ctrl_cost_weight * |action|^2    velocity along x, in m/s

    Targets of up to 3 m/s and half of Half-Cheetah's own cost of actions are those of PEARL (arXiv
    1903.08254) and VariBAD (arXiv 1910.08348). Physics and observations, 17 numbers in float64, are
    those of Gymnasium's ``HalfCheetah-v5``; actions are six torques in [-1, 1].

    A reset draws a task. ``reset(options={"same_target": True})`` stays at it, which makes trials:
    ``make_trial_env(env, episodes=3, repeat="options", options=HalfCheetahVel.SAME_TARGET)``.

    Args:
        max_episode_steps: steps until the time limit truncates an episode.
        min_velocity, max_velocity: lowest and highest target in m/s.
        ctrl_cost_weight: cost of actions.
        options: further arguments of ``gymnasium.make("HalfCheetah-v5")``, such as ``render_mode``.

    Raises:
        ImportError: if MuJoCo isn't installed.

    Example:
        >>> env = HalfCheetahVel()  # doctest: +SKIP
        >>> observation, info = env.reset(options={"target_velocity": 1.5})  # doctest: +SKIP
    """

    SAME_TARGET: ClassVar = {"same_target": True}

    def __init__(
        self,
        max_episode_steps: int = 200,
        min_velocity: float = 0.0,
        max_velocity: float = 3.0,
        ctrl_cost_weight: float = 0.05,
        **options: Any,
    ) -> None:
        if not min_velocity <= max_velocity:
            raise ValueError(
                "min_velocity must be at most max_velocity, got "
                f"min_velocity={min_velocity}, max_velocity={max_velocity}."
            )
        options |= {"max_episode_steps": max_episode_steps, "ctrl_cost_weight": ctrl_cost_weight}
        with needs_extra("MuJoCo", "mujoco", gym.error.DependencyNotInstalled):
            env = gym.make("HalfCheetah-v5", **options)
        super().__init__(env)
        self.min_velocity, self.max_velocity = min_velocity, max_velocity
        self.target_velocity: float | None = None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode at a new task; options: ``same_target``, ``target_velocity``."""
        options = options or {}
        # Not passed on: the simulation has no such options.
        observation, info = self.env.reset(seed=seed)
        if "target_velocity" in options:
            self.target_velocity = float(options["target_velocity"])
        elif self.target_velocity is None or not options.get("same_target", False):
            target = self.np_random.uniform(self.min_velocity, self.max_velocity)
            self.target_velocity = float(target)
        return observation, info

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one step of 0.05 s.

        ``info`` has ``x_velocity``, and the reward's parts ``reward_target`` and ``reward_ctrl``.
        """
        observation, _, terminated, truncated, info = self.env.step(action)
        info["reward_target"] = -abs(float(info["x_velocity"]) - self.target_velocity)
        reward = info["reward_target"] + float(info["reward_ctrl"])
        return observation, reward, terminated, truncated, info
