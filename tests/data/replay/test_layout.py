from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import NonTensorData, TensorDict

from tests.data.trials import assert_same, flipped, make_buffer, make_trial, make_trials
from torchrl_amago._files import DamagedError
from torchrl_amago.data.replay import _layout as layout
from torchrl_amago.data.replay._layout import ENTRY, TrialTable

DTYPES = [
    torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64,
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64,
]  # fmt: skip


def random_trial(length: int, entries) -> TensorDict:
    """A trial of the given entries ``(kind, dtype, shape)``, named by their number."""
    trial = TensorDict({"next": TensorDict(batch_size=[length])}, [length])
    for number, (kind, dtype, shape) in enumerate(entries):
        values = (100 * torch.randn(length + 1, *shape)).to(dtype)
        key = (f"x{number}",) if number % 2 else ("group", f"x{number}")
        if kind != "next":
            trial[key] = values[:-1]
        if kind != "root":
            trial[("next", *key)] = values[1:]
    return trial


entries = st.lists(
    st.tuples(
        st.sampled_from(["root", "next", "both"]),
        st.sampled_from(DTYPES),
        st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2), (0,)]),
    ),
    min_size=1,
    max_size=8,
).filter(lambda kinds: any(0 not in shape for _, _, shape in kinds))


@given(entries, st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_what_is_written_is_read_back_bit_by_bit(kinds, lengths):
    trials = [random_trial(length, kinds) for length in lengths]
    rb = make_buffer()
    rb.extend(torch.cat(trials), lengths=lengths)
    assert rb.storage.trials().length.tolist() == lengths
    other = make_buffer(capacity=None, path=rb.storage.path, mode="read", verify=True)
    for found in (rb[:], other[:]):
        for key, value in torch.cat(trials).items(True, True):
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key], value), key
        assert len([*found.keys(True, True)]) == len([*trials[0].keys(True, True)])


def test_names_of_entries_may_be_odd(tmp_path):
    steps = TensorDict(batch_size=[3])
    for number, name in enumerate(["a.b", ("a", "b"), "../up", "/root", "a b%2E", ("..", "ä")]):
        steps[name] = torch.arange(3) + 10 * number
    rb = make_buffer(path=tmp_path / "replay")
    rb.extend(steps, lengths=[3])
    assert_same(rb[:], steps)
    assert [file.name for file in tmp_path.iterdir()] == ["replay"]


def test_each_value_is_stored_once_and_the_collectors_own_are_left_out():
    trial = make_trial(5)
    steps, entries = layout.entries_of(trial)
    rows = layout.pack(steps, [5])
    assert set(rows.keys(True, True)) == {
        "id", "observation", "is_init", ("nested", "state"), ("next", "done"), ("next", "reward"),
    }  # fmt: skip
    assert len(rows) == 6
    assert rows["nested", "state"][:, 0].tolist() == [0, 1, 2, 3, 4, 5]
    for key in ("_stream", ("next", "_stream"), ("collector", "traj_ids")):
        trial[key] = torch.zeros(5)
    assert layout.entries_of(trial)[1] == entries


def test_next_that_is_not_the_following_root_is_refused():
    trials = torch.cat(make_trials([4, 3]))
    trials["next", "nested", "state"][3] += 1  # the state after a last step is no root
    for state in (trials["nested", "state"][1], trials["next", "nested", "state"][0]):
        state[:] = torch.nan  # equals itself
    layout.pack(layout.entries_of(trials)[0], [4, 3])
    trials["next", "nested", "state"][5, 0] += 1
    message = r"'nested\.state'.*differs in 1 values.*Make the environment"
    with pytest.raises(ValueError, match=message):
        layout.pack(layout.entries_of(trials)[0], [4, 3])


def test_entries_that_cannot_be_stored_raise():
    trial = make_trial(3)
    trial["next", "nested", "state"] = trial["next", "nested", "state"].float()
    message = r"the root of steps must.*next\.nested\.state: float64 2 there, float32 2 here"
    with pytest.raises(ValueError, match=message):
        layout.entries_of(trial)
    for entry in NonTensorData("a", batch_size=[3]), torch.ones(3, dtype=torch.uint16):
        with pytest.raises(TypeError, match="can't store .* at 'odd'. Convert or exclude it"):
            layout.entries_of(make_trial(3).set("odd", entry))


# -- the table ---------------------------------------------------------------------------------


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
        assert not begin or sum(lengths[begin - 1 :]) > capacity - 2 * 9


@given(st.integers(1, 12), st.integers(1, 6))
def test_equal_trials_fill_the_capacity_exactly_and_no_more_rows(length, count):
    table = make_table(capacity=length * count)
    rows = set()
    for number in range(5 * count):
        rows |= set(write(table, [length]))
        begin, end = table.counters()
        assert end - begin == min(number + 1, count)
    assert max(rows) + length + 1 == count * (length + 1)


def test_any_flipped_bit_is_refused_or_was_of_no_trial(tmp_path):
    capacity = 7
    table = TrialTable.create(tmp_path / "table.bin", capacity)
    for lengths in ([3], [2, 2], [4], [1, 1], [5]):
        write(table, lengths)
    entries, content, refused = table.look().entries, table.file.read_bytes(), 0
    expected = table.counters(), entries.tolist()
    for place in (*range(16), *range(ENTRY.itemsize, len(content))):
        (tmp_path / "damaged.bin").write_bytes(flipped(content, place, place % 8))
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
    content = table.file.read_bytes()
    table.file.write_bytes(content[:size])
    with pytest.raises(DamagedError, match=rf"must have {len(content)} bytes"):
        TrialTable(table.file, 10)


def test_an_older_counter_brings_no_evicted_trial_back(tmp_path):
    table = TrialTable.create(tmp_path / "table.bin", 10)
    write(table, [4])
    older = table._counters[0]
    write(table, [4])
    write(table, [4])
    table._counters[0] = older
    with pytest.raises(DamagedError, match="trials that overlap"):
        TrialTable(table.file, 10)


def test_a_death_before_the_end_moves_keeps_the_last_entry(tmp_path):
    """The largest number of entries never overwrites the last one before them."""
    table = TrialTable.create(tmp_path / "table.bin", 4)
    table.announce(table.place([4])[0])
    trials, begin = table.place([1, 1, 1, 1])
    table.evict(begin)
    word = table._counters[1].copy()
    table.announce(trials)
    table._counters[1] = word
    again = TrialTable(table.file, 4)
    assert (again.counters(), again.look().written) == ((1, 1), 4)
