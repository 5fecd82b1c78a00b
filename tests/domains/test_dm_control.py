"""dm_control through shimmy's Gymnasium ids, as example 01 takes them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.domains.contract import check_domain, check_pictures, need, needs_egl
from tests.scripts import start_script
from torchrl_amago import make_trial_env
from torchrl_amago.envs import gymnasium_rows

TASKS = ["shimmy:dm_control/cartpole-swingup-v0", "shimmy:dm_control/cheetah-run-v0"]
EXAMPLE = Path(__file__).parents[2] / "examples/01_basic_gym.py"


@pytest.fixture(autouse=True, scope="module")
def _packages():
    need("dm_control", "dm-control")
    need("shimmy", "dm-control")


def make_env(task, rows, **options):
    rows = gymnasium_rows(task, rows, max_episode_steps=20, **options)
    return make_trial_env(rows, episodes=2)


@pytest.mark.parametrize("task", TASKS)
def test_domain(task):
    check_domain(lambda rows: make_env(task, rows), num_steps=90)


@needs_egl
@pytest.mark.parametrize("task", TASKS)
def test_pictures(task):
    check_pictures(make_env(task, 1, render_mode="rgb_array"))


@needs_egl
def test_the_example(tmp_path):
    flags = ["--debug", "--env-id", TASKS[0], "--max-episode-steps", "20", "--threads", "1"]
    done = start_script(EXAMPLE, *flags, "--run-dir", "run", folder=tmp_path, MUJOCO_GL="egl")
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/trial.png").exists(), done.stdout
