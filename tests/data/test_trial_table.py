from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.data.trials import surviving_trials
from torchrl_amago.data import TrialTable

lengths_and_capacity = st.tuples(
    st.lists(st.integers(1, 9), min_size=1, max_size=20), st.integers(9, 30)
)


def trials_of(table: TrialTable) -> list[tuple[int, int]]:
    return list(zip(table.start.tolist(), table.length.tolist(), strict=True))


def ends_of(lengths: list[int]) -> torch.Tensor:
    ends = torch.zeros(sum(lengths), dtype=torch.bool)
    ends[torch.tensor(lengths).cumsum(0) - 1] = True
    return ends


def ring_of(flags: torch.Tensor, capacity: int) -> torch.Tensor:
    """What a ring holds of these steps, in slot order."""
    ring = torch.zeros(min(capacity, flags.numel()), dtype=flags.dtype)
    for step, flag in enumerate(flags):
        ring[step % capacity] = flag
    return ring


def test_trial_with_one_overwritten_step_is_dropped_whole():
    table = TrialTable(capacity=10)
    table.extend(ends_of([4, 3, 3]))
    assert trials_of(table) == [(0, 4), (4, 3), (7, 3)]
    table.extend(ends_of([1]))
    assert trials_of(table) == [(4, 3), (7, 3), (10, 1)]
    assert table.slot(table.start).tolist() == [4, 7, 0]


def test_unfinished_trial_is_not_listed_until_its_end_arrives():
    table = TrialTable(capacity=10)
    table.extend(torch.tensor([False, True, False]))
    assert trials_of(table) == [(0, 2)]
    table.extend(torch.tensor([False, True]))
    assert trials_of(table) == [(0, 2), (2, 3)]


def test_trial_longer_than_the_ring_never_appears():
    table = TrialTable(capacity=4)
    for _ in range(3):
        table.extend(torch.tensor([False, False]))
    table.extend(torch.tensor([True, True]))
    assert trials_of(table) == [(7, 1)]


@given(lengths_and_capacity, st.integers(1, 9))
def test_steps_written_in_any_portions_give_the_surviving_trials(case, portion):
    lengths, capacity = case
    table = TrialTable(capacity)
    for part in ends_of(lengths).split(min(portion, capacity)):
        table.extend(part)
    assert trials_of(table) == surviving_trials(lengths, capacity)


@given(lengths_and_capacity)
def test_scan_with_begins_finds_what_following_the_writes_finds(case):
    lengths, capacity = case
    ends = ends_of(lengths)
    begins = ends.roll(1)
    begins[0] = True
    written = ends.numel()
    table = TrialTable.scan(
        capacity, written % capacity, ring_of(ends, capacity), ring_of(begins, capacity)
    )
    slots = [(first % capacity, length) for first, length in surviving_trials(lengths, capacity)]
    assert list(zip(table.slot(table.start).tolist(), table.length.tolist(), strict=True)) == slots
    assert table.written % capacity == written % capacity


@given(lengths_and_capacity)
def test_scan_without_begins_misses_at_most_the_oldest_trial(case):
    lengths, capacity = case
    ends = ring_of(ends_of(lengths), capacity)
    table = TrialTable.scan(capacity, sum(lengths) % capacity, ends)
    found = list(zip(table.slot(table.start).tolist(), table.length.tolist(), strict=True))
    slots = [(first % capacity, length) for first, length in surviving_trials(lengths, capacity)]
    is_full = sum(lengths) >= capacity
    touches_cursor = is_full and slots and slots[0][0] == sum(lengths) % capacity
    assert found == (slots[1:] if touches_cursor else slots)


@given(lengths_and_capacity, st.integers(0, 20))
def test_state_dict_continues_where_it_stopped(case, cut):
    lengths, capacity = case
    before, after = ends_of(lengths)[:cut], ends_of(lengths)[cut:]
    table = TrialTable(capacity)
    for part in before.split(capacity):
        table.extend(part)
    table = TrialTable.from_state_dict(table.state_dict())
    for part in after.split(capacity):
        table.extend(part)
    assert trials_of(table) == surviving_trials(lengths, capacity)
