"""The ring of keys and values: its content, and that it neither grows nor moves."""

from __future__ import annotations

import pytest
import torch

from torchrl_amago.modules.trajectory import RingCache, StreamTable


def fill(cache, steps, start=0):
    """Write the step's number as the value; attention to equal keys then gives the mean number."""
    for t in range(start, start + steps):
        cache.advance()
        value = torch.full((cache.batch_size, 2, 4), float(t))
        cache.write(0, torch.zeros_like(value), value)


def mean_seen(cache):
    return cache.attend(0, torch.zeros(cache.batch_size, 2, 4))[:, 0, 0].tolist()


@pytest.mark.parametrize("context_length", [1, 3, 63, 64, 65, 130])
def test_sees_the_last_steps_only(context_length):
    cache = RingCache(1, 2, 2, 4, context_length)
    for t in range(300):
        fill(cache, 1, t)
        first = max(0, t - context_length + 1)
        assert mean_seen(cache) == pytest.approx([(first + t) / 2] * 2, rel=1e-5, abs=1e-5)
        assert cache.length.tolist() == [t - first + 1] * 2


def test_cleared_rows_start_anew_and_others_go_on():
    cache = RingCache(1, 3, 2, 4, context_length=4)
    fill(cache, 3)
    cache.clear(torch.tensor([False, True, False]))
    fill(cache, 2, start=3)
    assert cache.length.tolist() == [4, 2, 4]
    assert mean_seen(cache) == pytest.approx([2.5, 3.5, 2.5])


def test_clear_of_all_rows_and_of_none():
    cache = RingCache(1, 2, 2, 4, context_length=4)
    fill(cache, 3)
    cache.clear(torch.zeros(2, dtype=torch.bool))
    assert cache.length.tolist() == [3, 3]
    cache.clear(torch.ones(2, dtype=torch.bool))
    assert cache.length.tolist() == [0, 0]
    assert not cache.values[0].any()


def test_sinks_stay_when_the_ring_rolls_over():
    cache = RingCache(1, 2, 2, 4, context_length=3, num_sinks=2)
    for t in range(200):
        if t == 150:
            cache.clear(torch.tensor([False, True]))
        positions = torch.tensor([t, t - 150 if t >= 150 else t])
        cache.advance()
        cache.mark_sinks(positions)
        value = positions.view(2, 1, 1).expand(2, 2, 4).float()
        cache.write(0, torch.zeros_like(value), value)
        seen = [{*range(min(p, 2)), *range(max(p - 2, 0), p + 1)} for p in positions.tolist()]
        assert mean_seen(cache) == pytest.approx([sum(s) / len(s) for s in seen], rel=1e-5)


def test_a_memory_lost_in_mid_trial_has_no_sinks():
    cache = RingCache(1, 1, 2, 4, context_length=3, num_sinks=2)
    for t in range(8, 20):
        cache.advance()
        cache.mark_sinks(torch.tensor([t]))
        value = torch.full((1, 2, 4), float(t))
        cache.write(0, torch.zeros_like(value), value)
        assert cache.length.tolist() == [min(t - 7, 3)]
    assert mean_seen(cache) == pytest.approx([18.0])


@pytest.mark.parametrize("rows", [[True, True], [False, True]])
def test_cleared_rows_hold_no_nan(rows):
    cache = RingCache(1, 2, 2, 4, context_length=3)
    for _ in range(2):
        cache.advance()
        bad = torch.zeros(2, 2, 4)
        bad[1] = torch.nan
        cache.write(0, bad, bad)
    cache.clear(torch.tensor(rows))
    fill(cache, 1)
    assert mean_seen(cache) == [0.0, 0.0]


def test_nothing_is_allocated_or_moved():
    cache = RingCache(2, 2, 2, 4, context_length=5)
    before = [t.data_ptr() for t in (*cache.keys, *cache.values, cache.bias)]
    fill(cache, 200)
    cache.clear(torch.tensor([True, False]))
    fill(cache, 3)
    assert [t.data_ptr() for t in (*cache.keys, *cache.values, cache.bias)] == before


def test_stream_table_drops_the_least_recently_used():
    table = StreamTable(2)
    make = lambda: RingCache(1, 1, 1, 2, 1)  # noqa: E731
    first, second = table.add(make()), table.add(make())
    assert first != second
    assert table.find(first) is not None
    third = table.add(make())
    assert [s in table for s in (first, second, third)] == [True, False, True]
    assert len(table) == 2
