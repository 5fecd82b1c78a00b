from __future__ import annotations

import pytest
import torch

from tests.evaluation.scripted import ScriptedTrials, act
from torchrl_amago.evaluation import (
    HELD_OUT_SEED,
    HeldOutEvaluator,
    TrialResults,
)

# Row 0: returns 1 and 3 in turn; row 1: always two episodes, of 0 and 2.
SCRIPT = [[[[1.0]], [[3.0, 0.0]]], [[[0.0], [2.0]]]]


@pytest.mark.parametrize(("num_trials", "played"), [(0, 2), (1, 2), (2, 2), (3, 4), (4, 4), (5, 6)])
def test_whole_rounds_of_rows_are_played(num_trials, played):
    assert len(HeldOutEvaluator(act, ScriptedTrials(SCRIPT)).evaluate(num_trials)) == played


def test_settings_arrive():
    env = ScriptedTrials(SCRIPT)
    results = HeldOutEvaluator(act, env, seed=5, success_threshold=1.0).evaluate(4)
    assert results.trial_return.tolist() == [1, 3, 2, 2]
    assert results.episode_success.tolist() == [
        [False, False], [True, False], [False, True], [False, True]
    ]  # fmt: skip
    HeldOutEvaluator(act, env).evaluate(1)
    assert env.seeds == [5, HELD_OUT_SEED]


def tossing(tensordict):
    return tensordict.set("action", torch.randint(2, tensordict.shape))


def test_the_same_trials_every_time():
    from torchrl_amago.envs import TMaze, make_trial_env

    held_out = HeldOutEvaluator(
        tossing, make_trial_env(TMaze(3, batch_size=(8,), seed=0), episodes=1)
    )
    first, again = held_out.evaluate(20), held_out.evaluate(20)
    assert torch.equal(first.trial_return, again.trial_return)
    other = HeldOutEvaluator(tossing, held_out.env, seed=1).evaluate(20)
    assert not torch.equal(first.trial_return, other.trial_return)


def test_pictures_are_of_another_trial_than_those_that_count():
    env = ScriptedTrials(SCRIPT)
    pictures = HeldOutEvaluator(act, env, seed=5).pictures()
    assert [len(episode) for episode in pictures] == [2]
    assert env.seeds == [6]


def test_greedy_and_sampled():
    from torchrl.envs.utils import ExplorationType, exploration_type

    seen = []

    def note(tensordict):
        seen.append(exploration_type())
        return act(tensordict)

    both = HeldOutEvaluator(note, ScriptedTrials([[[[1.0]]]])).evaluate_greedy_and_sampled(1)
    assert seen == [ExplorationType.DETERMINISTIC, ExplorationType.RANDOM]
    assert isinstance(both.greedy, TrialResults)
    assert isinstance(both.sampled, TrialResults)
