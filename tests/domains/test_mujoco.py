"""MuJoCo through Gymnasium: inverted actuators, hidden velocities, Meta-World."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from tests.domains.contract import check_domain, check_pictures, need, needs_egl, play
from torchrl_amago import make_trial_env
from torchrl_amago.envs import gymnasium_rows
from torchrl_amago.envs.libs import InvertedActuators, MetaWorld

ALL = {
    "inverted": (
        "mujoco",
        "mujoco",
        lambda **o: InvertedActuators(
            "HalfCheetah-v5", inversion="each", max_episode_steps=20, **o
        ),
    ),
    "ML1": (
        "metaworld",
        "metaworld",
        lambda **o: MetaWorld("ML1", "reach-v3", max_episode_steps=20, **o),
    ),
}


def make_env(name, rows, **options):
    package, extra, make = ALL[name]
    need(package, extra)
    rows = gymnasium_rows(partial(make, **options), rows)
    return make_trial_env(rows, episodes=2, repeat="options", options={"same_task": True})


def task(name, env):
    """Return what the rows' tasks are, beside what is observed."""
    rows = [row.unwrapped if name == "ML1" else row for row in env.base_env._env.unwrapped.envs]
    return torch.stack(
        [
            torch.as_tensor(row._simulator._target_pos if name == "ML1" else row.signs)
            for row in rows
        ]
    )


@pytest.mark.parametrize("name", ALL)
def test_domain(name):
    # Observations don't show the task: see the next test.
    check_domain(
        lambda rows: make_env(name, rows),
        num_steps=90,
        same_task=lambda steps: torch.zeros(len(steps)),
        min_rows=0,
    )


@pytest.mark.parametrize("name", ALL)
def test_tasks(name):
    env = make_env(name, 3)
    env.set_seed(0)
    step = env.reset()
    tasks = []
    for _ in range(80):
        tasks.append(task(name, env))
        step = env.step_and_maybe_reset(env.rand_action(step))[1]
    tasks = torch.stack(tasks)
    assert torch.equal(tasks[:40], tasks[:1].expand(40, *tasks.shape[1:]))
    assert torch.equal(tasks[40:], tasks[40:41].expand(40, *tasks.shape[1:]))
    assert not torch.equal(tasks[0], tasks[40])


@needs_egl
@pytest.mark.parametrize("name", ALL)
def test_pictures(name):
    check_pictures(make_env(name, 1, render_mode="rgb_array"))


def test_meta_world_hides_its_goals():
    env = make_env("ML1", 2)
    assert (play(env, 50)["observation"][..., 36:] == 0).all()


@pytest.mark.parametrize(
    "arguments", [("ML1",), ("ML1", "reach"), ("ML10", "reach-v3"), ("ML3",)], ids=str
)
def test_meta_world_names_what_there_is(arguments):
    need("metaworld", "metaworld")
    with pytest.raises(ValueError, match="must be .*got"):
        MetaWorld(*arguments)
    with pytest.raises(ValueError, match="at most 500, got 600"):
        MetaWorld("ML1", "reach-v3", max_episode_steps=600)
