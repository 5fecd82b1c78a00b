"""Splitting flat batches and rows of several trials into rows of one each."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from tensordict import TensorDict

from torchrl_amago.rows import split_trials


def plain_split(row, real, is_init, done, trajectory):
    """The rows made of one row, one step at a time."""
    rows, before = [], None
    for t, x in enumerate(row):
        if not real[t]:
            before = None
            continue
        goes_on = before is not None and not (
            is_init[t] or done[before] or trajectory[t] != trajectory[before]
        )
        if not goes_on:
            rows.append([])
        rows[-1].append(x)
        before = t
    return rows


bools = st.lists(st.booleans(), min_size=12, max_size=12)


@given(real=bools, is_init=bools, done=bools, new=bools, num_rows=st.sampled_from([0, 1, 3, 4]))
def test_cuts_where_the_definition_does(real, is_init, done, new, num_rows):
    trajectory = torch.tensor(new).cumsum(0)
    shape = (num_rows, 12 // num_rows) if num_rows else (12,)
    batch = TensorDict(
        {
            "x": torch.arange(12),
            "is_init": torch.tensor(is_init).unsqueeze(-1),
            "collector": {"mask": torch.tensor(real), "traj_ids": trajectory},
            "next": {"done": torch.tensor(done).unsqueeze(-1)},
        },
        [12],
    ).reshape(shape)
    expected = []
    for start in range(0, 12, shape[-1]):
        part = slice(start, start + shape[-1])
        marks = (x[part] for x in (real, is_init, done, trajectory.tolist()))
        expected += plain_split(range(*part.indices(12)), *marks)
    rows = split_trials(batch)
    mask = rows["collector", "mask"]
    assert [x[m].tolist() for x, m in zip(rows["x"], mask, strict=True)] == (expected or [[]])
    assert mask.shape[1] == max(map(len, expected), default=1)
    assert not (mask[:, 1:] & ~mask[:, :-1]).any()


def test_without_a_mask_every_step_is_real_and_the_batch_stays_as_it_is():
    batch = TensorDict({"x": torch.arange(4), ("next", "done"): torch.zeros(4, 1).bool()}, [4])
    batch["next", "done"][1] = True
    before = batch.clone()
    rows = split_trials(batch)
    assert rows["x"].tolist() == [[0, 1], [2, 3]]
    assert rows["collector", "mask"].all()
    rows["x"].zero_()
    assert (batch == before).all()
    assert set(batch.keys(True)) == set(before.keys(True))


def test_other_keys():
    batch = TensorDict(
        x=torch.arange(3), start=torch.tensor([True, False, True]), real=torch.ones(3).bool()
    ).auto_batch_size_()
    rows = split_trials(batch, is_init_key="start", mask_key="real")
    assert rows["x"].tolist() == [[0, 1], [2, 2]]
    assert rows["real"].tolist() == [[True, True], [True, False]]


@pytest.mark.parametrize(
    ("shape", "message"),
    [((), "must be flat"), ((2, 2, 3), r"reshape\(-1"), ((5,), "must mark where trials start")],
)
def test_batches_that_cannot_be_split(shape, message):
    with pytest.raises(ValueError, match=message):
        split_trials(TensorDict({"x": torch.zeros(shape)}, shape))


def test_rows_without_marks_stay_one_trial_each():
    rows = split_trials(TensorDict({"x": torch.arange(6).view(2, 3)}, [2, 3]))
    assert rows["x"].tolist() == [[0, 1, 2], [3, 4, 5]]
