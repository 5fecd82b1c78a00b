"""Targets, filters and reductions against hand-computed numbers and a plain-Python reference."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from torchrl_amago.objectives.functional import (
    binary_filter,
    draw_critic_subset,
    exponential_filter,
    leaky_relu_filter,
    masked_mean,
    n_step_target,
    reduce_ensemble,
)


def test_n_step_sums_take_no_longer_than_their_row():
    reward, value = torch.randn(2, 3, 1), torch.randn(2, 3, 1)
    done, mask = torch.zeros(2, 3, 1, dtype=torch.bool), torch.ones(2, 3, 1, dtype=torch.bool)
    gamma = torch.tensor([0.9])
    expected = n_step_target(reward, done, value, gamma, mask, n=3)
    # One turn of the loop for each of 10^9 rewards would take hours.
    assert torch.equal(n_step_target(reward, done, value, gamma, mask, n=10**9), expected)


def _plain_n_step(reward, terminated, next_value, gamma, length, n):
    """n-step targets of one row by the definition, one step at a time."""
    targets = []
    for t in range(length):
        total, discount = 0.0, 1.0
        for k in range(t, min(t + n, length)):
            total += discount * reward[k]
            discount *= gamma
            if terminated[k]:
                break
        else:
            total += discount * next_value[k]
        targets.append(total)
    return targets


@given(
    length=st.integers(1, 8),
    padding=st.integers(0, 4),
    n=st.integers(1, 10),
    gamma=st.floats(0.0, 0.999),
    seed=st.integers(0, 2**31),
)
def test_n_step_target_equals_the_definition(length, padding, n, gamma, seed):
    generator = torch.Generator().manual_seed(seed)
    size = length + padding
    reward, next_value = torch.randn(2, size, generator=generator, dtype=torch.float64)
    terminated = torch.rand(size, generator=generator) < 0.2
    mask = torch.arange(size) < length
    target = n_step_target(
        reward.view(1, size, 1),
        terminated.view(1, size, 1),
        next_value.view(1, size, 1),
        torch.tensor([gamma], dtype=torch.float64),
        mask.view(1, size, 1),
        n,
    )
    expected = _plain_n_step(
        reward.tolist(), terminated.tolist(), next_value.tolist(), gamma, length, n
    )
    torch.testing.assert_close(
        target.flatten()[:length], torch.tensor(expected, dtype=torch.float64)
    )


@pytest.mark.parametrize("n", [1, 3])
def test_n_step_target_ignores_padding(n):
    reward, value = torch.randn(2, 1, 6, 2)
    terminated = torch.zeros(1, 6, 2, dtype=torch.bool)
    mask = torch.tensor([1, 1, 1, 1, 0, 0], dtype=torch.bool).view(1, 6, 1)
    gamma = torch.tensor([0.9, 0.99])
    clean = n_step_target(reward, terminated, value, gamma, mask, n)
    poisoned_reward, poisoned_value = reward.clone(), value.clone()
    poisoned_reward[:, 4:], poisoned_value[:, 4:] = float("nan"), float("nan")
    poisoned = n_step_target(poisoned_reward, terminated, poisoned_value, gamma, mask, n)
    assert torch.equal(clean[:, :4], poisoned[:, :4])


def test_n_step_target_of_zero_steps():
    x, mask = torch.zeros(1, 1, 1), torch.ones(1, 1, 1, dtype=torch.bool)
    with pytest.raises(ValueError, match="n_step must be at least 1, got 0"):
        n_step_target(x, mask, x, torch.zeros(1), mask, n=0)


def test_reduce_ensemble_takes_only_the_drawn_members():
    value = torch.tensor([5.0, 1.0, 3.0]).view(1, 1, 3, 1)
    drawn = torch.tensor([0, 2]).view(1, 1, 2, 1)
    assert reduce_ensemble(value, drawn, "min").item() == 3.0
    assert reduce_ensemble(value, drawn, "mean").item() == 4.0


def test_critic_subsets_differ_between_rows_steps_and_discounts_and_cover_all_members():
    subset = draw_critic_subset((8, 9, 2, 5), num_critics=4)
    assert subset.shape == (8, 9, 2, 5)
    assert set(subset.unique().tolist()) == {0, 1, 2, 3}
    # With replacement: some pairs name the same member twice, about one in four.
    fraction = (subset[:, :, 0] == subset[:, :, 1]).float().mean()
    assert 0.1 < fraction < 0.4


def test_filters_by_hand():
    advantage = torch.tensor([-2.0, 0.0, 0.5])
    assert binary_filter(advantage).tolist() == [0.0, 0.0, 1.0]
    assert binary_filter(advantage, threshold=0.5).tolist() == [0.0, 0.0, 0.0]
    weights = exponential_filter(advantage, beta=2.0, advantage_range=(-1.0, None))
    torch.testing.assert_close(weights, torch.tensor([-2.0, 0.0, 1.0]).exp())
    # Above the hinge: 0.01 + 0.05 * 0.01 / 2 + (0.5 - 0.01) / 2, plus 1 for a good action.
    assert leaky_relu_filter(advantage)[2].item() == pytest.approx(1.25525)


def test_masked_mean_selects_and_survives_an_empty_mask():
    x = torch.tensor([1.0, float("inf"), float("nan"), 4.0])
    assert masked_mean(x, torch.tensor([True, False, False, True])).item() == 2.5
    assert masked_mean(x, torch.zeros(4, dtype=torch.bool)).item() == 0.0
