"""Pokemon battles through poke-env, against a Showdown server on this machine.

Importing this module needs the extra: ``pip install "torchrl-amago[pokemon]"``.
"""

from __future__ import annotations

import asyncio
import re
import socket
from collections.abc import Callable
from typing import Any, ClassVar

import gymnasium as gym
import numpy as np

from torchrl_amago._validation import check_counts
from torchrl_amago.envs.libs._extras import needs_extra

with needs_extra("poke-env", "pokemon"):
    from poke_env import ServerConfiguration
    from poke_env.battle import Battle, MoveCategory, Pokemon, PokemonType, Status
    from poke_env.environment import SinglesEnv
    from poke_env.player import (
        MaxBasePowerPlayer,
        Player,
        RandomPlayer,
        SimpleHeuristicsPlayer,
    )

OPPONENTS: dict[str, Callable[..., Player]] = {
    "random": RandomPlayer,
    "max_power": MaxBasePowerPlayer,
    "heuristics": SimpleHeuristicsPlayer,
}
"""Opponents by name: any move, the move of the largest power, and poke-env's rules of thumb."""

_TYPES, _STATUSES = list(PokemonType), list(Status)
_STATS = ("accuracy", "atk", "def", "evasion", "spa", "spd", "spe")
_MAX_POWER = 150.0


class PokemonBattles(gym.Env):
    """Single battles of Pokemon on a Showdown server, an opponent for each trial.

    Observations are ``observation``, float32 ``[281]`` of what a player sees, in [-1, 1]
    (:func:`observe`); and ``action_mask``, int8, 1 for the legal ones of poke-env's actions: switch
    to one of six, or one of four moves, with what the generation adds. The reward is 1 for a
    victory and -1 for a defeat, and up to 0.1 for each fainted Pokemon and each full bar of hit
    points. ``info["success"]`` is True in the last step of a battle that is won;
    ``info["task_id"]`` is the opponent's place among ``opponents``.

    A reset draws an opponent from the generator that ``seed`` sets; the server draws teams and
    luck. ``reset(options={"same_task": True})`` meets the same opponent again, for trials of
    several battles: ``make_trial_env(env, episodes=3, repeat="options",
    options=PokemonBattles.SAME_TASK)``.

    Args:
        port: where the server listens on this machine, such as ``ShowdownServer(...).port``.
        battle_format: a singles format of the server.
        opponents: some of :data:`OPPONENTS`.
        team: team of both sides, in Showdown's text format, if the format isn't of random teams.
        max_episode_steps: decisions until a battle is truncated.

    Raises:
        ValueError: for an unknown opponent, or a format of no generation.
        ConnectionError: if no server answers at the port.

    Example:
        >>> env = PokemonBattles(8000, opponents=("random", "heuristics"))  # doctest: +SKIP
    """

    SAME_TASK: ClassVar = {"same_task": True}

    def __init__(
        self,
        port: int,
        battle_format: str = "gen1randombattle",
        *,
        opponents: tuple[str, ...] = ("random",),
        team: str | None = None,
        max_episode_steps: int = 200,
    ) -> None:
        check_counts(max_episode_steps=max_episode_steps)
        if not re.match(r"gen\d", battle_format):
            raise ValueError(f"battle_format must begin like 'gen9', got {battle_format!r}.")
        if not opponents or set(opponents) - OPPONENTS.keys():
            raise ValueError(f"opponents must be some of {[*OPPONENTS]}, got {opponents}.")
        address = f"127.0.0.1:{port}"
        server = ServerConfiguration(f"ws://{address}/showdown/websocket", "https://unused/?")
        try:
            socket.create_connection(("127.0.0.1", port), timeout=5).close()
        except OSError as error:
            raise ConnectionError(
                f"no Pokemon Showdown server answers at {address}: {error}. Start one: "
                "torchrl_amago.envs.libs.ShowdownServer."
            ) from error
        self._env = BothSides(
            battle_format=battle_format,
            server_configuration=server,
            team=team,
            log_level=50,  # errors reach the caller anyway
            strict=False,
        )
        # Opponents only choose moves: the environment plays both sides.
        options = dict(battle_format=battle_format, start_listening=False)
        self._players = [OPPONENTS[name](**options) for name in opponents]
        self.opponents, self.max_episode_steps = tuple(opponents), max_episode_steps
        self._opponent: int | None = None
        self._num_steps = 0
        self.action_space = self._env.action_spaces[self._env.possible_agents[0]]
        numbers = gym.spaces.Box(-1.0, 1.0, (NUM_FEATURES,), np.float32)
        mask = gym.spaces.MultiBinary(int(self.action_space.n))
        self.observation_space = gym.spaces.Dict(observation=numbers, action_mask=mask)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Begin a battle with a drawn opponent; with the option ``same_task``, the one before."""
        super().reset(seed=seed)
        if self._opponent is None or not (options or {}).get("same_task", False):
            self._opponent = int(self.np_random.integers(len(self._players)))
        self._num_steps = 0
        try:
            entries, _ = self._env.reset()
        except asyncio.TimeoutError as error:
            remedy = "Pass a team, or a format of random teams that the server has."
            raise TimeoutError(f"the server began no battle: {error}. {remedy}") from error
        player = self._players[self._opponent]
        player.reset_battles()
        player._battles[self._env.battle2.battle_tag] = self._env.battle2
        return entries[self._env.agent1.username], self._info(False)

    def step(self, action: int) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Make a decision, as does the opponent."""
        own, other = self._env.agents
        actions = {own: np.int64(action), other: self._opponents_action()}
        entries, rewards, terminated, truncated, _ = self._env.step(actions)
        self._num_steps += 1
        is_over = self._num_steps >= self.max_episode_steps and not terminated[own]
        info = self._info(bool(terminated[own] and self._env.battle1.won))
        return entries[own], rewards[own], terminated[own], truncated[own] or is_over, info

    def close(self) -> None:
        """Forfeit the battle, unless an interrupted step has left nothing to decide."""
        can_forfeit = self._env.agent1_to_move or self._env.agent2_to_move
        self._env.close(force=can_forfeit, wait=can_forfeit)

    def _opponents_action(self) -> np.int64:
        battle = self._env.battle2
        if battle.wait:
            return np.int64(-2)  # nothing to decide
        order = self._players[self._opponent].choose_move(battle)
        return self._env.order_to_action(order, battle, strict=False)

    def _info(self, success: bool) -> dict[str, Any]:
        name = self.opponents[self._opponent]
        return {"success": success, "task": name, "task_id": self._opponent}


class BothSides(SinglesEnv):
    """poke-env's environment, with our observations and rewards; user names begin with its name."""

    def __init__(self, **options: Any) -> None:
        super().__init__(**options)
        box = gym.spaces.Box(-1.0, 1.0, (NUM_FEATURES,), np.float32)
        self.observation_spaces = dict.fromkeys(self.possible_agents, box)

    def embed_battle(self, battle: Battle) -> np.ndarray:
        return observe(battle)

    def calc_reward(self, battle: Battle) -> float:
        return self.reward_computing_helper(battle, fainted_value=0.1, hp_value=0.1)


def observe(battle: Battle) -> np.ndarray:
    """Return what a player sees, float32 ``[281]`` in [-1, 1].

    - the active Pokemon of both sides, 37 numbers each: see ``_describe``, and boosts;
    - the own team in order, 30 numbers each: hit points, fainted, active, status, types... of six;
    - the four moves: power, accuracy, points left, effect on the opponent, special, status move;
    - fractions of both teams that have fainted, and of the opponent's that was seen.
    """
    foe = battle.opponent_active_pokemon
    both = [*_active(battle.active_pokemon), *_active(foe)]
    team = [*battle.team.values()][:6]
    members = [number for member in team for number in _describe(member)]
    members += [0.0] * (6 * len(_describe(None)) - len(members))
    known = [] if battle.active_pokemon is None else [*battle.active_pokemon.moves.values()][:4]
    moves = [number for move in known for number in _describe_move(move, foe)]
    moves += [0.0] * (24 - len(moves))
    seen = [*battle.opponent_team.values()]
    counts = [sum(x.fainted for x in side) / 6 for side in (team, seen)] + [len(seen) / 6]
    return np.clip(np.array([*both, *members, *moves, *counts], np.float32), -1, 1)


def _describe(pokemon: Pokemon | None) -> list[float]:
    """Return hit points, fainted, active, status, types."""
    if pokemon is None:
        return [0.0] * (3 + len(_STATUSES) + len(_TYPES))
    state = [pokemon.current_hp_fraction, pokemon.fainted, pokemon.active]
    statuses = [status is pokemon.status for status in _STATUSES]
    types = [kind in pokemon.types for kind in _TYPES]
    return [float(x) for x in (*state, *statuses, *types)]


def _active(pokemon: Pokemon | None) -> list[float]:
    boosts = [0.0] * len(_STATS) if pokemon is None else [pokemon.boosts[x] / 6 for x in _STATS]
    return _describe(pokemon) + boosts


def _describe_move(move: Any, foe: Pokemon | None) -> list[float]:
    effect = 1.0 if foe is None else foe.damage_multiplier(move)
    special, status = (move.category is x for x in (MoveCategory.SPECIAL, MoveCategory.STATUS))
    left = move.current_pp / max(move.max_pp, 1)
    power, accuracy = move.base_power / _MAX_POWER, float(move.accuracy)
    return [power, accuracy, left, effect / 4, float(special), float(status)]


NUM_FEATURES = 2 * len(_active(None)) + 6 * len(_describe(None)) + 4 * 6 + 3
