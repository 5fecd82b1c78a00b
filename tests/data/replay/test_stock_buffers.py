"""TrialSliceSampler on TorchRL's own buffers."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from tests.data import trials
from tests.data.trials import found_trials, make_trial, make_trials, rows, windows
from torchrl_amago.data import TrialReplayBuffer

KINDS = ["tensor", "memmap"]
on_both = pytest.mark.parametrize("kind", KINDS)
stock_buffer = partial(trials.stock_buffer, slice_length=5, batch_size=40)


@given(
    st.integers(5, 30),
    st.lists(st.integers(1, 9), min_size=1, max_size=20),
    st.booleans(),
    st.booleans(),
    st.sampled_from(KINDS),
)
def test_the_writing_seam_is_never_crossed(capacity, lengths, has_init, has_ids, kind):
    rb = stock_buffer(kind, capacity)
    written = make_trials([n for n in lengths if n <= capacity], init_key=has_init)
    for number, trial in enumerate(written):
        if has_ids:
            trial["collector", "traj_ids"] = torch.full([len(trial)], number)
        rb.extend(trial)
        left, total = [], 0
        for earlier in reversed(written[: number + 1]):
            total += len(earlier)
            if total > capacity or (total == capacity and not has_init):
                break  # without is_init, the oldest trial counts as cut once the ring is full
            left.append(earlier["id"].tolist())
        ids = rb[:]["id"]
        assert sorted(ids[list(slots)].tolist() for slots in found_trials(rb)) == left[::-1]
        if left:
            for row in rows(rb.sample()):
                assert any(set(row) <= set(whole) for whole in left)
                assert row == [*range(row[0], row[0] + len(row))]


def test_pieces_are_drawn_on_request():
    rb = stock_buffer(capacity=10, whole=False)
    rb.extend(make_trial(9)[:7])
    assert windows(rb.sample()) == {tuple(range(n, n + 5)) for n in range(3)}
    rb.extend(make_trial(9)[7:])
    rb.extend(make_trial(3, 50))  # steps 0 and 1 are gone
    assert windows(rb.sample()) == {*(tuple(range(n, n + 5)) for n in range(2, 5)), (50, 51, 52)}


def test_trajectories_without_flags_are_whole_once_another_one_follows():
    rb = stock_buffer()
    for number, trial in enumerate(make_trials([3, 4], init_key=False)):
        trial["collector", "traj_ids"] = torch.full([len(trial)], number)
        rb.extend(trial.exclude(("next", "done")))
    assert windows(rb.sample()) == {(0, 1, 2)}
    rb = stock_buffer()
    rb.extend(TensorDict({"id": torch.arange(3)}, [3]))
    with pytest.raises(KeyError, match=r"trials need .*traj_ids.*only \['id', 'index'\]"):
        rb.can_sample()


def test_what_torchrl_does_not_name_in_public_is_there():
    """Without these, every draw would look for the trials anew, and rings would have no seam."""
    rb = stock_buffer(capacity=10)
    rb.extend(make_trial(7))
    storage = rb.storage
    before = storage._mutation_revision
    assert storage._last_cursor_index == 6
    found = rb.sampler.trials(storage)
    assert rb.sampler.trials(storage) is found
    rb.extend(make_trial(5))
    assert storage._mutation_revision > before
    assert storage._last_cursor_index == 1
    assert rb.sampler.trials(storage) is not found


@on_both
@pytest.mark.parametrize("draw", ["trials", "steps", "priority"])
def test_a_stock_storage_is_brought_back_with_its_draws(kind, draw, tmp_path):
    options = dict(buffer=TrialReplayBuffer, sample_by=draw)
    rb, other = (stock_buffer(kind, 30, **options) for _ in range(2))
    for number, trial in enumerate(make_trials([7, 9, 5, 11, 6])):
        trial["collector", "traj_ids"] = torch.full([len(trial)], number)
        rb.extend(trial)
    if draw == "priority":
        batch = rb.sample()
        batch["td_error"] = batch["id"].float()
        rb.update_priority(batch)
    rb.dumps(tmp_path)
    other.loads(tmp_path)
    torch.manual_seed(0)
    expected = rb.sample()
    torch.manual_seed(0)
    assert (other.sample() == expected).all()
    assert other.write_count == rb.write_count == 38


@on_both
@pytest.mark.parametrize("buffer", [TensorDictReplayBuffer, TrialReplayBuffer])
@pytest.mark.parametrize("is_used", [False, True])
def test_the_seam_is_where_it_was_before_saving(kind, buffer, is_used, tmp_path):
    """Trials of two rows lie between each other, so that no change of trial shows the seam."""
    rb, other = (stock_buffer(kind, 11, buffer=buffer, whole=False) for _ in range(2))
    for number, pair in enumerate(zip(*[iter(make_trials([6] * 6))] * 2, strict=True)):
        steps = torch.stack(pair, 1)
        ids = torch.arange(2 * number, 2 * number + 2)
        steps["collector", "traj_ids"] = ids.expand(6, 2)
        rb.extend(steps[:3].reshape(-1))
        if is_used:
            other.extend(steps[:1].reshape(-1))
            other.sample()
        rb.extend(steps[3:].reshape(-1))
        rb.dumps(tmp_path / str(number))
        other.loads(tmp_path / str(number))
        for brought_back in (other, rb):
            assert found_trials(brought_back) == found_trials(rb)
            for row in rows(brought_back.sample()):
                assert row == [*range(row[0], row[0] + len(row))]
