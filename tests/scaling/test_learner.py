"""The ratio of sampled to inserted steps is held by pulling, in both directions."""

from __future__ import annotations

import functools
import itertools

import pytest

from tests.scaling.lakes import LENGTH, make_buffer, make_env, make_player, small_policy
from torchrl_amago.scaling import WorkerPool, pool
from torchrl_amago.scaling._exchange import store_segment


@functools.cache
def played_segments():
    player = make_player()
    return [segment for _ in range(20) if (segment := player.play()) is not None]


class FakeWorkers(WorkerPool):
    """Two players whose segments come after so many looks; a look is the only clock there is."""

    def __init__(self, *args, delays=(1, 5), **options):
        super().__init__(*args, **options)
        self.segments = itertools.cycle(played_segments())
        self.delays, self.ready = list(delays), list(delays)
        self.looks = 0
        self.published = []

    def _supervise(self):
        pass

    def _publish(self, is_last=False):
        self.published.append(self._counts["version"])

    def _take(self):
        self.looks += 1
        for i, ready in enumerate(self.ready):
            if ready <= self.looks:
                self.ready[i] = self.looks + self.delays[i]
                return store_segment(next(self.segments), self.replay_buffer)
        return None


@pytest.fixture
def make(tmp_path, monkeypatch):
    monkeypatch.setattr(pool.time, "sleep", lambda _: None)

    def build(buffer=None, **options):
        options = dict(total_updates=10**6, num_workers=0, round_steps=LENGTH) | options
        buffer = make_buffer() if buffer is None else buffer
        return FakeWorkers(make_env, small_policy(), buffer, tmp_path, **options)

    return build


def update(workers, rounds, count=1):
    next(rounds)
    for _ in range(count):
        workers.replay_buffer.sample()
        workers._counts["version"] += 1


@pytest.mark.parametrize(("ratio", "updates"), [(0.5, 500), (4.0, 2000)])
def test_the_ratio_is_held_with_a_slow_and_a_fast_worker_and_when_one_dies(make, ratio, updates):
    workers = make(samples_per_insert=ratio)
    rounds = iter(workers)
    dies, returns = updates // 3, 2 * updates // 3
    for number in range(updates):
        if number == dies:
            workers.ready[0] = 10**9  # the fast one
        if number == returns:
            workers.ready[0] = 0
        update(workers, rounds)
        if number in (dies, returns, updates - 1):
            assert workers.metrics()["ratio/samples_per_insert"] == pytest.approx(ratio, rel=0.1)


def test_by_default_a_round_of_any_worker_is_a_round(make):
    workers = make()
    rounds = iter(workers)
    for _ in range(40):
        update(workers, rounds, count=3)
    # 4 environments of 9 steps; a segment more at most is there.
    assert 40 * 36 <= workers.replay_buffer.write_count + 36 <= 42 * 36


def test_nothing_is_taken_in_that_is_not_due(make):
    workers = make(samples_per_insert=1000.0)
    rounds = iter(workers)
    update(workers, rounds)
    written = workers.replay_buffer.write_count
    for _ in range(50):
        update(workers, rounds)
    assert workers.replay_buffer.write_count == written


def test_versions_are_published_at_intervals(make):
    workers = make(samples_per_insert=4.0, publish_interval=10)
    rounds = iter(workers)
    for _ in range(35):
        workers.update_policy_weights_()
        update(workers, rounds)
    assert workers.published == [0, 10, 20, 30]


def test_lag_and_age_are_logged(make):
    workers = make(samples_per_insert=4.0)
    rounds = iter(workers)
    for _ in range(20):
        update(workers, rounds)
    found = workers.metrics()
    assert found["lag/max"] == 19  # the players keep version 0
    assert 0 < found["lag/mean"] < found["lag/p95"] <= found["lag/max"]
    assert 0 < found["replay/age"] <= workers.replay_buffer.write_count
    assert found["lag/versions_per_trial"] == 1.0
    assert found["wait/learner"] >= 0
    assert "lag/max" not in workers.metrics()


def test_a_resumed_run_owes_the_updates_of_trials_that_came_after_the_checkpoint(make):
    buffer = make_buffer()
    workers = make(buffer, samples_per_insert=4.0)
    rounds = iter(workers)
    for _ in range(30):
        update(workers, rounds)
    state = workers.state_dict()
    for _ in range(30):
        update(workers, rounds)
    resumed = make(buffer, samples_per_insert=4.0)
    resumed.load_state_dict(state)
    rounds, written = iter(resumed), buffer.write_count
    for _ in range(25):
        update(resumed, rounds)
    assert buffer.write_count == written
    for _ in range(100):
        update(resumed, rounds)
    assert resumed.metrics()["ratio/samples_per_insert"] == pytest.approx(4.0, rel=0.1)


def test_a_replay_that_is_gone_starts_the_counts_anew(make):
    workers = make()
    rounds = iter(workers)
    for _ in itertools.repeat(None, 10):
        update(workers, rounds)
    resumed = make(make_buffer())
    resumed.load_state_dict(workers.state_dict())
    assert resumed._counts["due"] == 0


def test_a_signal_ends_the_wait(make):
    workers = make(delays=(10**9,))
    workers.request_stop()
    assert list(iter(workers)) == []
