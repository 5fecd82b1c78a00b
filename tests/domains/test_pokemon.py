"""Pokemon battles, and their logs, against a server that this test starts.

The variable `SHOWDOWN` names the folder where npm installed it.
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from tests.domains.contract import check_domain, need
from torchrl_amago import make_trial_buffer, make_trial_env
from torchrl_amago.envs import gymnasium_rows
from torchrl_amago.envs.libs import ShowdownServer
from torchrl_amago.offline import TrajectoryError, load_trials, read_showdown_logs

EXAMPLE = Path(__file__).parents[2] / "examples/15_pokemon.py"
# Where `observe` puts the active Pokemon of both sides, the own team, and the moves.
NUM_ACTIVE, NUM_MEMBER, NUM_MOVE = 74, 30, 6
LOG = """
|gametype|singles
|player|p1|Red|1|
|player|p2|Blue|2|
|gen|1
|tier|[Gen 1] OU
|
|teamsize|p1|6
|teamsize|p2|6
|start
|switch|p1a: Sparky|Pikachu|100/100
|switch|p2a: Snorlax|Snorlax|100/100
|turn|1
|
|move|p1a: Sparky|Thunderbolt|p2a: Snorlax
|-damage|p2a: Snorlax|70/100
|move|p2a: Snorlax|Body Slam|p1a: Sparky
|-damage|p1a: Sparky|40/100
|c|Blue|that hurt
|
|upkeep
|turn|2
|
|switch|p1a: Starmie|Starmie|100/100
|move|p2a: Snorlax|Rest|p2a: Snorlax
|-heal|p2a: Snorlax|100/100 slp|[silent]
|
|upkeep
|turn|3
|
|cant|p1a: Starmie|par
|cant|p2a: Snorlax|slp
|
|upkeep
|turn|4
|
|move|p2a: Snorlax|Self-Destruct|p1a: Starmie
|-damage|p1a: Starmie|0 fnt
|faint|p1a: Starmie
|
|switch|p1a: Sparky|Pikachu|40/100
|turn|5
|
|move|p1a: Sparky|Body Slam|p2a: Snorlax
|-damage|p2a: Snorlax|0 fnt
|faint|p2a: Snorlax
|
|win|Red
"""


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
    with pytest.raises(ValueError, match="battle_format must begin like 'gen9', got 'ou'"):
        PokemonBattles(1, "ou")
    with pytest.raises(ValueError, match=r"opponents must be some of \['random'"):
        PokemonBattles(1, opponents=("nobody",))


def test_a_folder_without_the_server(tmp_path):
    with pytest.raises(FileNotFoundError, match="npm install --prefix .* pokemon-showdown"):
        ShowdownServer(tmp_path)


@pytest.mark.parametrize("name", ["battle.log", "battle.json", "battle.log.json", "battle.html"])
def test_a_log_by_hand(tmp_path, name):
    need("poke_env", "pokemon")

    logs = {
        "battle.log": LOG,
        "battle.json": json.dumps({"log": LOG}),
        "battle.log.json": json.dumps({"log": LOG.splitlines()}),
        "battle.html": f'<p>a</p><script class="battle-log-data">{LOG}</script>',
    }
    (tmp_path / name).write_text(logs[name])
    source = read_showdown_logs(tmp_path / name, player="red", task_id=2)
    (trajectory,) = source
    # Moves and members in the order in which they appear: what happened in turns 3 and 4 is hidden.
    assert trajectory.action.tolist() == [6, 1, 0, 7]
    assert source.skipped == {0: 2}
    assert trajectory.terminated.tolist() == [False, False, False, True]
    assert not trajectory.truncated.any()
    mask = trajectory.observation["action_mask"]
    assert [np.flatnonzero(row).tolist() for row in mask[:4]] == [
        [1, 6, 7],
        [1, 6, 7],
        [0],
        [6, 7],
    ]
    hit_points = trajectory.observation["observation"][:, NUM_ACTIVE::NUM_MEMBER][:, :2]
    np.testing.assert_allclose(hit_points[:4], [[1, 1], [0.4, 1], [0.4, 0], [0.4, 0]], atol=1e-6)
    # 0.1 for each faint and each bar of hit points, and 1 for the victory.
    np.testing.assert_allclose(trajectory.reward, [-0.03, -0.23, 0.0, 1.2], atol=1e-6)
    assert trajectory.observation["success"].tolist() == [False] * 4 + [True]
    assert trajectory.observation["task_id"].tolist() == [2] * 5


def test_bad_logs(tmp_path):
    need("poke_env", "pokemon")

    file = tmp_path / "battle.log"
    with pytest.raises(FileNotFoundError, match="battle.log isn't there"):
        read_showdown_logs(file)
    for text, problem in {
        LOG.replace("singles", "doubles"): "singles",
        LOG.replace("Red", "Green"): "one of .*Green",
        LOG.replace("|switch|p2a: Snorlax|Snorlax", "|switch|p2a: Snorlax|Agumon"): "agumon",
        "": "singles",
    }.items():
        file.write_text(text)
        with pytest.raises(TrajectoryError, match=rf"battle.log must be the log .*{problem}"):
            read_showdown_logs(file, player="Red")[0]


@pytest.mark.parametrize("battle_format", ["gen1randombattle", "gen9randombattle"])
def test_logs_show_the_actions_taken(server, tmp_path, battle_format):
    from poke_env import ServerConfiguration
    from poke_env.environment import SinglesEnv
    from poke_env.player import RandomPlayer

    from torchrl_amago.envs.libs.pokemon import PokemonBattles, observe

    taken = {}

    class Recorder(RandomPlayer):
        def choose_move(self, battle):
            order = super().choose_move(battle)
            action = SinglesEnv.order_to_action(order, battle, strict=False)
            taken.setdefault(battle.battle_tag, []).append((observe(battle), int(action)))
            return order

    address = f"ws://127.0.0.1:{server.port}/showdown/websocket"
    options = dict(
        battle_format=battle_format,
        server_configuration=ServerConfiguration(address, "https://unused/?"),
    )
    player = Recorder(**options, save_replays=str(tmp_path))
    asyncio.run(player.battle_against(RandomPlayer(**options), n_battles=3))
    files = sorted(tmp_path.glob("*.html"))
    source = read_showdown_logs(files, player=player.username)
    trajectories = [*source]
    for number, trajectory in enumerate(trajectories):
        tag = files[number].stem.split(" - ")[1]
        decisions, observation = taken[tag], trajectory.observation["observation"]
        assert len(trajectory) + source.skipped[number] == len(decisions)
        assert len(trajectory) > 0.6 * len(decisions)
        assert trajectory.terminated[-1]
        assert trajectory.observation["success"][-1] == player.battles[tag].won
        assert (trajectory.reward.sum() > 0) == player.battles[tag].won
        shown = [chosen(*pair) for pair in zip(observation, trajectory.action, strict=False)]
        rest = iter([chosen(*pair) for pair in decisions])
        # Hit points may differ: some Pokemon heal when they leave, which nobody sees.
        assert all(any(np.allclose(x, y, atol=1e-5) for y in rest) for x in shown)

    make = partial(PokemonBattles, server.port, battle_format)
    rows = gymnasium_rows(make, 1, success_key="success", task_key="task_id")
    env = make_trial_env(rows, episodes=3, repeat="options", options=PokemonBattles.SAME_TASK)
    buffer = make_trial_buffer(2000, slice_length=8, batch_size=2)
    report = load_trials(buffer, source, env, progress_bar=False)
    assert report.lengths == [sum(map(len, trajectories))]
    env.close()


def chosen(observation, action):
    """Return whether a move was chosen, what it or the member is, and the Pokemon that chose."""
    start = NUM_ACTIVE + NUM_MEMBER * action + 1
    if action >= 6:
        start = NUM_ACTIVE + 6 * NUM_MEMBER + NUM_MOVE * ((action - 6) % 4)
    size = NUM_MEMBER - 1 if action < 6 else NUM_MOVE
    kind = np.zeros(NUM_MEMBER)
    kind[:size] = observation[start : start + size]
    return np.array([action >= 6, *kind, *observation[1 : NUM_ACTIVE // 2]])


def run_example(*flags):
    command = [sys.executable, str(EXAMPLE), *flags]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_the_example(server, tmp_path):
    folder, run = os.environ.get("SHOWDOWN", "showdown"), tmp_path / "run"
    done = run_example("--debug", "--showdown", folder, "--run-dir", str(run), "--threads", "1")
    assert done.returncode == 0, done.stderr
    assert "No trial.png, since this environment has no pictures." in done.stdout
    assert "Traceback" not in done.stderr
    assert (run / "policy.npz").exists()


def test_the_example_without_a_server(tmp_path):
    need("poke_env", "pokemon")
    done = run_example("--showdown", str(tmp_path))
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: ")
    assert f"npm install --prefix {tmp_path} pokemon-showdown" in line
