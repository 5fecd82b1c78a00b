from __future__ import annotations

import pytest
import torch
from torchrl.envs import Compose, EnvBase, RewardSum, TransformedEnv

from tests.evaluation.scripted import ScriptedTrials, act
from torchrl_amago.evaluation import rollout_pictures


def test_pictures_of_the_chosen_row_attempt_by_attempt():
    from torchrl_amago.envs import MetaFrozenLake, make_trial_env

    lake = MetaFrozenLake(3, batch_size=(3,))
    env = make_trial_env(lake, episodes=4)
    attempts = rollout_pictures(env.rand_action, env, row=1, greedy=False, seed=5)
    assert len(attempts) == 4
    assert all(2 <= len(attempt) <= lake.max_episode_steps + 1 for attempt in attempts)
    starts = [attempt[0] for attempt in attempts]
    # Each attempt starts at the same place of the same lake, and ends elsewhere, or after the limit.
    assert all((start == starts[0]).all() for start in starts)
    for attempt in attempts:
        assert len(attempt) == lake.max_episode_steps + 1 or (attempt[-1] != starts[0]).any()
    again = rollout_pictures(env.rand_action, env, row=1, greedy=False, seed=5)
    assert [len(attempt) for attempt in again] == [len(attempt) for attempt in attempts]


def test_steps_of_every_attempt_are_counted_while_other_rows_begin_new_trials():
    script = [[[[1.0]], [[1.0]]], [[[0.0, 0.0], [0.0, 0.0, 1.0]]]]
    env = TransformedEnv(ScriptedTrials(script), Compose(RewardSum()))
    attempts = rollout_pictures(act, env, row=1)
    values = [[int(picture[0, 0, 0]) for picture in attempt] for attempt in attempts]
    # This environment draws what comes next, so an attempt's last picture shows the next start.
    assert values == [[0, 1, 10], [10, 11, 12, 20]]


def test_the_given_environment_keeps_its_transforms():
    env = TransformedEnv(ScriptedTrials([[[[1.0]]]]), Compose(RewardSum()))
    rollout_pictures(act, env)
    assert [type(transform) for transform in env.transform] == [RewardSum]
    assert env.transform[0].parent is not None
    assert env.rollout(3, act, break_when_any_done=False)["next", "episode_reward"].tolist() == [
        [[1.0], [1.0], [1.0]]
    ]


def test_refuses_what_it_cannot_draw():
    env = ScriptedTrials([[[[0.0] * 5]]])
    with pytest.raises(IndexError, match=r"row must be in \[0, 1\), got 1"):
        rollout_pictures(act, env, row=1)
    with pytest.raises(RuntimeError, match="within max_steps=3 steps"):
        rollout_pictures(act, env, max_steps=3)

    class Blind(ScriptedTrials):
        render = None

    with pytest.raises(TypeError, match=r"environment with render\(row\), and Blind has none"):
        rollout_pictures(act, Blind([[[[1.0]]]]))
    assert issubclass(Blind, EnvBase)
    assert torch.is_grad_enabled()
