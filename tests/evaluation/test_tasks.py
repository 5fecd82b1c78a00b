"""Results by task and group, and successes that the environment reports."""

from __future__ import annotations

import dataclasses

import gymnasium as gym
import pytest
import torch
from torchrl.envs import SerialEnv

from torchrl_amago.envs import gymnasium_rows, make_trial_env
from torchrl_amago.evaluation import TrialResults, evaluate


def test_results_by_task_and_group(tmp_path):
    games = {"train/short": 5, "train/long": 9, "test/long": 9}
    games = {
        name: lambda steps=steps: gym.make("CartPole-v1", max_episode_steps=steps)
        for name, steps in games.items()
    }
    env = make_trial_env(gymnasium_rows(games, 4), episodes=2)
    results = evaluate(env.rand_action, env, trials_per_env=2)
    assert results.task_id.tolist() == [0, 0, 1, 1, 2, 2, 0, 0]
    # No pole falls within nine steps, so that returns are the lengths.
    expected = {"train/short": 5, "train/long": 9, "test/long": 9, "train": 38 / 6, "test": 9}
    assert results.by_task("return") == pytest.approx(expected)
    assert results.summary()["success/test"] == 1.0
    results.save(tmp_path / "results.npz")
    again = TrialResults.load(tmp_path / "results.npz")
    pooled = TrialResults.concatenate([again, again])
    assert pooled.by_task("return") == pytest.approx(expected)


def test_tasks_in_other_processes_have_numbers():
    def rows():
        return gymnasium_rows(["CartPole-v1"] * 2, max_episode_steps=4)

    for env in (SerialEnv(1, rows), rows()):
        trials = make_trial_env(env, episodes=1)
        results = evaluate(trials.rand_action, trials, trials_per_env=1)
        assert results.by_task("return") == {"CartPole-v1": 4.0}
    nameless = dataclasses.replace(results, task_names=())
    assert nameless.by_task("return") == {"0": 4.0, "1": 4.0}
    assert not any("/" in name for name in nameless.summary())


def test_successes_that_the_environment_reports_count():
    class Wins(gym.Wrapper):
        def step(self, action):
            observation, _, *ends, info = self.env.step(action)
            return observation, -1.0, *ends, info | {"win": bool(action)}

    env = gymnasium_rows(
        lambda: Wins(gym.make("CartPole-v1", max_episode_steps=2)), 2, success_key="win"
    )
    env = make_trial_env(env, episodes=3)
    actions = iter([0, 1, 0, 0, 1, 0])

    def policy(step):
        return step.set("action", torch.full((2,), next(actions)))

    results = evaluate(policy, env, trials_per_env=1)
    assert results.episode_success.tolist() == [[True, False, True]] * 2
