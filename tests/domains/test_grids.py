"""MiniGrid, BabyAI and Crafter: grids of categories, missions, instructions."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.domains.contract import check_domain, check_pictures, need
from torchrl_amago import make_trial_env
from torchrl_amago.envs import gymnasium_rows
from torchrl_amago.envs.libs import CrafterInstructions, MiniGrid, MultiDomain

ENTRIES = {
    "mission": {"kind": "tokens", "padding_token": 0, "embedding_size": 8},
    "goals": {"kind": "goals", "padding": 0},
}


def rows(make, num_rows, **options):
    return make_trial_env(gymnasium_rows(make, num_rows), episodes=2, **options)


def encoder(*keys):
    entries = {key: ENTRIES[key] for key in keys}
    return dict(timestep_encoder="combined", timestep_options={"entries": entries})


@pytest.mark.parametrize(
    "env_id", ["BabyAI-GoToRedBallNoDists-v0", "MiniGrid-DoorKey-5x5-v0", "BabyAI-PutNextS5N2-v0"]
)
def test_minigrid(env_id):
    need("minigrid", "minigrid")
    check_domain(
        lambda n: rows(lambda: MiniGrid(env_id, max_steps=10), n),
        num_steps=60,
        **encoder("mission"),
    )


def test_several_tasks_of_babyai():
    need("minigrid", "minigrid")
    ids = ["BabyAI-GoToRedBall-v0", "BabyAI-PickupLoc-v0", "BabyAI-OpenDoor-v0"]
    names = {i: (lambda i=i: MiniGrid(i, max_steps=10)) for i in ids}
    check_domain(lambda n: rows(lambda: MultiDomain(names), n), num_steps=60, **encoder("mission"))


def test_pictures_of_minigrid():
    need("minigrid", "minigrid")
    check_pictures(
        rows(lambda: MiniGrid("BabyAI-GoToLocal-v0", max_steps=10, render_mode="rgb_array"), 2)
    )


def test_unknown_ids():
    minigrid = need("minigrid", "minigrid")
    with pytest.raises(ValueError, match="env_id must be .* like .'BabyAI-GoToRedBall-v0'"):
        MiniGrid("BabyAI-GoToRedBal-v0")
    if not (Path(minigrid.__file__).parent / "envs/wfc/patterns").exists():
        with pytest.raises(FileNotFoundError, match="its repository has it"):
            MiniGrid("MiniGrid-WFC-MazeSimple-v0")
    with pytest.raises(ValueError, match="got 'CartPole-v1'"):
        MiniGrid("CartPole-v1", max_steps=10)


@pytest.mark.parametrize("view", ["pixels", "codes"])
def test_crafter(view):
    need("crafter", "crafter")
    check_domain(
        lambda n: rows(lambda: CrafterInstructions(view, max_episode_steps=10), n),
        num_steps=50,
        **encoder("goals"),
    )
