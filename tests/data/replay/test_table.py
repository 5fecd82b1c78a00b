from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.data.trials import surviving_trials
from torchrl_amago._files import DamagedError
from torchrl_amago.data.replay._layout import ENTRY, TrialTable


def make_table(capacity: int) -> TrialTable:
    with tempfile.TemporaryDirectory() as folder:
        return TrialTable.create(Path(folder, "table.bin"), capacity)  # is mapped, and stays so


def write(table: TrialTable, lengths: list[int]) -> list[int]:
    entries, begin = table.place(lengths)
    table.evict(begin)
    table.announce(entries)
    return entries["first"].tolist()


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
        entries = table.look().entries
        begin, end = table.counters()
        assert end == len(lengths)
        assert table.look().written == sum(lengths)
        assert entries["length"].tolist() == lengths[begin:]
        assert sum(lengths[begin:]) <= capacity
        assert len(entries) >= len(batch)
        taken = [row for e in entries for row in range(e["first"], e["first"] + e["length"] + 1)]
        assert len(set(taken)) == len(taken)
        # Each step takes a row, each trial one more, and a round may end one write late.
        assert max(taken) < 2 * capacity + max(sum(b) + len(b) for b in batches) <= 4 * capacity
        new = entries[-len(batch) :]
        assert (np.diff(new["first"]) == new["length"][:-1] + 1).all()
        # Gaps between rounds cost at most the place of a trial or two.
        assert len(surviving_trials(lengths, capacity - 2 * 9)) <= len(entries)


@given(st.integers(1, 12), st.integers(1, 6))
def test_equal_trials_fill_the_capacity_exactly_and_no_more_rows(length, count):
    table = make_table(capacity=length * count)
    rows = set()
    for number in range(5 * count):
        rows |= set(write(table, [length]))
        begin, end = table.counters()
        assert end - begin == min(number + 1, count)
    assert max(rows) + length + 1 == count * (length + 1)


def test_after_everything_was_given_up_writing_goes_on():
    table = make_table(10)
    write(table, [3, 4])
    table.evict(2)
    assert not len(table.look().entries)
    write(table, [5])
    assert (table.counters(), table.look().written) == ((2, 3), 12)


def test_any_flipped_bit_is_refused_or_was_of_no_trial(tmp_path):
    capacity = 7
    table = TrialTable.create(tmp_path / "table.bin", capacity)
    for lengths in ([3], [2, 2], [4], [1, 1], [5]):
        write(table, lengths)
    entries = table.look().entries
    content = (tmp_path / "table.bin").read_bytes()
    expected = table.counters(), entries.tolist()
    refused = 0
    used = [*range(16), *range(ENTRY.itemsize, len(content))]
    for place in used:
        damaged = bytearray(content)
        damaged[place] ^= 1 << place % 8
        (tmp_path / "damaged.bin").write_bytes(damaged)
        try:
            again = TrialTable(tmp_path / "damaged.bin", capacity)
        except DamagedError:
            refused += 1
        else:
            assert (again.counters(), again.look().entries.tolist()) == expected, place
    assert refused == 16 + ENTRY.itemsize * len(entries)


@pytest.mark.parametrize("size", [0, 16, ENTRY.itemsize, -1])
def test_a_file_cut_short_is_refused(tmp_path, size):
    table = TrialTable.create(tmp_path / "table.bin", 10)
    write(table, [3])
    content = (tmp_path / "table.bin").read_bytes()
    (tmp_path / "table.bin").write_bytes(content[:size])
    with pytest.raises(DamagedError, match=rf"must have {len(content)} bytes"):
        TrialTable(tmp_path / "table.bin", 10)


def test_an_older_counter_brings_no_evicted_trial_back(tmp_path):
    table = TrialTable.create(tmp_path / "table.bin", 10)
    write(table, [4])
    older = table._counters[0]
    write(table, [4])
    write(table, [4])
    table._counters[0] = older
    with pytest.raises(DamagedError, match="trials that overlap"):
        TrialTable(tmp_path / "table.bin", 10)


def test_a_death_before_the_end_moves_keeps_the_last_entry(tmp_path):
    """The largest number of entries never overwrites the last one before them."""
    table = TrialTable.create(tmp_path / "table.bin", 4)
    table.announce(table.place([4])[0])
    trials, begin = table.place([1, 1, 1, 1])
    table.evict(begin)
    word = table._counters[1].copy()
    table.announce(trials)
    table._counters[1] = word
    again = TrialTable(tmp_path / "table.bin", 4)
    assert (again.counters(), again.look().written) == ((1, 1), 4)
