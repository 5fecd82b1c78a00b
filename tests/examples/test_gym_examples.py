"""The examples on Gymnasium environments: as commands, and what the first one shows of observations."""

from __future__ import annotations

from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch

from tests.scripts import import_script, run_script, start_script
from torchrl_amago import make_policy
from torchrl_amago.trainers import read_progress

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def basic_gym(monkeypatch):
    return import_script(EXAMPLES / "01_basic_gym.py", monkeypatch)


@pytest.mark.parametrize(
    ("name", "flags"),
    [
        ("01_basic_gym", ["--mask-velocities"]),  # in this process, the others in their own
        (
            "01_basic_gym",
            ["--env-id", "Pendulum-v1", "--max-episode-steps", "40", "--loss", "amago2"],
        ),
        ("12_half_cheetah_vel", []),
    ],
    ids=["cart pole", "pendulum", "cheetah"],
)
@pytest.mark.filterwarnings("ignore:.*constrained_layout")
def test_debug_run(name, flags, tmp_path, monkeypatch):
    if name == "12_half_cheetah_vel":
        pytest.importorskip("mujoco")
    command = ["--debug", "--threads", "1", *flags, "--run-dir", "run"]
    if "--mask-velocities" in flags:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setattr("common.keep_freed_memory", lambda: None)
        done = run_script(EXAMPLES / f"{name}.py", *command)
    else:
        done = start_script(EXAMPLES / f"{name}.py", *command, folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "On 16 held-out trials: greedy trial_return" in done.stdout
    progress = read_progress(tmp_path / "run")
    assert progress["update"][-1] == 40
    assert np.isfinite(progress["loss_actor"]).all()
    written = {path.name for path in (tmp_path / "run").iterdir()}
    assert {"learning_curve.png", "evaluation.npz", "evaluation_sampled.npz"} <= written
    if name == "01_basic_gym":
        assert ("trial.png" in written) != ("No trial.png, since" in done.stdout)


@pytest.mark.parametrize("name", ["01_basic_gym", "12_half_cheetah_vel"])
def test_help_shows_the_tasks_flags(name):
    done = run_script(EXAMPLES / f"{name}.py", "--help")
    assert done.returncode == 0, done.stderr
    for flag in ("--episodes", "--context-length", "--discounts", "--seq-model", "--loss"):
        assert flag in done.stdout


def test_a_wrong_id_is_explained(basic_gym):
    with pytest.raises(
        ValueError, match=r"--env-id must be .*'CartPol-v1'.*Did you mean: `CartPole`"
    ):
        basic_gym.Args(env_id="CartPol-v1").make_one()
    with pytest.raises(ValueError, match=r"--env-id must be .*'CartPole-v7'.*pprint_registry"):
        basic_gym.Args(env_id="CartPole-v7").make_one()


def test_states_noise_and_the_previous_step(basic_gym):
    def policy_of(**fields):
        args = basic_gym.Args(num_envs=2, **fields)
        options = args.policy_options(window=4)
        return make_policy(args.make_env(2), context_length=4, **options)

    policy = policy_of(episodes=2)
    assert policy.encoder.trajectory.normalize_states
    assert policy.exploration.max_duration == 32
    assert not policy.encoder.timestep.hidden_keys
    policy = policy_of(preset="paper", noise_steps=4, final_noise=0.5)
    assert not policy.encoder.trajectory.normalize_states
    assert policy.exploration.max_duration == 4
    assert policy.encoder.timestep.hidden_keys == {"prev_action", "prev_reward"}
    assert policy_of(episodes=2, hide_prev_step=True).encoder.timestep.hidden_keys
    # Noise of single episodes doesn't fade within them.
    first_and_last = torch.tensor([0, 500])
    torch.testing.assert_close(policy.exploration.epsilon(first_and_last), torch.ones(2))
    several = policy_of(episodes=2, final_noise=0.5).exploration
    torch.testing.assert_close(several.epsilon(2 * first_and_last), torch.tensor([1.0, 0.8]))
    for exploration, faded in ((policy.exploration, [0.5, 0.5]), (several, [0.5, 0.1])):
        exploration.step(10**6)
        found = exploration.epsilon(exploration.horizon // 500 * first_and_last)
        torch.testing.assert_close(found, torch.tensor(faded))


def test_what_is_hidden(basic_gym):
    everything = gym.make("CartPole-v1").reset(seed=0)[0]
    for fields, kept in (
        ({"mask_velocities": True}, [0, 2]),
        ({"keep": (3, 1)}, [3, 1]),
        ({}, [0, 1, 2, 3]),
    ):
        env = basic_gym.Args(**fields).make_one()
        observation, _ = env.reset(seed=0)
        assert observation.tolist() == everything[kept].tolist()
        assert env.observation_space.shape == (len(kept),)
        assert env.observation_space.contains(observation)
    pendulum = basic_gym.Args(env_id="Pendulum-v1", mask_velocities=True).make_one()
    assert np.hypot(*pendulum.reset(seed=0)[0]) == pytest.approx(1.0)  # cosine and sine


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"env_id": "Acrobot-v1", "mask_velocities": True},
            "--mask-velocities works for .*'Acrobot-v1'",
        ),
        ({"keep": (0, 4)}, r"--keep takes indices of a vector's entries, got \[0, 4\]"),
        ({"keep": (-1,)}, r"--keep takes indices of a vector's entries, got \[-1\]"),
        ({"env_id": "FrozenLake-v1", "keep": (0,)}, "--keep takes indices .* Discrete"),
    ],
)
def test_what_cannot_be_hidden(basic_gym, fields, message):
    with pytest.raises(ValueError, match=message):
        basic_gym.Args(**fields).make_one()


def test_trials(basic_gym):
    args = basic_gym.Args(episodes=2, max_episode_steps=3)
    assert args.trial_length == 6
    assert basic_gym.Args(episodes=2).trial_length == 1000
    env = args.make_env(2)
    env.set_seed(0)
    steps = env.rollout(6)
    observation = steps["observation"]
    assert torch.equal(observation[:, 0], observation[:, 3])  # episodes of a trial begin alike
    assert not torch.equal(observation[0, 0], observation[1, 0])
    assert steps["next", "done"].squeeze(-1).tolist() == [[False] * 5 + [True]] * 2


@pytest.mark.parametrize(
    ("length", "expected"),
    [(1000, (0.9, 0.968928, 0.990345, 0.997)), (200, (0.9, 0.946867, 0.971769, 0.985))],
)
def test_discounts_follow_the_length_of_trials(basic_gym, length, expected):
    found = basic_gym.discounts_of(length)
    assert found == pytest.approx(expected, abs=1e-6)
    assert 1 / (1 - found[-1]) == pytest.approx(length / 3)


def test_discounts_of_the_shortest_trials_differ_too(basic_gym):
    assert basic_gym.discounts_of(1) == basic_gym.discounts_of(60)
    assert len(set(basic_gym.discounts_of(1))) == 4


class Undrawable(gym.Env):
    """Can't be told to give pictures."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 1}  # noqa: RUF012 - Gymnasium's way
    observation_space = gym.spaces.Box(0.0, 1.0, (2,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.observation_space.sample(), {}

    def step(self, action):
        return self.observation_space.sample(), 0.0, False, False, {}


class Unrendered(Undrawable):
    """Fails when it is to give one."""

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def render(self):
        raise OSError("no display")


@pytest.mark.parametrize(
    ("env_class", "reason"), [(Undrawable, "render_mode"), (Unrendered, "no display")]
)
def test_a_task_that_cannot_be_drawn_has_no_picture(basic_gym, tmp_path, capsys, env_class, reason):
    gym.register("Undrawable-v0", env_class, max_episode_steps=3)
    try:
        args = basic_gym.Args(env_id="Undrawable-v0", run_dir=tmp_path)
        args.draw_trial(args.make_env(1).rand_action, seed=0)
    finally:
        del gym.registry["Undrawable-v0"]
    shown = capsys.readouterr().out
    assert shown.startswith("No trial.png, since Undrawable-v0 can't be drawn here: ")
    assert reason in shown


def test_a_task_without_an_end_needs_one(basic_gym):
    gym.register("Endless-v0", "gymnasium.envs.classic_control.cartpole:CartPoleEnv")
    try:
        with pytest.raises(
            ValueError, match="Endless-v0 has no time limit. .* --max-episode-steps"
        ):
            _ = basic_gym.Args(env_id="Endless-v0").trial_length
        args = basic_gym.Args(env_id="Endless-v0", max_episode_steps=7)
        assert args.trial_length == 7
    finally:
        del gym.registry["Endless-v0"]
