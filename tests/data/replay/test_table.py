from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.trials import surviving_trials
from torchrl_amago.data.replay.table import EvictedError, TrialTable


def make_table(capacity: int) -> TrialTable:
    folder = Path(tempfile.mkdtemp())
    table = TrialTable.create(folder / "table.bin", capacity)
    (folder / "table.bin").unlink()
    folder.rmdir()
    return table


def write(table: TrialTable, lengths: list[int]) -> list[int]:
    entries, begin = table.place(lengths)
    table.evict(begin)
    table.announce(entries)
    return entries["first"].tolist()


def there(table: TrialTable) -> np.ndarray:
    return table.verify()[1]


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
        entries = there(table)  # checks that they don't overlap, and fit
        assert table.end == len(lengths)
        assert table.written == sum(lengths)
        assert entries["length"].tolist() == lengths[table.begin :]
        assert sum(lengths[table.begin :]) <= capacity
        assert len(entries) >= len(batch)
        taken = [row for e in entries for row in range(e["first"], e["first"] + e["length"] + 1)]
        assert len(set(taken)) == len(taken)
        # Each step takes a row, each trial one more, and a round may end one trial late.
        assert max(taken) < min(2 * capacity + 2 * max(lengths) + 2, 3 * capacity + 2)
        # Gaps between rounds cost at most the place of a trial or two.
        assert len(surviving_trials(lengths, capacity - 2 * 9)) <= len(entries)


@given(st.integers(1, 12), st.integers(1, 6))
def test_equal_trials_fill_the_capacity_exactly_and_no_more_rows(length, count):
    table = make_table(capacity=length * count)
    rows = set()
    for number in range(5 * count):
        rows |= set(write(table, [length]))
        assert table.end - table.begin == min(number + 1, count)
    assert max(rows) + length + 1 == count * (length + 1)


def test_after_everything_was_given_up_writing_goes_on():
    table = make_table(10)
    write(table, [3, 4])
    table.evict(2)
    assert not len(there(table))
    write(table, [5])
    assert (table.begin, table.end, table.written) == (2, 3, 12)


def test_an_entry_that_was_used_again_is_not_taken_for_the_old_one():
    table = make_table(10)
    for _ in range(13):
        write(table, [5])
    with pytest.raises(EvictedError):
        table.read([2])
    assert table.read([11, 12])["length"].tolist() == [5, 5]
