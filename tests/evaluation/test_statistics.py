from __future__ import annotations

import numpy as np
import pytest

from torchrl_amago.evaluation import bootstrap_mean, interquartile_mean


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([5.0], 5.0),
        ([1.0, 2.0, 9.0], 4.0),  # floor(3 / 4) = 0 are cut
        ([-100.0, 1.0, 3.0, 100.0], 2.0),  # one at each end
        ([7.0, 0.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0], 3.5),  # two at each end: 2, 3, 4, 5 stay
        ([9.0, 1.0, 2.0, 3.0, 4.0], 3.0),  # one at each end: 2, 3, 4 stay
    ],
)
def test_interquartile_mean_by_hand(scores, expected):
    assert interquartile_mean(np.array(scores)) == pytest.approx(expected)


def test_interquartile_mean_of_all_runs_and_tasks_or_along_an_axis():
    scores = np.array([[0.0, 10.0], [1.0, 20.0], [2.0, 30.0], [100.0, 40.0]])
    assert interquartile_mean(scores) == pytest.approx((2 + 10 + 20 + 30) / 4)
    np.testing.assert_allclose(interquartile_mean(scores, axis=0), [1.5, 25.0])


def test_bootstrap_mean_matches_the_normal_interval_of_a_large_sample():
    values = np.random.default_rng(1).normal(3.0, 2.0, size=4000)
    point, low, high = bootstrap_mean(values)
    half = 1.96 * values.std() / np.sqrt(4000)
    assert point == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((point - half, point + half), abs=0.006)


def test_bootstrap_mean_of_two_values_by_hand():
    # Two draws of two: mean 0 with 1/4, 1/2 with 1/2, 1 with 1/4.
    assert bootstrap_mean(np.array([0.0, 1.0]), confidence=0.4) == (0.5, 0.5, 0.5)
    assert bootstrap_mean(np.array([0.0, 1.0]), confidence=0.6) == (0.5, 0.0, 1.0)


def test_bootstrap_mean_skips_missing_values_column_by_column():
    values = np.array([[1.0, 2.0, np.nan], [3.0, np.nan, np.nan], [5.0, 6.0, np.nan]])
    point, low, high = bootstrap_mean(values)
    np.testing.assert_allclose(point, [3.0, 4.0, np.nan])
    assert low[1] == 2.0
    assert high[1] == 6.0
    assert np.isnan(low[2])


@pytest.mark.parametrize("infinite", [float("inf"), -float("inf")])
def test_bootstrap_mean_needs_finite_values(infinite):
    with pytest.raises(ValueError, match=r"finite ones, got 1 others"):
        bootstrap_mean(np.array([[infinite], [1.0], [np.nan]]))


def test_intervals_are_reproducible_and_of_the_columns_shape():
    values = np.random.default_rng(0).random((50, 3))
    assert bootstrap_mean(values, resamples=30).low.shape == (3,)
    one, other = (bootstrap_mean(values, resamples=30, seed=5) for _ in range(2))
    assert all((a == b).all() for a, b in zip(one, other, strict=True))


def test_errors():
    with pytest.raises(ValueError, match=r"at least one score.*got 0 others in shape \(0,\)"):
        interquartile_mean(np.array([]))
    with pytest.raises(ValueError, match=r"finite ones, got 1 others in shape \(2,\)"):
        interquartile_mean(np.array([np.nan, 1.0]))
    with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\], got 95"):
        bootstrap_mean(np.zeros(3), confidence=95)
    with pytest.raises(ValueError, match=r"at least one score.*\(0, 2\)"):
        bootstrap_mean(np.zeros((0, 2)))
