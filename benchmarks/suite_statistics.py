"""Statistics over the runs of several tasks as rliable defines them (arXiv 2108.13264)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from torchrl_amago.evaluation import Interval, interquartile_mean
from torchrl_amago.evaluation.statistics import RESAMPLES, check_scores, percentile_ends

Scores = np.ndarray | Mapping[str, np.ndarray]
"""Scores of runs x tasks `[runs, tasks]`, or runs by name of the task."""


def stratified_bootstrap(
    scores: Scores,
    statistic: Callable[..., np.ndarray] = interquartile_mean,
    *,
    confidence: float = 0.95,
    resamples: int = RESAMPLES,
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
    return Interval(point, *percentile_ends(statistic(resampled, axis=1), confidence))


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
    resamples: int = RESAMPLES,
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
    return Interval(float(point), *percentile_ends(np.mean(drawn, axis=0), confidence))


def _by_task(scores: Scores) -> list[np.ndarray]:
    if isinstance(scores, Mapping):
        return [check_scores(runs).reshape(-1) for runs in scores.values()]
    scores = check_scores(scores)
    return list(scores.reshape(len(scores), -1).T)


def _draw(runs: np.ndarray, resamples: int, generator: np.random.Generator) -> np.ndarray:
    return runs[generator.integers(len(runs), size=(resamples, len(runs)))]
