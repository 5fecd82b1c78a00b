"""Procgen: sixteen games whose levels are generated, played through EnvPool."""

from __future__ import annotations

from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from torchrl_amago._validation import check_choice, check_counts
from torchrl_amago.envs.libs._extras import import_extra

_MODES = ("easy", "hard", "memory", "exploration", "extreme")


class Procgen(gym.Env):
    """One of Procgen's games (arXiv 1912.01588), a level for each trial.

    Observations are pictures, uint8 ``[3, 64, 64]``; actions one of 15. ``info["task_id"]`` is the
    level's seed.

    A reset draws a level from the generator that ``seed`` sets. ``reset(options={"same_task":
    True})`` plays the same level again, from its start, which is what makes trials:
    ``make_trial_env(env, episodes=2, repeat="options", options=Procgen.SAME_TASK)``.

    Args:
        game: name, such as ``"coinrun"`` or ``"maze"``.
        mode: ``"easy"`` or ``"hard"``; some games have ``"memory"``, ``"extreme"``, or
            ``"exploration"``, which has one level.
        num_levels: levels to draw from; None for all. The paper trains on 200 easy or 500 hard
            ones.
        start_level: first of them. Levels to test on begin where those to train on end.
        max_episode_steps: steps until an episode is truncated; Procgen's own limit is 1000.
        render_mode: ``"rgb_array"`` for pictures of ``render()``.

    Raises:
        ImportError: if EnvPool isn't installed, or its Qt library.
        ValueError: for a game or mode that doesn't exist.

    Example:
        >>> env = Procgen("maze", "memory", num_levels=500)  # doctest: +SKIP
    """

    SAME_TASK: ClassVar = {"same_task": True}
    metadata: ClassVar = {"render_modes": ["rgb_array"]}

    def __init__(
        self,
        game: str,
        mode: str = "easy",
        *,
        num_levels: int | None = None,
        start_level: int = 0,
        max_episode_steps: int = 1000,
        render_mode: str | None = None,
    ) -> None:
        if mode == "exploration":
            num_levels, start_level = 1, 0
        levels = 1 if num_levels is None else num_levels
        check_counts(max_episode_steps=max_episode_steps, num_levels=levels)
        self._make = _find(game, mode)
        self.num_levels, self.start_level = num_levels, start_level
        self.max_episode_steps, self.render_mode = max_episode_steps, render_mode
        self.level: int | None = None
        self._pool: Any = None
        self._num_steps = 0
        self._picture: np.ndarray | None = None
        self.observation_space = gym.spaces.Box(0, 255, (3, 64, 64), np.uint8)
        self.action_space = gym.spaces.Discrete(15)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode at a new level; with the option ``same_task``, at the one before."""
        super().reset(seed=seed)
        if self.level is None or not (options or {}).get("same_task", False):
            stop = np.iinfo(np.int32).max
            if self.num_levels is not None:
                stop = self.start_level + self.num_levels
            self.level = int(self.np_random.integers(self.start_level, stop))
        # A pool of one row and one level, made anew (1 ms): a pool's own reset isn't repeatable.
        self.close()
        self._pool = self._make(self.level)
        self._num_steps = 0
        observation, _ = self._pool.reset()
        self._picture = observation[0]
        return self._picture, {"task_id": self.level}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Take one step of the game."""
        results = self._pool.step(np.array([action], np.int32))
        self._picture, reward, terminated, truncated = (result[0] for result in results[:4])
        self._num_steps += 1
        is_over = bool(truncated) or self._num_steps >= self.max_episode_steps
        info = {"task_id": self.level}
        return self._picture, float(reward), bool(terminated), is_over, info

    def render(self) -> np.ndarray:
        """Return a picture ``[256, 256, 3]``."""
        return self._picture.transpose(1, 2, 0).repeat(4, 0).repeat(4, 1)

    def close(self) -> None:
        if self._pool is not None:
            self._pool.close()
            self._pool = None


def _id_of(game: str, mode: str) -> str:
    return f"{game.title()}{mode.title()}-v0"


def _find(game: str, mode: str) -> Any:
    """Return the function that makes a pool of this game."""
    envpool = import_extra("envpool", "procgen")
    ids = set(envpool.list_all_envs())
    games = sorted(i.removesuffix("Easy-v0").lower() for i in ids if i.endswith("Easy-v0"))
    check_choice("game", game, games)
    modes = [mode for mode in _MODES if _id_of(game, mode) in ids]
    check_choice("mode", mode, modes, f"These are the modes of {game}.")

    def make(level: int) -> Any:
        num_levels = int(mode != "exploration")  # EnvPool aborts otherwise
        options = dict(num_envs=1, num_levels=num_levels, start_level=level)
        try:
            return envpool.make_gymnasium(_id_of(game, mode), **options)
        except ImportError as error:
            remedy = "Install the system's Qt: apt install libqt5gui5."
            raise ImportError(f"Procgen needs a library: {error}. {remedy}") from error

    return make
