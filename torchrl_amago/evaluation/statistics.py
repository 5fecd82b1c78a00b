"""Point estimates and bootstrap confidence intervals for few runs (arXiv 2108.13264, section 4)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import numpy as np

from torchrl_amago._validation import check_fractions

# The paper draws 2,000 (section 4.1): the interval's ends then move by about 1% of its width.
_RESAMPLES = 2000

Scores = np.ndarray | Mapping[str, np.ndarray]
"""Scores of runs x tasks `[runs, tasks]`, or runs by name of the task."""


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
    scores = _scores(scores)
    if axis is None:
        scores, axis = scores.reshape(-1), 0
    cut = scores.shape[axis] // 4
    middle = np.sort(scores, axis=axis).take(range(cut, scores.shape[axis] - cut), axis=axis)
    return middle.mean(axis=axis)


def bootstrap_mean(
    values: np.ndarray, *, confidence: float = 0.95, resamples: int = _RESAMPLES, seed: int = 0
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
    values = _scores(values, missing=np.isinf)
    present = ~np.isnan(values)
    totals = np.stack([np.where(present, values, 0.0), present]).reshape(2, len(values), -1)

    def mean(counts: np.ndarray) -> np.ndarray:
        total, number = counts @ totals
        out = np.full(total.shape, np.nan)
        return np.divide(total, number, out=out, where=number > 0).reshape(values.shape[1:])

    generator, n = np.random.default_rng(seed), len(values)
    draws = (generator.integers(n, size=n) for _ in range(resamples))
    means = np.stack([mean(np.bincount(rows, minlength=n)) for rows in draws])
    return Interval(mean(np.ones(n)), *_percentiles(means, confidence))


def stratified_bootstrap(
    scores: Scores,
    statistic: Callable[..., np.ndarray] = interquartile_mean,
    *,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Compute a statistic of runs x tasks and its interval, resampling the runs of each task.

    Every resample has as many runs of each task as the data, so that the spread between tasks stays
    out (arXiv 2108.13264, section 4.1). Other arguments: see :func:`bootstrap_mean`.

    Args:
        scores: `[runs, tasks]`, `[runs]` of one task, or `[runs]` by task if their numbers differ.
        statistic: called as `statistic(resampled, axis=1)` on `[K, all runs]`; returns `[K, ...]`.

    Example:
        >>> scores = np.random.default_rng(0).normal(1.0, 0.1, size=(10, 3))
        >>> point, low, high = stratified_bootstrap(scores)
        >>> bool(0.9 < low < point < high < 1.1)
        True
    """
    tasks, generator = _by_task(scores), np.random.default_rng(seed)
    resampled = np.concatenate([_draw(runs, resamples, generator) for runs in tasks], axis=1)
    point = statistic(np.concatenate(tasks)[None], axis=1)[0]
    return Interval(point, *_percentiles(statistic(resampled, axis=1), confidence))


def performance_profile(
    scores: Scores, thresholds: Sequence[float], **bootstrap_options: float
) -> Interval:
    """Compute the fraction of runs that score above each threshold (arXiv 2108.13264, section 4.2).

    Args:
        scores: as of :func:`stratified_bootstrap`, which takes the other options, too.
        thresholds: `[T]`.

    Example:
        >>> performance_profile(np.array([[0.2, 0.4], [0.6, 0.8]]), [0.1, 0.5, 0.9]).point.tolist()
        [1.0, 0.5, 0.0]
    """

    def fraction_above(scores: np.ndarray, axis: int) -> np.ndarray:
        return np.stack([(scores > threshold).mean(axis) for threshold in thresholds], axis=-1)

    return stratified_bootstrap(scores, fraction_above, **bootstrap_options)


def probability_of_improvement(
    scores: Scores,
    others: Scores,
    *,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Compute the chance that a run scores above one of another agent, mean over tasks.

    Equal scores count as one half (arXiv 2108.13264, section 4.3). Other arguments: see
    :func:`stratified_bootstrap`.

    Example:
        >>> probability_of_improvement(np.array([1.0, 2.0, 3.0]), np.array([2.0, 0.0, 0.0])).point
        0.8333333333333334
    """
    pairs = list(zip(_by_task(scores), _by_task(others), strict=True))
    generator = np.random.default_rng(seed)

    def chance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        difference = a[:, :, None] - b[:, None, :]
        return ((np.sign(difference) + 1) / 2).mean((1, 2))

    drawn = [chance(*(_draw(runs, resamples, generator) for runs in pair)) for pair in pairs]
    point = np.mean([chance(a[None], b[None])[0] for a, b in pairs])
    return Interval(float(point), *_percentiles(np.mean(drawn, axis=0), confidence))


def _by_task(scores: Scores) -> list[np.ndarray]:
    if isinstance(scores, Mapping):
        return [_scores(runs).reshape(-1) for runs in scores.values()]
    scores = _scores(scores)
    return list(scores.reshape(len(scores), -1).T)


def _draw(runs: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    return runs[generator.integers(len(runs), size=(resamples, len(runs)))]


def _scores(scores: np.ndarray, missing: Callable = np.isnan) -> np.ndarray:
    scores = np.asarray(scores, dtype=np.float64)
    if not scores.size or missing(scores).any():
        raise ValueError(
            f"statistics need at least one score, and finite ones, got {missing(scores).sum()} "
            f"others in shape {scores.shape}. Leave out runs that diverged or have no result; "
            "bootstrap_mean skips NaN."
        )
    return scores


def _percentiles(values: np.ndarray, confidence: float) -> np.ndarray:
    """Return the interval's ends over the first axis; NaN (resamples without values) is ignored."""
    check_fractions("It is the interval's probability mass.", confidence=confidence)
    tail = 50 * (1 - confidence)
    known = ~np.isnan(values).all(axis=0)
    ends = np.full((2, *values.shape[1:]), np.nan)
    ends[:, known] = np.nanpercentile(values[:, known], [tail, 100 - tail], axis=0)
    return ends
