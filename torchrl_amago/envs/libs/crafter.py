"""Crafter with instructions: its achievements, asked for in a random sequence."""

from __future__ import annotations

from typing import Any, Literal, get_args

import gymnasium as gym
import numpy as np

from torchrl_amago._validation import check_choice, check_counts
from torchrl_amago.envs.libs._extras import import_extra

View = Literal["pixels", "codes"]
MAX_ACHIEVED = 3  # achievements in one step; more are rare, and the first ones count


class CrafterInstructions(gym.Env):
    """Crafter (arXiv 2109.06780) whose agent is told which achievements to make, in order.

    AMAGO's instruction-conditioned Crafter (arXiv 2310.09971, Section 5.3), without its travel
    goals. An episode has 1 to ``max_goals`` goals, drawn uniformly from Crafter's 22 achievements.
    The reward is 1 for each step that makes the next one; the last one ends the episode, as does
    the agent's death. The world is drawn anew in every episode, from the generator that ``seed``
    sets: the same seed gives the same world and goals.

    Observations:
        - ``pixels``: uint8 ``[64, 64, 3]``, Crafter's picture; or, with ``view="codes"``,
          ``codes``, ids ``[9, 7, 1]`` of what the picture shows in each cell (materials, then
          creatures; 0 beyond the world's edge), and ``body``, float32 ``[20]``: 16 items of the
          inventory divided by 9, the direction the agent faces (2), sleep, daylight.
        - ``goals``: ids ``[max_goals, 1]`` of the achievements, from 1; 0 for those made.
        - ``achieved``: ids ``[3, 1]`` of what the last step achieved, 0 for nothing. It is for
          hindsight (:class:`~torchrl_amago.GoalSequenceRelabel` with ``empty_goal=0``), not for the
          policy: name the others in ``obs_keys``.

    Args:
        view: pixels, or codes, which need no convolutions as large.
        max_goals: largest number of goals.
        max_episode_steps: steps until an episode is truncated.
        render_mode: ``"rgb_array"`` for pictures of ``render()``.

    Raises:
        ImportError: if Crafter isn't installed.

    Example:
        >>> CrafterInstructions(view="codes")  # doctest: +SKIP
    """

    def __init__(
        self,
        view: View = "pixels",
        *,
        max_goals: int = 5,
        max_episode_steps: int = 500,
        render_mode: str | None = None,
    ) -> None:
        check_choice("view", view, get_args(View))
        check_counts("", max_goals=max_goals, max_episode_steps=max_episode_steps)
        crafter = import_extra("crafter", "crafter")
        self._env = crafter.Env(length=max_episode_steps)
        self.achievements = tuple(crafter.constants.achievements)
        self.view, self.max_goals, self.render_mode = view, max_goals, render_mode
        self.max_episode_steps = max_episode_steps
        spaces = gym.spaces
        num_goals = len(self.achievements) + 1
        entries: dict[str, gym.Space] = {
            "goals": spaces.MultiDiscrete(np.full((max_goals, 1), num_goals)),
            "achieved": spaces.MultiDiscrete(np.full((MAX_ACHIEVED, 1), num_goals)),
        }
        if view == "pixels":
            entries["pixels"] = spaces.Box(0, 255, (64, 64, 3), np.uint8)
        else:
            # Materials (nothing included) and the six kinds of creatures.
            num_codes = len(crafter.constants.materials) + 1 + 6
            entries["codes"] = spaces.MultiDiscrete(np.full((9, 7, 1), num_codes))
            entries["body"] = spaces.Box(-1.0, 1.0, (len(crafter.constants.items) + 4,), np.float32)
        self.observation_space = spaces.Dict(entries)
        self.action_space = spaces.Discrete(len(crafter.constants.actions))

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode in a new world with new goals."""
        super().reset(seed=seed)
        # Crafter hashes these two numbers into the seed of the world.
        self._env._seed, self._env._episode = int(self.np_random.integers(2**31)), 0
        picture = self._env.reset()
        num_goals = self.np_random.integers(1, self.max_goals + 1)
        self._goals = np.zeros((self.max_goals, 1), np.int64)
        self._goals[:num_goals, 0] = self.np_random.integers(
            1, len(self.achievements) + 1, num_goals
        )
        self._counts = np.zeros(len(self.achievements), np.int64)
        return self._observe(picture, np.zeros(0, np.int64)), {}

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Take a step; an achievement counts each time it is made."""
        picture, _, done, info = self._env.step(int(action))
        counts = np.array([info["achievements"][name] for name in self.achievements])
        achieved = np.flatnonzero(counts > self._counts) + 1
        self._counts = counts
        left = np.flatnonzero(self._goals[:, 0])
        reward = bool(self._goals[left[0], 0] in achieved[:MAX_ACHIEVED])
        if reward:
            self._goals[left[0]] = 0
        is_dead = info["discount"] == 0.0
        terminated = is_dead or not self._goals.any()
        truncated = done and not terminated
        return self._observe(picture, achieved), float(reward), terminated, truncated, {}

    def render(self) -> np.ndarray:
        """Return a picture ``[252, 252, 3]``."""
        return self._env.render((252, 252))

    def goal_names(self) -> list[str]:
        """Return the names of the goals that are left, in order."""
        return [self.achievements[goal - 1] for goal in self._goals[:, 0] if goal]

    def _observe(self, picture: np.ndarray, achieved: np.ndarray) -> dict[str, np.ndarray]:
        padded = np.zeros((MAX_ACHIEVED, 1), np.int64)
        padded[: len(achieved), 0] = achieved[:MAX_ACHIEVED]
        entries = {"goals": self._goals.copy(), "achieved": padded}
        if self.view == "pixels":
            return entries | {"pixels": picture}
        player, world = self._env._player, self._env._world
        around = np.pad(self._env._sem_view(), ((4, 4), (3, 3)))
        x, y = player.pos
        state = [*player.facing, float(player.sleeping), world.daylight]
        body = np.array([*(n / 9 for n in player.inventory.values()), *state], np.float32)
        return entries | {
            "codes": around[x : x + 9, y : y + 7, None].astype(np.int64),
            "body": body,
        }
