"""The suite's statistics: by hand, by how often their intervals cover the truth, beside rliable."""

from __future__ import annotations

import numpy as np
import pytest
from suite_statistics import performance_profile, probability_of_improvement, stratified_bootstrap

from torchrl_amago.evaluation import interquartile_mean


def test_stratified_bootstrap_keeps_the_spread_between_tasks_out():
    # Two tasks that differ, runs that don't: nothing is uncertain.
    scores = np.array([[0.0, 100.0]] * 5)
    assert stratified_bootstrap(scores) == (50.0, 50.0, 50.0)
    assert stratified_bootstrap(scores, np.mean) == (50.0, 50.0, 50.0)


def test_stratified_bootstrap_covers_the_truth_as_often_as_it_says():
    generator = np.random.default_rng(0)
    inside = 0
    for trial in range(100):
        scores = generator.normal(0.0, 1.0, size=(20, 4))
        _, low, high = stratified_bootstrap(scores, np.mean, resamples=300, seed=trial)
        inside += low <= 0 <= high
    assert 87 <= inside <= 100  # 95 expected; the bootstrap of few runs is a little short


def test_stratified_bootstrap_of_one_task():
    scores = np.arange(8.0)
    assert stratified_bootstrap(scores) == stratified_bootstrap(scores[:, None])


def test_stratified_bootstrap_of_tasks_with_different_numbers_of_runs():
    by_task = {"one": np.array([1.0] * 6), "two": np.array([5.0] * 2)}
    # Eight scores in all, of which two are cut at each end; each resample has the same ones.
    assert stratified_bootstrap(by_task) == (1.0, 1.0, 1.0)
    assert stratified_bootstrap(by_task, np.mean) == (2.0, 2.0, 2.0)
    scores = np.random.default_rng(0).random((4, 3))
    columns = {str(task): scores[:, task] for task in range(3)}
    assert stratified_bootstrap(columns) == stratified_bootstrap(scores)


def test_performance_profile_by_hand():
    scores = np.array([[0.0, 10.0], [1.0, 10.0]])
    # Above 0: one of the two runs at the first task, both at the second. A resample of the first
    # task has no, one or two such runs.
    point, low, high = performance_profile(scores, [-1, 0, 1, 10])
    assert point.tolist() == [1.0, 0.75, 0.5, 0.0]
    assert low.tolist() == [1.0, 0.5, 0.5, 0.0]
    assert high.tolist() == [1.0, 1.0, 0.5, 0.0]


def test_probability_of_improvement_by_hand():
    ours, theirs = np.array([[1.0, 0.0], [2.0, 0.0]]), np.array([[1.0, 5.0], [0.0, 5.0]])
    # The first task: of four pairs three are won and one is a draw; the second: all are lost.
    assert probability_of_improvement(ours, theirs).point == (3.5 / 4 + 0) / 2
    assert probability_of_improvement(theirs, ours).point == 1 - (3.5 / 4 + 0) / 2
    _, low, high = probability_of_improvement(ours, theirs)
    assert (low, high) == (0.25, 0.5)


def test_statistics_equal_those_of_rliable():
    library = pytest.importorskip("rliable.library")
    metrics = pytest.importorskip("rliable.metrics")
    generator = np.random.default_rng(3)
    ours, theirs = generator.normal(size=(5, 7)), generator.normal(0.3, 1.0, size=(5, 7))
    assert interquartile_mean(ours) == pytest.approx(metrics.aggregate_iqm(ours))
    _, ends = library.get_interval_estimates(
        {"ours": ours}, lambda x: np.array([metrics.aggregate_iqm(x)]), reps=4000
    )
    _, low, high = stratified_bootstrap(ours)
    assert (low, high) == pytest.approx(tuple(ends["ours"][:, 0]), abs=0.05)
    thresholds = np.linspace(-2, 2, 9)
    points, _ = library.create_performance_profile({"ours": ours}, thresholds, reps=10)
    np.testing.assert_allclose(performance_profile(ours, thresholds).point, points["ours"])
    expected = metrics.probability_of_improvement(ours, theirs)
    assert probability_of_improvement(ours, theirs).point == pytest.approx(expected)


def test_errors():
    scores = np.random.default_rng(0).random((50, 3))
    assert stratified_bootstrap(scores, resamples=30).low.shape == ()
    with pytest.raises(ValueError, match=r"confidence must be in \[0, 1\], got 95"):
        stratified_bootstrap(scores, confidence=95)
    with pytest.raises(ValueError, match=r"finite ones, got 1 others in shape \(1, 2\)"):
        stratified_bootstrap(np.array([[1.0, np.nan]]))
