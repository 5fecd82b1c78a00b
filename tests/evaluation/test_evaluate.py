from __future__ import annotations

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type
from torchrl.modules import recurrent_mode

from tests.evaluation.scripted import ScriptedTrials, act, assert_equal
from torchrl_amago.evaluation import evaluate

NAN = float("nan")


def test_every_number_of_two_scripted_rows():
    env = ScriptedTrials(
        [
            [[[0.0, 1.0], [1.0]], [[0.5, -1.0], [0.0, 0.0, 2.0], [1.0]]],
            [[[1.0]], [[0.0], [0.0, 1.0]]],
        ]
    )
    results = evaluate(act, env, trials_per_env=2)
    assert_equal(results.episode_return, [[1, 1, NAN], [-0.5, 2, 1], [1, NAN, NAN], [0, 1, NAN]])
    assert results.episode_success.tolist() == [
        [True, True, False], [False, True, True], [True, False, False], [False, True, False]
    ]  # fmt: skip
    assert_equal(results.trial_return, [2, 2.5, 1, 1])
    assert_equal(results.trial_length, [3, 6, 1, 3])


def test_short_trials_are_not_favoured():
    # One row plays 1-step trials that succeed, the other 20-step trials that fail.
    env = ScriptedTrials([[[[1.0]]], [[[0.0] * 20]]])
    results = evaluate(act, env, trials_per_env=3)
    assert results.summary()["success"] == 0.5
    assert_equal(results.trial_length, [1, 1, 1, 20, 20, 20])
    assert env.num_steps == 60


def test_success_needs_more_than_the_threshold():
    env = ScriptedTrials([[[[1.0], [2.0], [3.0]]]])
    results = evaluate(act, env, trials_per_env=1, success_threshold=2.0)
    assert results.episode_success.tolist() == [[False, False, True]]


def test_environment_is_seeded_and_reset():
    env = ScriptedTrials([[[[1.0]], [[0.0, 0.0]]]])
    for _ in range(2):
        assert_equal(evaluate(act, env, trials_per_env=1, seed=11).trial_length, [1])
    assert env.seeds == [11, 11]


class Sampler(nn.Module):
    """Network that records its surroundings, and draws from torch's global generator."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(()))
        self.frozen = nn.Dropout()
        self.frozen.eval()
        self.seen = []

    def forward(self, observation):
        self.seen.append(
            (exploration_type(), torch.is_grad_enabled(), self.training, recurrent_mode())
        )
        self.draw = torch.rand(())
        return (observation * self.weight).long().squeeze(-1)


@pytest.mark.parametrize(
    ("greedy", "expected"), [(True, ExplorationType.DETERMINISTIC), (False, ExplorationType.RANDOM)]
)
def test_training_is_not_disturbed(greedy, expected):
    module = Sampler()
    policy = TensorDictModule(module, ["observation"], ["action"])
    env = ScriptedTrials([[[[1.0, 0.0]]]])
    state = torch.get_rng_state()
    with set_exploration_type(ExplorationType.MODE):
        evaluate(policy, env, trials_per_env=1, greedy=greedy, seed=4)
        first = module.draw
        assert exploration_type() == ExplorationType.MODE
    assert set(module.seen) == {(expected, False, False, False)}
    assert torch.equal(torch.get_rng_state(), state)
    assert module.training
    assert not module.frozen.training
    torch.rand(7)
    evaluate(policy, env, trials_per_env=1, greedy=greedy, seed=4)
    assert torch.equal(module.draw, first)


def make_agent(exploration):
    from torchrl_amago.envs import TMaze, make_trial_env
    from torchrl_amago.modules import make_policy

    env = make_trial_env(TMaze(4, batch_size=(50,), seed=0), episodes=1)
    torch.manual_seed(0)
    policy = make_policy(env, context_length=5, seq_model="gru", exploration=exploration)
    return policy, env


def explored(policy, env):
    env.set_seed(0)
    torch.manual_seed(0)
    with set_exploration_type(ExplorationType.RANDOM):
        return env.rollout(4, policy)["action"]


def test_sampled_actions_have_no_epsilon_and_training_keeps_it():
    noise = dict(start_of_trial=(1, 1), end_of_trial=(1, 1), scale_power=0)
    (noisy, env), (plain, plain_env) = make_agent(noise), make_agent(None)
    training = explored(noisy, env)
    sampled = evaluate(noisy, env, trials_per_env=4, greedy=False)
    without = evaluate(plain, plain_env, trials_per_env=4, greedy=False)
    assert torch.equal(sampled.trial_return, without.trial_return)
    greedy = evaluate(noisy, env, trials_per_env=4)
    assert not torch.equal(sampled.trial_return, greedy.trial_return)
    assert torch.equal(explored(noisy, env), training)
    assert not torch.equal(explored(plain, plain_env), training)


def test_epsilon_comes_back_after_an_error():
    noisy, env = make_agent({})
    training = explored(noisy, env)
    with pytest.raises(KeyError, match="reads .*'score'"):
        evaluate(noisy, env, trials_per_env=1, greedy=False, episode_return_key="score")
    assert torch.equal(explored(noisy, env), training)


def test_training_mode_comes_back_after_an_error():
    policy = nn.Linear(1, 1)
    with pytest.raises(TypeError):
        evaluate(policy, ScriptedTrials([[[[1.0]]]]), trials_per_env=1)
    assert policy.training


def test_errors():
    env = ScriptedTrials([[[[0.0] * 8]]])
    with pytest.raises(ValueError, match="trials_per_env must be at least 1, got 0"):
        evaluate(act, env, trials_per_env=0)
    with pytest.raises(
        RuntimeError, match=r"within max_trial_steps=5 steps.*episodes= or horizon="
    ):
        evaluate(act, env, trials_per_env=1, max_trial_steps=5)
    with pytest.raises(KeyError, match=r"reads .*'score'.*'episode_return'.*Append the trial"):
        evaluate(act, env, trials_per_env=1, episode_return_key="score")


def test_on_the_frozen_lake_with_its_transforms():
    from torchrl_amago.envs import MetaFrozenLake, make_trial_env

    env = make_trial_env(MetaFrozenLake(3, batch_size=(16,)), episodes=3)
    results = evaluate(env.rand_action, env, trials_per_env=2, greedy=False)
    assert results.episode_happened.all()
    assert results.episode_return.shape == (32, 3)
    torch.testing.assert_close(results.episode_return.sum(1), results.trial_return)
    assert 0 < results.summary()["success"] < 1
    again = evaluate(env.rand_action, env, trials_per_env=2, greedy=False)
    assert torch.equal(again.episode_return, results.episode_return)
