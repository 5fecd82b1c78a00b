"""Point estimates and bootstrap confidence intervals for few runs (arXiv 2108.13264, section 4)."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from torchrl_amago._validation import check_fractions

# The paper draws 2,000 (section 4.1): the interval's ends then move by about 1% of its width.
RESAMPLES = 2000


class Interval(NamedTuple):
    """A point estimate and the two ends of its confidence interval (numbers or arrays)."""

    point: np.ndarray
    low: np.ndarray
    high: np.ndarray


def interquartile_mean(scores: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Compute the mean of the middle half, without the lowest and the highest quarter of scores.

    Of n scores, `floor(n / 4)` are cut at each end (as `scipy.stats.trim_mean` and `rliable` do).
    Scores may have any shape; without ``axis`` all are averaged.

    Raises:
        ValueError: if there is no score, or one is NaN.

    Example:
        >>> float(interquartile_mean(np.array([0.0, 1.0, 2.0, 100.0])))
        1.5
    """
    scores = check_scores(scores)
    if axis is None:
        scores, axis = scores.reshape(-1), 0
    cut = scores.shape[axis] // 4
    middle = np.sort(scores, axis=axis).take(range(cut, scores.shape[axis] - cut), axis=axis)
    return middle.mean(axis=axis)


def bootstrap_mean(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = RESAMPLES, seed: int = 0
) -> Interval:
    """Compute the mean over the first axis with its percentile-bootstrap interval.

    Whole rows are drawn, so that columns stay together (episodes of one trial are not independent).

    Args:
        values: `[N, ...]`; missing values are NaN and don't count.
        confidence: probability mass between the two ends.

    Returns:
        Three arrays of shape `[...]`, NaN in a column without values.

    Raises:
        ValueError: if there is no row, or a value is infinite.

    Example:
        >>> point, low, high = bootstrap_mean(np.array([[0.0], [1.0], [1.0], [np.nan]]))
        >>> round(float(point[0]), 3), bool(low[0] < point[0] < high[0])
        (0.667, True)
    """
    values = check_scores(values, missing=np.isinf)
    present = ~np.isnan(values)
    totals = np.stack([np.where(present, values, 0.0), present]).reshape(2, len(values), -1)

    def mean(counts: np.ndarray) -> np.ndarray:
        total, number = counts @ totals
        out = np.full(total.shape, np.nan)
        return np.divide(total, number, out=out, where=number > 0).reshape(values.shape[1:])

    generator, n = np.random.default_rng(seed), len(values)
    draws = (generator.integers(n, size=n) for _ in range(resamples))
    means = np.stack([mean(np.bincount(rows, minlength=n)) for rows in draws])
    return Interval(mean(np.ones(n)), *percentile_ends(means, confidence))


def check_scores(scores: np.ndarray, missing: Callable = np.isnan) -> np.ndarray:
    """Return scores in float64; ValueError if there are none, or missing ones."""
    scores = np.asarray(scores, dtype=np.float64)
    if not scores.size or missing(scores).any():
        raise ValueError(
            f"statistics need at least one score, and finite ones, got {missing(scores).sum()} "
            f"others in shape {scores.shape}. Leave out runs that diverged or have no result; "
            "bootstrap_mean skips NaN."
        )
    return scores


def percentile_ends(values: np.ndarray, confidence: float) -> np.ndarray:
    """Return the interval's ends over the first axis; NaN (resamples without values) is ignored."""
    check_fractions("It is the interval's probability mass.", confidence=confidence)
    tail = 50 * (1 - confidence)
    known = ~np.isnan(values).all(axis=0)
    ends = np.full((2, *values.shape[1:]), np.nan)
    ends[:, known] = np.nanpercentile(values[:, known], [tail, 100 - tail], axis=0)
    return ends
