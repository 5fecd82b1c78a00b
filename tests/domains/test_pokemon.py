"""Pokemon battles against a server that this test starts: `SHOWDOWN` names the folder where npm installed it."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.domains.contract import check_domain, need
from torchrl_amago import make_trial_env
from torchrl_amago.envs import gymnasium_rows
from torchrl_amago.envs.libs import ShowdownServer


@pytest.fixture(scope="module")
def server():
    need("poke_env", "pokemon")
    folder = os.environ.get("SHOWDOWN", "showdown")
    if not Path(folder, "node_modules/pokemon-showdown").exists():
        pytest.skip(f"npm install --prefix {folder} pokemon-showdown")
    with ShowdownServer(folder) as server:
        yield server


def test_battles(server):
    from torchrl_amago.envs.libs.pokemon import PokemonBattles

    make = partial(
        PokemonBattles, server.port, opponents=("random", "max_power"), max_episode_steps=15
    )

    def make_env(rows):
        env = gymnasium_rows(make, rows, success_key="success", task_key="task_id")
        return make_trial_env(env, episodes=2, repeat="options", options=PokemonBattles.SAME_TASK)

    def opponent(steps):
        return steps["task_id"]

    check_domain(
        make_env,
        num_steps=70,
        rows=2,
        same_task=opponent,
        min_rows=0,
        action_mask_key="action_mask",
    )


@pytest.mark.parametrize("battle_format", ["gen1randombattle", "gen9randombattle"])
def test_numbers_stay_in_their_bounds(server, battle_format):
    from torchrl_amago.envs.libs.pokemon import PokemonBattles

    env, rng, wins = PokemonBattles(server.port, battle_format), np.random.default_rng(0), 0
    for _ in range(3):
        observation, info = env.reset(seed=0)
        ended = False
        while not ended:
            assert env.observation_space.contains(observation)
            assert info["success"] is False
            action = rng.choice(np.flatnonzero(observation["action_mask"]))
            observation, reward, terminated, truncated, info = env.step(action)
            ended = terminated or truncated
        assert terminated
        assert (reward > 0) == info["success"]
        wins += info["success"]
    env.close()


def test_without_a_server():
    need("poke_env", "pokemon")
    from torchrl_amago.envs.libs.pokemon import PokemonBattles

    with pytest.raises(ConnectionError, match="Start one: .*ShowdownServer"):
        PokemonBattles(1)
    with pytest.raises(ValueError, match=r"opponents must be some of \['random'"):
        PokemonBattles(1, opponents=("nobody",))


def test_a_folder_without_the_server(tmp_path):
    with pytest.raises(FileNotFoundError, match="npm install --prefix .* pokemon-showdown"):
        ShowdownServer(tmp_path)
