"""TrialSliceSampler on TorchRL's own buffers, filled by TorchRL's own collectors."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.collectors import Collector
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, TensorDictReplayBuffer

from tests.data.trials import (
    LENGTHS,
    assert_counts_from_one,
    make_buffer,
    make_env,
    make_trial,
    make_trials,
    rows,
    stored_trials,
    two_processes,
    windows,
)
from tests.evaluation.scripted import act
from torchrl_amago.data import TrialCollector, TrialReplayBuffer, TrialSliceSampler

STORAGES = [LazyTensorStorage, LazyMemmapStorage]
on_both = pytest.mark.parametrize("storage", STORAGES)


def flatten(batch):
    return batch.reshape(-1)


def stock_buffer(storage, batch_size=40, buffer=TensorDictReplayBuffer, **options):
    sampler = TrialSliceSampler(5, warn_short=False, **options)
    return buffer(storage=storage, sampler=sampler, batch_size=batch_size)


def whole_trials(rb) -> list[tuple[int, ...]]:
    """Slots of the trials that are whole, by looking at every step."""
    steps = rb[:]
    found = []
    for trajectory in steps["collector", "traj_ids"].unique().tolist():
        slots = (steps["collector", "traj_ids"] == trajectory).nonzero().squeeze(-1)
        reward = steps["next", "reward"][slots].flatten()
        slots = slots[reward.argsort()]
        count = reward.sort().values.tolist()
        if count == [*range(1, len(count) + 1)] and steps["next", "done"][slots[-1]]:
            found.append(tuple(slots.tolist()))
    return sorted(found)


def found_trials(rb) -> list[tuple[int, ...]]:
    trials = rb.sampler.trials(rb.storage)
    pairs = zip(trials.start, trials.length, strict=True)
    return sorted(tuple(trials.slot[start : start + length].tolist()) for start, length in pairs)


def assert_slices_are_whole(rb) -> None:
    """Slices count up, from 1 if the trial is short, with the environment's flags."""
    batch = rb.sample()
    assert batch.shape == (40, 5)
    step_BT, mask_BT = batch["next", "reward"].squeeze(-1), batch["collector", "mask"]
    assert torch.equal(step_BT.diff(dim=1) == 1, mask_BT[:, 1:])
    assert mask_BT[:, 0].all()
    is_short = ~mask_BT.all(1)
    assert (step_BT[is_short, 0] == 1).all()
    lengths = torch.tensor(sorted({n for row in LENGTHS for n in row}))
    done_BT = batch["next", "done"].squeeze(-1)
    assert torch.isin(step_BT[done_BT], lengths).all()
    assert (done_BT.sum(1) <= 1)[~is_short].all()
    assert done_BT[is_short, -1].all()
    assert torch.equal(batch["is_init"].squeeze(-1), step_BT == 1)
    trajectory_BT = batch.get(("collector", "traj_ids"), batch["index"])
    assert (trajectory_BT == trajectory_BT[:, :1]).all()


@on_both
@pytest.mark.parametrize("capacity", [31, 1000])
@pytest.mark.parametrize(
    "collector",
    [TrialCollector, partial(Collector, trajs_per_batch=1), partial(Collector, postproc=flatten)],
    ids=["ours", "whole", "pieces"],
)
def test_collectors_fill_a_stock_buffer(storage, collector, capacity):
    """Batches cut trials into pieces that lie apart, and the ring overwrites first steps."""
    rb, checked = stock_buffer(storage(capacity)), 0
    collector = collector(
        make_env(), act, frames_per_batch=12, total_frames=12 * 30, replay_buffer=rb
    )
    for _ in collector:
        if not len(rb):
            continue
        assert found_trials(rb) == whole_trials(rb)
        if rb.can_sample() or isinstance(collector, TrialCollector):
            checked += 1
            assert_slices_are_whole(rb)
    collector.shutdown()
    assert checked > 20
    assert len(rb) == 31 or capacity == 1000


@pytest.mark.parametrize("collector", [TrialCollector, partial(Collector, trajs_per_batch=1)])
def test_collectors_fill_a_buffer_of_whole_trials(collector):
    rb = make_buffer(capacity=40, slice_length=5, batch_size=40)
    for _ in collector(make_env(), act, frames_per_batch=9, total_frames=9 * 30, replay_buffer=rb):
        for trial in stored_trials(rb):
            assert_counts_from_one(trial)
        if rb.can_sample():
            assert_slices_are_whole(rb)
    assert len(rb) <= 40
    assert rb.num_trials >= 5  # of at most 7 steps
    assert rb.write_count > 200


@pytest.mark.slow
@pytest.mark.parametrize(
    ("storage", "sync"), [(LazyTensorStorage, True), (LazyMemmapStorage, False)]
)
def test_stock_collectors_in_two_processes(sync, storage, monkeypatch):
    """The sampler sees what other processes write."""
    rb, seen = stock_buffer(storage(150, shared_init=True)), set()
    rb.share()
    options = dict(sync=sync, use_buffers=False, postproc=flatten)
    with two_processes(monkeypatch, rb, 25, **options) as collector:
        for _ in collector:
            if len(rb) and rb.can_sample():
                if sync:
                    assert found_trials(rb) == whole_trials(rb)
                    assert_slices_are_whole(rb)
                seen |= set(rb.sample()["collector", "traj_ids"].unique().tolist())
    assert len(seen) > 20


@given(
    st.integers(5, 30),
    st.lists(st.integers(1, 9), min_size=1, max_size=20),
    st.booleans(),
    st.booleans(),
    st.sampled_from(STORAGES),
)
def test_the_writing_seam_is_never_crossed(capacity, lengths, has_init, has_ids, storage):
    rb = stock_buffer(storage(capacity))
    trials = make_trials([n for n in lengths if n <= capacity], init_key=has_init)
    for number, trial in enumerate(trials):
        if has_ids:
            trial["collector", "traj_ids"] = torch.full([len(trial)], number)
        rb.extend(trial)
        left, total = [], 0
        for earlier in reversed(trials[: number + 1]):
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


def test_elements_of_several_steps_are_refused():
    rb = stock_buffer(LazyTensorStorage(100))
    list(Collector(make_env(), act, frames_per_batch=12, total_frames=12, replay_buffer=rb))
    with pytest.raises(
        ValueError, match=r"must be one step, and is a batch \[4\].*trajs_per_batch=1"
    ):
        rb.sample()


def test_pieces_are_drawn_on_request():
    rb = stock_buffer(LazyTensorStorage(10), whole=False)
    rb.extend(make_trial(9)[:7])
    assert windows(rb.sample()) == {tuple(range(n, n + 5)) for n in range(3)}
    rb.extend(make_trial(9)[7:])
    rb.extend(make_trial(3, 50))  # steps 0 and 1 are gone
    assert windows(rb.sample()) == {*(tuple(range(n, n + 5)) for n in range(2, 5)), (50, 51, 52)}


def test_trajectories_without_flags_are_whole_once_another_one_follows():
    rb = stock_buffer(LazyTensorStorage(100))
    for number, trial in enumerate(make_trials([3, 4], init_key=False)):
        trial["collector", "traj_ids"] = torch.full([len(trial)], number)
        rb.extend(trial.exclude(("next", "done")))
    assert windows(rb.sample()) == {(0, 1, 2)}
    rb = stock_buffer(LazyTensorStorage(100))
    rb.extend(TensorDict({"id": torch.arange(3)}, [3]))
    with pytest.raises(KeyError, match=r"trials need .*traj_ids.*only \['id', 'index'\]"):
        rb.can_sample()


def test_what_torchrl_does_not_name_in_public_is_there():
    """Without these, every draw would look for the trials anew, and rings would have no seam."""
    storage = LazyTensorStorage(10)
    rb = stock_buffer(storage)
    rb.extend(make_trial(7))
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
def test_a_stock_storage_is_brought_back_with_its_draws(storage, draw, tmp_path):
    options = dict(buffer=TrialReplayBuffer, sample_by=draw)
    rb, other = (stock_buffer(storage(30), **options) for _ in range(2))
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
def test_the_seam_is_where_it_was_before_saving(storage, buffer, is_used, tmp_path):
    """Trials of two rows lie between each other, so that no change of trial shows the seam."""
    rb, other = (stock_buffer(storage(11), buffer=buffer, whole=False) for _ in range(2))
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
