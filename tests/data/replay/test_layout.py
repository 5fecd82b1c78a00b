from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import NonTensorData, TensorDict, assert_close

from tests.data.trials import make_trial, make_trials
from torchrl_amago.data.row_layout import RowLayout

DTYPES = [
    torch.bool, torch.uint8, torch.int16, torch.int32, torch.int64,
    torch.bfloat16, torch.float16, torch.float32, torch.float64, torch.complex64,
]  # fmt: skip


def random_trial(length: int, entries) -> TensorDict:
    """A trial of the given entries ``(kind, dtype, shape)``, named by their number."""
    trial = TensorDict({"next": TensorDict(batch_size=[length])}, [length])
    for number, (kind, dtype, shape) in enumerate(entries):
        values = (100 * torch.randn(length + 1, *shape)).to(dtype)
        key = f"x{number}" if number % 2 else ("group", f"x{number}")
        below = ("next", key) if isinstance(key, str) else ("next", *key)
        if kind != "next":
            trial[key] = values[:-1]
        if kind != "root":
            trial[below] = values[1:]
    return trial


entries = st.lists(
    st.tuples(
        st.sampled_from(["root", "next", "both"]),
        st.sampled_from(DTYPES),
        st.sampled_from([(), (1,), (3,), (2, 3), (2, 1, 2)]),
    ),
    min_size=1,
    max_size=8,
)


@given(entries, st.lists(st.integers(1, 6), min_size=1, max_size=4))
def test_what_is_written_is_read_back_bit_by_bit(kinds, lengths):
    trials = [random_trial(length, kinds) for length in lengths]
    steps = torch.cat(trials)
    layout = RowLayout.from_json(json.loads(json.dumps(RowLayout.of(steps).to_json())))
    rows = torch.full((sum(lengths) + 2 * len(lengths), layout.row_bytes), 255, dtype=torch.uint8)
    count = torch.tensor(lengths)
    last = count.cumsum(0) - 1
    layout.check_pairs(steps, last)
    # A row is left free between trials: nobody may write there.
    row = torch.arange(len(steps)) + 2 * torch.arange(len(lengths)).repeat_interleave(count)
    layout.write(rows, steps, row, last)
    free = row[last] + 2
    assert (rows[free] == 255).all()
    for trial, first in zip(trials, (row[last] - count + 1).tolist(), strict=True):
        found = layout.read(rows[first : first + len(trial) + 1])
        found["next"] = found.get("next", TensorDict(batch_size=found.batch_size))
        assert set(found.keys(True, True)) == set(trial.keys(True, True))
        for key, value in trial.items(True, True):
            assert found[key].dtype == value.dtype
            assert torch.equal(found[key].view(value.dtype), value), key


def test_each_value_is_stored_once():
    trial = make_trial(5)
    layout = RowLayout.of(trial)
    kinds = {".".join(column.key): column.kind for column in layout.columns}
    assert kinds == {
        "id": "root", "observation": "root", "is_init": "root", "nested.state": "both",
        "done": "next", "reward": "next",
    }  # fmt: skip
    # 8 + 2 * 4 + 1 + 2 * 8 + 1 + 4 = 38, up to a multiple of the widest type.
    assert layout.row_bytes == 40


def test_the_collectors_own_entries_are_left_out():
    trial = make_trial(3)
    trial["collector"] = TensorDict({"traj_ids": torch.zeros(3)}, [3])
    trial["_stream"] = torch.zeros(3)
    trial["next", "_stream"] = torch.zeros(3)
    assert RowLayout.of(trial).differences(RowLayout.of(make_trial(3))) == ""


def test_next_that_is_not_the_following_root_is_refused():
    trials = torch.cat(make_trials([4, 3]))
    layout = RowLayout.of(trials)
    last = torch.tensor([3, 6])
    layout.check_pairs(trials, last)
    trials["next", "nested", "state"][3] += 1  # what a last step led to is nobody's root
    layout.check_pairs(trials, last)
    trials["next", "nested", "state"][5, 0] += 1
    with pytest.raises(
        ValueError, match=r"'nested\.state'.*differs in 1 values.*Let the environment"
    ):
        layout.check_pairs(trials, last)


def test_nan_equals_nan():
    trial = make_trial(3)
    trial["nested", "state"][1] = float("nan")
    trial["next", "nested", "state"][0] = float("nan")
    RowLayout.of(trial).check_pairs(trial, torch.tensor([2]))


def test_refuses_what_it_cannot_store():
    trial = make_trial(3)
    trial["next", "nested", "state"] = trial["next", "nested", "state"].float()
    with pytest.raises(ValueError, match=r"state.*one shape and dtype.*float64 and.*float32"):
        RowLayout.of(trial)
    trial = make_trial(3)
    trial["text"] = NonTensorData("a", batch_size=[3])
    with pytest.raises(TypeError, match="stores tensors, got .* at 'text'"):
        RowLayout.of(trial)
    with pytest.raises(ValueError, match="at least one entry"):
        RowLayout.of(TensorDict(batch_size=[3]))
    with pytest.raises(KeyError, match="'colour'"):
        RowLayout.of(make_trial(3))["colour"]


def test_differences_name_the_entry():
    one, other = make_trial(3), make_trial(3)
    other["observation"] = torch.zeros(3, 5)
    del other["is_init"]
    message = RowLayout.of(one).differences(RowLayout.of(other))
    assert "is_init: [1] bool (root only) stored, nothing here" in message
    assert "observation: [2] float32 (root only) stored, [5] float32 (root only) here" in message


def test_keys_of_columns():
    layout = RowLayout.of(make_trial(3))
    assert layout["next", "reward"].kind == "next"
    assert layout["next", "nested", "state"] is layout["nested", "state"]
    with pytest.raises(KeyError, match="'reward'"):
        layout["reward"]


def test_reading_copies_nothing():
    trial = make_trial(3)
    layout = RowLayout.of(trial)
    rows = torch.zeros(4, layout.row_bytes, dtype=torch.uint8)
    layout.write(rows, trial, torch.arange(3), torch.tensor([2]))
    found = layout.read(rows)
    rows.zero_()
    assert_close(found, found.apply(torch.zeros_like))
