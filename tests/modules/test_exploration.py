"""Two-level epsilon: the schedule by hand, the noise by frequency, per-trial scales."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_amago.modules import BilevelEpsilonGreedy


def _step(num_rows: int, time: int = 0, init: bool = True) -> TensorDict:
    return TensorDict(
        action=torch.zeros(num_rows, dtype=torch.int64),
        time_idx=torch.full((num_rows, 1), time),
        is_init=torch.full((num_rows, 1), init),
        batch_size=[num_rows],
    )


def test_schedule_by_hand_and_clamped_beyond_both_horizons():
    explore = BilevelEpsilonGreedy(5, horizon=10, anneal_frames=100)
    explore.step(50)
    start, end = (1.0 + 0.05) / 2, (0.8 + 0.01) / 2
    epsilon = explore.epsilon(torch.tensor([[0], [5], [10], [1000]])).flatten()
    torch.testing.assert_close(epsilon, torch.tensor([start, (start + end) / 2, end, end]))
    explore.step(10_000)
    assert explore.epsilon(torch.tensor([[1000]])).item() == pytest.approx(0.01)


def test_a_power_keeps_noise_for_the_trials_end():
    explore = BilevelEpsilonGreedy(
        5, horizon=10, start_of_trial=(0.0, 0.0), end_of_trial=(0.8, 0.0), power=3.0
    )
    epsilon = explore.epsilon(torch.tensor([[0], [5], [10], [1000]])).flatten()
    torch.testing.assert_close(epsilon, torch.tensor([0.0, 0.8 / 8, 0.8, 0.8]))


@pytest.mark.parametrize("one_hot", [False, True])
def test_share_of_random_actions_is_epsilon(one_hot):
    explore = BilevelEpsilonGreedy(5, horizon=10, anneal_frames=1, randomize=False, one_hot=one_hot)
    td = _step(20_000)
    if one_hot:
        td["action"] = torch.nn.functional.one_hot(td["action"], 5)
    with set_exploration_type(ExplorationType.RANDOM):
        action = explore(td)["action"]
    index = action.argmax(-1) if one_hot else action
    assert (index != 0).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert action.shape == ((20_000, 5) if one_hot else (20_000,))


def test_greedy_modes_leave_actions_alone():
    explore = BilevelEpsilonGreedy(5, horizon=10)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert explore(_step(100))["action"].eq(0).all()


def test_scale_is_drawn_at_the_trials_start_and_kept_within_it():
    explore = BilevelEpsilonGreedy(5, horizon=10)
    with set_exploration_type(ExplorationType.RANDOM):
        first = explore(_step(1000))
        following = _step(1000, time=1, init=False)
        following["_epsilon_scale"] = first["_epsilon_scale"].clone()
        following["is_init"][:10] = True
        second = explore(following)
    scale = first["_epsilon_scale"]
    assert 0.4 < scale.mean() < 0.6
    assert scale.max() < 1.0
    assert torch.equal(scale[10:], second["_epsilon_scale"][10:])
    assert not torch.equal(scale[:10], second["_epsilon_scale"][:10])


def test_refuses_an_empty_horizon():
    with pytest.raises(ValueError, match="horizon and anneal_frames must be at least 1, got 0"):
        BilevelEpsilonGreedy(5, horizon=0)


def test_refuses_a_power_that_is_not_positive():
    with pytest.raises(ValueError, match=r"power must be positive, got 0\. 1 lets noise change"):
        BilevelEpsilonGreedy(5, horizon=10, power=0)
