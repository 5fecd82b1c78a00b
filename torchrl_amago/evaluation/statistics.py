"""Point estimates and bootstrap confidence intervals for few runs, after Agarwal et al. 2021.

"Deep Reinforcement Learning at the Edge of the Statistical Precipice" (arXiv 2108.13264) defines the
interquartile mean and the stratified bootstrap (section 4); the authors' library is `rliable`.
Everything here is vectorised numpy: scores in, numbers out.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

# The paper draws 2,000 (section 4.1): the interval's ends then move by about 1% of its width.
_RESAMPLES = 2000
# Resampled scores held in memory at once, as numbers: 32 MB.
_CHUNK_NUMBERS = 4_000_000


class Interval(NamedTuple):
    """A point estimate and the two ends of its confidence interval (numbers or arrays)."""

    point: np.ndarray
    low: np.ndarray
    high: np.ndarray


def interquartile_mean(scores: np.ndarray, axis: int | None = None) -> np.ndarray:
    """Mean of the middle half: the lowest and the highest quarter of the scores are left out.

    With n scores, `floor(n / 4)` are cut at each end (as `scipy.stats.trim_mean` and `rliable` do).

    Args:
        scores: numbers of any shape.
        axis: axis to average over; all of them by default.

    Raises:
        ValueError: where there is no score, or one is NaN.

    Example:
        >>> float(interquartile_mean(np.array([0.0, 1.0, 2.0, 100.0])))
        1.5
    """
    scores = np.asarray(scores, dtype=np.float64)
    if axis is None:
        scores, axis = scores.reshape(-1), 0
    _check_scores(scores, axis)
    cut = scores.shape[axis] // 4
    middle = np.sort(scores, axis=axis).take(range(cut, scores.shape[axis] - cut), axis=axis)
    return middle.mean(axis=axis)


def bootstrap_mean(
    values: np.ndarray,
    *,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Mean over the first axis with its percentile-bootstrap interval; NaN marks missing values.

    Whole rows are drawn, so that columns stay together (episodes of one trial are not independent).

    Args:
        values: `[N, ...]`; missing entries are NaN and don't count.
        confidence: probability mass between the two ends.
        resamples: bootstrap samples.
        seed: of the resampling.

    Returns:
        Three arrays of shape `[...]`, NaN where a column has no value at all.

    Raises:
        ValueError: where there is no row, or a value is infinite.

    Example:
        >>> point, low, high = bootstrap_mean(np.array([[0.0], [1.0], [1.0], [np.nan]]))
        >>> round(float(point[0]), 3), bool(low[0] < point[0] < high[0])
        (0.667, True)
    """
    values = np.asarray(values, dtype=np.float64)
    if values.ndim == 0 or not len(values):
        raise ValueError(
            f"bootstrap_mean averages over the first axis, which must not be empty; got shape "
            f"{values.shape}. Pass one row per trial or run."
        )
    if np.isinf(values).any():
        raise ValueError(
            "Values must be finite, or NaN where they are missing, got "
            f"{int(np.isinf(values).sum())} infinite of {values.size}. Put NaN where there is no "
            "value, or find out what diverged."
        )
    _check_confidence(confidence, resamples)
    columns = values.reshape(len(values), -1)
    present = ~np.isnan(columns)
    filled = np.where(present, columns, 0.0)
    generator = np.random.default_rng(seed)
    means = []
    for size in _chunks(resamples, len(values)):
        # How often each row is drawn: a matrix product then sums every resample at once.
        counts = generator.multinomial(
            len(values), np.full(len(values), 1 / len(values)), size=size
        ).astype(np.float64)
        means.append(_divide(counts @ filled, counts @ present))
    point = _divide(filled.sum(0), present.sum(0)).reshape(values.shape[1:])
    low, high = _percentiles(np.concatenate(means), confidence)
    return Interval(point, low.reshape(point.shape), high.reshape(point.shape))


def stratified_bootstrap(
    scores: np.ndarray,
    statistic: Callable[..., np.ndarray] = interquartile_mean,
    *,
    confidence: float = 0.95,
    resamples: int = _RESAMPLES,
    seed: int = 0,
) -> Interval:
    """Interval of a statistic of runs x tasks, resampling the runs of each task on their own.

    The stratified bootstrap of arXiv 2108.13264, section 4.1: every resample has as many runs of
    each task as the data, so that the tasks' own spread doesn't enter.

    Args:
        scores: `[runs, tasks]`.
        statistic: called as `statistic(resampled, axis=1)` on `[K, runs * tasks]`; must return `[K]`.
        confidence: probability mass between the two ends.
        resamples: bootstrap samples.
        seed: of the resampling.

    Example:
        >>> scores = np.random.default_rng(0).normal(1.0, 0.1, size=(10, 3))
        >>> point, low, high = stratified_bootstrap(scores)
        >>> bool(0.9 < low < point < high < 1.1)
        True
    """
    scores = np.asarray(scores, dtype=np.float64)
    if scores.ndim != 2:
        raise ValueError(
            f"stratified_bootstrap needs scores [runs, tasks], got shape {scores.shape}. "
            "For one task, pass scores[:, None]."
        )
    _check_scores(scores, 0)
    _check_confidence(confidence, resamples)
    runs, tasks = scores.shape
    generator = np.random.default_rng(seed)
    statistics = []
    for size in _chunks(resamples, scores.size):
        run = generator.integers(runs, size=(size, runs, tasks))
        resampled = scores[run, np.arange(tasks)]
        statistics.append(statistic(resampled.reshape(size, -1), axis=1))
    low, high = _percentiles(np.concatenate(statistics), confidence)
    return Interval(statistic(scores.reshape(1, -1), axis=1)[0], low, high)


def _percentiles(values: np.ndarray, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """The two ends over the first axis; NaN resamples (of missing values only) don't count."""
    tail = 50 * (1 - confidence)
    known = ~np.isnan(values).all(axis=0)
    ends = np.full((2, *values.shape[1:]), np.nan)
    ends[:, known] = np.nanpercentile(values[:, known], [tail, 100 - tail], axis=0)
    return ends[0], ends[1]


def _divide(total: np.ndarray, count: np.ndarray) -> np.ndarray:
    return np.divide(total, count, out=np.full(np.shape(total), np.nan), where=count > 0)


def _chunks(resamples: int, numbers_each: int) -> list[int]:
    size = max(1, _CHUNK_NUMBERS // numbers_each)
    return [min(size, resamples - first) for first in range(0, resamples, size)]


def _check_scores(scores: np.ndarray, axis: int) -> None:
    if not scores.size or not scores.shape[axis]:
        raise ValueError(
            f"Statistics need at least one score, got shape {scores.shape}. Evaluate first."
        )
    if np.isnan(scores).any():
        raise ValueError(
            f"Scores must not be NaN, {int(np.isnan(scores).sum())} of {scores.size} are. Leave out "
            "runs that have no result, or use bootstrap_mean, which skips NaN."
        )


def _check_confidence(confidence: float, resamples: int) -> None:
    if not 0 < confidence < 1 or resamples < 1:
        raise ValueError(
            "confidence must be in (0, 1) and resamples at least 1, got "
            f"confidence={confidence}, resamples={resamples}. Use 0.95 and 2000."
        )
