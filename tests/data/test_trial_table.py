from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tests.data.trials import surviving_trials
from torchrl_amago.data.trial_table import TrialTable


def make_table(capacity: int) -> TrialTable:
    return TrialTable(capacity, 3 * capacity + 2)


def write(table: TrialTable, lengths: list[int]) -> list[int]:
    plan = table.plan(lengths)
    table.evict(plan.begin)
    table.extend(plan.first, lengths)
    return plan.first.tolist()


writes = st.tuples(
    st.integers(4, 30),
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=4), min_size=1, max_size=40),
).map(lambda case: (case[0], [w for w in case[1] if sum(w) <= case[0]]))


@given(writes)
def test_trials_never_overlap_and_the_newest_are_kept(case):
    capacity, batches = case
    table = make_table(capacity)
    lengths: list[int] = []
    for batch in batches:
        write(table, batch)
        lengths += batch
        assert table.end == len(lengths)
        assert table.written == sum(lengths)
        assert table.steps.tolist() == lengths[table.begin :]
        assert table.total_steps == sum(lengths[table.begin :]) <= capacity
        assert len(table) >= len(batch)
        taken = [
            row
            for first, steps in zip(table.first, table.steps, strict=True)
            for row in range(first, first + steps + 1)
        ]
        assert len(set(taken)) == len(taken)
        assert min(taken) >= 0
        assert max(taken) < table.max_rows
        # Gaps between rounds cost at most the place of a trial or two.
        assert len(surviving_trials(lengths, capacity - 2 * 9)) <= len(table)


@given(st.integers(1, 12), st.integers(1, 6))
def test_equal_trials_fill_the_capacity_exactly_and_no_more_rows(length, count):
    table = make_table(capacity=length * count)
    rows = set()
    for number in range(5 * count):
        (first,) = write(table, [length])
        rows.add(first)
        assert len(table) == min(number + 1, count)
    assert max(rows) + length + 1 == count * (length + 1)


@given(writes)
def test_rows_in_use_stay_close_to_the_capacity(case):
    capacity, batches = case
    table = make_table(capacity)
    lengths = [n for batch in batches for n in batch]
    for batch in batches:
        write(table, batch)
        highest = int((table.first + table.steps).max()) + 1
        # Each step takes a row, each trial one more, and a round may end one trial late.
        assert highest <= 2 * capacity + 2 * max(lengths) + 2


@given(writes)
def test_a_table_restarted_from_its_counters_goes_on_alike(case):
    capacity, batches = case
    table = make_table(capacity)
    for batch in batches[: len(batches) // 2]:
        write(table, batch)
    copy = make_table(capacity)
    copy.restart(*table.counters)
    copy.extend(table.first, table.steps)
    for batch in batches[len(batches) // 2 :]:
        assert write(copy, batch) == write(table, batch)
        assert copy.first.tolist() == table.first.tolist()
        assert (copy.begin, copy.end, copy.written) == (table.begin, table.end, table.written)


def test_evicting_all_and_more_is_harmless():
    table = make_table(10)
    write(table, [3, 4])
    table.evict(9)
    assert len(table) == table.total_steps == 0
    assert table.begin == table.end == 2
    assert write(table, [5]) == [0]
    assert table.steps.tolist() == [5]
