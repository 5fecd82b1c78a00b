"""Games: POPGym's, Atari's, Procgen's and a console's."""

from __future__ import annotations

from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.domains.contract import check_domain, check_pictures, need
from torchrl_amago import make_trial_env
from torchrl_amago.envs import gymnasium_rows
from torchrl_amago.envs.libs import MultiDomain, Procgen, Retro

SAME_TASK = dict(repeat="options", options={"same_task": True})
IMAGE = dict(timestep_encoder="combined", timestep_options={"hidden_size": 16, "output_size": 16})
CHANNELS_FIRST = {"entries": {"observation": {"channels_first": True}}, **IMAGE["timestep_options"]}


def popgym(name):
    need("popgym", "popgym")
    import popgym  # noqa: F401 - registers the ids

    return gym.make(f"popgym-{name}-v0")


# One of each kind of space and family.
@pytest.mark.parametrize(
    "name",
    [
        "RepeatPreviousEasy",
        "AutoencodeEasy",
        "BattleshipEasy",
        "MineSweeperEasy",
        "ConcentrationEasy",
        "CountRecallEasy",
        "HigherLowerEasy",
        "MultiarmedBanditEasy",
        "PositionOnlyPendulumEasy",
        "LabyrinthExploreEasy",
    ],
)
def test_popgym(name):
    popgym(name).close()
    make = lambda: gym.wrappers.TimeLimit(popgym(name), 12)  # noqa: E731
    env = lambda rows: make_trial_env(gymnasium_rows(make, rows), episodes=2)  # noqa: E731
    # Not every task shows in its first observation.
    check_domain(env, num_steps=60, min_rows=0, timestep_encoder="combined")


def test_popgym_games_in_one_agent():
    need("popgym", "popgym")
    names = ["RepeatPreviousEasy", "HigherLowerEasy", "AutoencodeEasy"]
    games = {name: partial(popgym, name) for name in names}
    make = lambda: gym.wrappers.TimeLimit(MultiDomain(games), 12)  # noqa: E731
    check_domain(
        lambda rows: make_trial_env(
            gymnasium_rows(make, rows, task_key="task_id", task_names=names), episodes=2
        ),
        num_steps=60,
        min_rows=0,
        action_mask_key="action_mask",
    )


def atari(game, **options):
    need("ale_py", "atari")
    import ale_py

    gym.register_envs(ale_py)
    env = gym.make(f"ALE/{game}-v5", frameskip=1, full_action_space=True, **options)
    env = gym.wrappers.AtariPreprocessing(env, noop_max=0, grayscale_newaxis=True)
    return gym.wrappers.TimeLimit(env, 8)


def test_atari_games_by_row():
    games = {game: partial(atari, game) for game in ("Pong", "Boxing")}
    atari("Pong").close()

    def make_env(rows):
        env = gymnasium_rows(games, 4)
        assert env.action_spec.n == 18
        return make_trial_env(env, episodes=2)

    check_domain(make_env, num_steps=40, rows=4, min_rows=0, **IMAGE)
    check_pictures(
        make_trial_env(
            gymnasium_rows(partial(atari, "Pong", render_mode="rgb_array"), 1), episodes=2
        )
    )


def need_procgen():
    """Skip where EnvPool is missing, or the system's Qt library."""
    try:
        Procgen("coinrun").close()
    except ImportError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize(
    ("game", "mode"), [("coinrun", "easy"), ("maze", "memory"), ("ninja", "exploration")]
)
def test_procgen(game, mode):
    need_procgen()
    make = partial(Procgen, game, mode, max_episode_steps=12)
    check_domain(
        lambda rows: make_trial_env(gymnasium_rows(make, rows), episodes=2, **SAME_TASK),
        num_steps=60,
        min_rows=int(mode != "exploration"),  # it has one level
        timestep_encoder="combined",
        timestep_options=CHANNELS_FIRST,
    )
    make = partial(make, render_mode="rgb_array")
    check_pictures(make_trial_env(gymnasium_rows(make, 1), episodes=2, **SAME_TASK))


def test_procgen_levels():
    need_procgen()
    env = Procgen("coinrun", num_levels=3, start_level=10)
    env.reset(seed=0)
    assert {env.reset()[1]["task_id"] for _ in range(40)} == {10, 11, 12}
    level = env.level
    assert [env.reset(options=Procgen.SAME_TASK)[1]["task_id"] for _ in range(3)] == [level] * 3
    with pytest.raises(ValueError, match="mode must be one of 'easy', 'hard'.*'exploration'.*coin"):
        Procgen("coinrun", "memory")
    with pytest.raises(ValueError, match="game must be one of 'bigfish'"):
        Procgen("coinrum")


def test_retro():
    need("stable_retro", "retro")
    make = partial(Retro, "Airstriker-Genesis-v0", max_episode_steps=6)

    def make_env(rows):
        return make_trial_env(gymnasium_rows(make, rows, processes=True), episodes=2, **SAME_TASK)

    check_domain(make_env, num_steps=30, rows=2, min_rows=0, **IMAGE)


def test_retro_pictures_and_missing_roms():
    need("stable_retro", "retro")
    env = Retro("Airstriker-Genesis-v0", frame_skip=60)
    observation, _ = env.reset(seed=0)
    assert observation.shape == (84, 84, 3)
    # Resizing keeps the mean of every colour.
    picture = env.render()
    np.testing.assert_allclose(observation.mean((0, 1)), picture.mean((0, 1)), atol=0.5)
    assert (env.step(0)[0] != observation).any()
    env.close()
    with pytest.raises(FileNotFoundError, match=r"needs its ROM.*stable_retro.import"):
        Retro("SuperMarioBros-Nes-v0")
    with pytest.raises(ValueError, match="game must be .*Airstriker-Genesis-v0.*'Airstriker-v0'"):
        Retro("Airstriker-v0")
    with pytest.raises(ValueError, match="levels must be of Airstriker"):
        Retro("Airstriker-Genesis-v0", ["Level9"])


def test_task_numbers_are_not_shown():
    need_procgen()
    rows = gymnasium_rows(partial(Procgen, "coinrun", num_levels=3), 2, task_key="task_id")
    env = make_trial_env(rows, episodes=2, **SAME_TASK)
    assert torch.equal(
        env.reset()["task_id"].flatten(),
        torch.tensor([row.level for row in env.base_env._env.unwrapped.envs]),
    )
