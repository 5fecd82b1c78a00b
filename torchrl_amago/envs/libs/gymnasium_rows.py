"""Gymnasium environments as rows of one batch, and new randomness at a repeated task."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv
from torchrl.envs import EnvBase

from torchrl_amago._validation import check_counts
from torchrl_amago.envs.libs._gymnasium_env import GymnasiumEnv

Game = str | Callable[[], gym.Env]


def gymnasium_rows(
    games: Game | Sequence[Game] | Mapping[str, Game],
    num_envs: int | None = None,
    *,
    processes: bool = False,
    seed: int | None = None,
    reseed_episodes: bool = False,
    success_key: str | None = None,
    task_key: str | None = None,
    task_names: Sequence[str] = (),
    **options: Any,
) -> EnvBase:
    """Make a TorchRL environment ``[num_envs]`` of Gymnasium environments, for `make_trial_env`.

    Specs are those of one environment's spaces: Box, Discrete, MultiDiscrete and MultiBinary,
    nested in Dict and Tuple. An observation that isn't a Dict or Tuple is called ``observation``;
    ``action_mask``, in it or in ``info``, is an entry of bools (``make_policy(...,
    action_mask_key="action_mask")``).

    Args:
        games: an id (``module:id`` imports the module that registers it first), a function that
            makes an environment, or several of them with equal spaces: row i plays game i modulo
            their number. The keys of a mapping name the games.
        num_envs: rows; by default one of each game.
        processes: step every row in a process of its own, for slow environments. TorchRL spawns
            processes: scripts need ``if __name__ == "__main__":``.
        seed: as for ``set_seed(seed)``.
        reseed_episodes: wrap each environment in :class:`ReseedEpisodes`.
        success_key: name in ``info`` of a flag that marks success. An episode succeeds if the flag
            is true at any of its steps; :func:`~torchrl_amago.evaluation.evaluate` counts that.
        task_key: name in ``info`` of the task's number; by default the game's, if there are
            several. It is the entry ``task_id`` of the trials, and hidden from policies.
        task_names: names of these numbers, from 0. ``evaluate`` reports results by name, and by
            group, the part before the first slash (``"train/reach"``).
        options: of ``gymnasium.make``, for ids.

    Raises:
        ValueError: if a space can't be a tensor, as text can't.
        gymnasium.error.UnregisteredEnv: if an id is unknown.

    Example:
        >>> from torchrl_amago.envs import make_trial_env
        >>> env = make_trial_env(gymnasium_rows("CartPole-v1", 8, seed=0), episodes=2)
        >>> env.rollout(3)["observation"].shape
        torch.Size([8, 3, 4])
    """
    if isinstance(games, Mapping):
        task_names, games = tuple(games), list(games.values())
    elif isinstance(games, str) or callable(games):
        games = [games]
    else:
        names = (game if isinstance(game, str) else str(i) for i, game in enumerate(games))
        task_names = tuple(task_names) or tuple(names)
    check_counts("It is the number of games.", games=len(games))
    row_games = [row % len(games) for row in range(num_envs or len(games))]
    # Not a function of this package, which would import torch in each process.
    make = [partial(gym.make, game, **options) if isinstance(game, str) else game for game in games]
    if reseed_episodes:
        make = [partial(_reseeded, make_one) for make_one in make]
    if processes:  # an error here is easier to read than one in a process
        for make_one in make[1:]:
            make_one().close()
    vector = AsyncVectorEnv if processes else SyncVectorEnv
    env = GymnasiumEnv(
        vector([make[game] for game in row_games], autoreset_mode=AutoresetMode.DISABLED),
        success_key=success_key,
        task_key=task_key,
        row_tasks=row_games if task_names and task_key is None else (),
        task_names=task_names,
    )
    if seed is not None:
        env.set_seed(seed)
    return env


class ReseedEpisodes(gym.Wrapper):
    """An environment whose reset seed decides the task alone, not the luck of its episodes.

    The n-th reset in a row with the same seed draws the level from that seed, as it would without
    this wrapper; after it, the environment's ``np_random`` is seeded with (seed, n). So the
    episodes of a trial with ``repeat="seed"`` have the same level and different chances.

    This works for environments that draw the level in ``reset`` and the rest in ``step``, both from
    Gymnasium's ``np_random`` (MiniGrid's moving obstacles, slippery floors). It changes nothing for
    those that draw all in ``reset`` (a shuffled deck of cards) or from generators of their own
    (Atari, Procgen). If the game itself is the task, repeat it without any seed:
    ``make_trial_env(..., repeat="options", options={})``.

    Example:
        >>> env = ReseedEpisodes(gym.make("FrozenLake-v1", is_slippery=True))
        >>> env.reset(seed=3)[0], env.reset(seed=3)[0]
        (0, 0)
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self._seed: int | None = None
        self._episode = 0

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        out = self.env.reset(seed=seed, options=options)
        self._episode = self._episode + 1 if seed == self._seed else 0
        self._seed = seed
        if seed is not None:
            # Not the public property, which would forget the seed.
            self.unwrapped._np_random = np.random.default_rng([seed, self._episode])
        return out


def _reseeded(make_one: Callable[[], gym.Env]) -> gym.Env:
    return ReseedEpisodes(make_one())
