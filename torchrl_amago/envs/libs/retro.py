"""Console games through stable-retro: several games and levels as tasks."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from torchrl_amago._validation import check_counts
from torchrl_amago.envs.libs._extras import check_known, import_extra


class Retro(gym.Env):
    """A console game (stable-retro, formerly Gym Retro), a level for each trial.

    Observations are pictures, uint8 ``[size, size, 3]``, of any console; actions are
    stable-retro's ``Discrete`` combinations of buttons. Rewards are the game's own.
    ``info["task_id"]`` is the place of the level among the ``levels``.

    An emulator takes a process of its own: ``gymnasium_rows(..., processes=True)``, with a game for
    each row. A reset draws a level from the generator that ``seed`` sets;
    ``reset(options={"same_task": True})`` plays the same one again.

    Args:
        game: stable-retro's name, such as ``"Airstriker-Genesis-v0"``, the one whose ROM it ships.
        levels: names of saved states to begin at; default the game's own.
        frame_skip: frames of a step; rewards are added up.
        size: side of the pictures.
        max_episode_steps: steps until an episode is truncated.
        render_mode: ``"rgb_array"`` for pictures of ``render()``.

    Raises:
        ImportError: if stable-retro isn't installed.
        FileNotFoundError: without the game's ROM.
        ValueError: for an unknown game, or a level that the game doesn't have.

    Example:
        >>> env = Retro("Airstriker-Genesis-v0")  # doctest: +SKIP
    """

    SAME_TASK: ClassVar = {"same_task": True}

    def __init__(
        self,
        game: str,
        levels: Sequence[str] = (),
        *,
        frame_skip: int = 4,
        size: int = 84,
        max_episode_steps: int = 1000,
        render_mode: str | None = None,
    ) -> None:
        check_counts(frame_skip=frame_skip, size=size, max_episode_steps=max_episode_steps)
        retro = import_extra("stable_retro", "retro")
        check_known("game", game, retro.data.list_games())
        known = retro.data.list_states(game)
        if unknown := sorted(set(levels) - set(known)):
            raise ValueError(f"levels must be of {game}, which has {known}, got {unknown}.")
        try:
            self._env = retro.make(
                game, use_restricted_actions=retro.Actions.DISCRETE, render_mode="rgb_array"
            )
        except FileNotFoundError as error:
            raise FileNotFoundError(
                f"{game} needs its ROM, which stable-retro doesn't ship: {error} Import a ROM that "
                "you own: python -m stable_retro.import FOLDER."
            ) from error
        self.levels = tuple(levels) or (self._env.statename.removesuffix(".state"),)
        self.frame_skip, self.size, self.render_mode = frame_skip, size, render_mode
        self.max_episode_steps = max_episode_steps
        self._level: int | None = None
        self._num_steps = 0
        self.observation_space = gym.spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(int(self._env.action_space.n))

    def reset(
        self, *, seed: int | None = None, options: Mapping[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode at a drawn level; with the option ``same_task``, at the one before."""
        super().reset(seed=seed)
        if self._level is None or not (options or {}).get("same_task", False):
            self._level = int(self.np_random.integers(len(self.levels)))
            self._env.load_state(self.levels[self._level])
        self._num_steps = 0
        picture, _ = self._env.reset()
        return self._resized(picture), {"task_id": self._level}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Hold the buttons for ``frame_skip`` frames."""
        total, terminated = 0.0, False
        for _ in range(self.frame_skip):
            picture, reward, terminated, truncated, _ = self._env.step(int(action))
            total += float(reward)
            if terminated or truncated:
                break
        self._num_steps += 1
        truncated = truncated or self._num_steps >= self.max_episode_steps
        info = {"task_id": self._level}
        return self._resized(picture), total, bool(terminated), bool(truncated), info

    def render(self) -> np.ndarray:
        """Return the console's picture ``[H, W, 3]``."""
        return self._env.render()

    def close(self) -> None:
        self._env.close()

    def _resized(self, picture: np.ndarray) -> np.ndarray:
        height, width, channels = picture.shape
        rows, columns = _area_weights(height, self.size), _area_weights(width, self.size)
        short = rows @ picture.reshape(height, -1).astype(np.float32)
        short = short.reshape(self.size, width, channels)
        return np.rint(np.einsum("xw,hwc->hxc", columns, short, optimize=True)).astype(np.uint8)


@functools.lru_cache(maxsize=16)
def _area_weights(size: int, new_size: int) -> np.ndarray:
    """Return weights ``[new_size, size]`` of the pixels that each new pixel covers."""
    edges = np.linspace(0, size, new_size + 1)
    covered = np.clip(edges[1:, None] - np.arange(size), 0, 1)
    covered -= np.clip(edges[:-1, None] - np.arange(size), 0, 1)
    return (covered / covered.sum(1, keepdims=True)).astype(np.float32)
