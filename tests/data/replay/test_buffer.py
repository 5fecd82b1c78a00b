from __future__ import annotations

import pickle
import tempfile
import threading
import time
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.trainers import ReplayBufferTrainer

from tests.data import trials
from tests.data.trials import assert_same, make_buffer, make_trial, make_trials, rows, seeded
from torchrl_amago.data import Relabel


@given(
    st.integers(9, 25),
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=2), min_size=1, max_size=12),
    st.lists(st.booleans(), min_size=12, max_size=12),
    st.sampled_from(["trials", "steps", "priority"]),
)
def test_sampled_are_the_trials_that_are_left_and_each_of_them(capacity, writes, looks, draw):
    rb = make_buffer(capacity=capacity, slice_length=9, batch_size=200, sample_by=draw)
    written: list[tuple[int, ...]] = []
    for lengths, looks_now in zip(writes, looks, strict=False):
        if sum(lengths) > capacity:
            continue
        new = make_trials(lengths, first_id=sum(map(len, written)))
        numbers = rb.extend(torch.cat(new))
        written += [tuple(trial["id"].tolist()) for trial in new]
        assert numbers.tolist() == list(range(len(written) - len(lengths), len(written)))
        if looks_now:
            assert trials.windows(rb.sample()) == set(written[-rb.num_trials :])


def test_steps_are_stored_without_their_history():
    rb, trial = make_buffer([4]), make_trial(4)
    trial["observation"] = trial["observation"].requires_grad_() * 1.0
    rb.extend(trial)
    assert not rb.sample()["observation"].requires_grad


def test_batches_may_be_changed_in_place_and_stored_trials_may_not():
    rb = make_buffer(batch_size=3, sample_by="priority")
    rb.extend(make_trial(4, 10))

    def halve(batch):
        batch["nested", "state"].mul_(0.5)
        batch["next", "nested", "state"].mul_(0.5)
        return batch

    rb.append_transform(halve)
    batch, count = rb.sample(), torch.arange(5) + 10.0
    assert (batch["nested", "state"][..., 0] == 0.5 * count[:-1]).all()
    assert (batch["next", "nested", "state"][..., 0] == 0.5 * count[1:]).all()
    # Every step of a batch has its own memory.
    batch["index"][0, 0] = 7
    batch["priority_weight"][0, 0] = 8.0
    assert (batch["index"].flatten()[1:] == 0).all()
    assert (batch["priority_weight"].flatten()[1:] == 1.0).all()
    assert batch.view(-1).shape == (12,)
    for change in (
        lambda: rb.set_("id", torch.zeros(4)),
        lambda: rb.set_at_("id", 0, 1),
        lambda: rb.update_({"id": torch.zeros(4)}),
        lambda: rb.__setitem__("id", torch.zeros(4)),
    ):
        with pytest.raises(TypeError, match="stored trials can't be changed in place"):
            change()
    assert (rb.storage[:]["nested", "state"][:, 0] == count[:-1]).all()


def test_torchrls_trainer_hook_updates_priorities_only_if_they_are_used():
    buffers = [make_buffer([4], sample_by=draw) for draw in ("trials", "priority")]
    without, having = (ReplayBufferTrainer(rb, batch_size=8) for rb in buffers)
    without.update_priority(without.sample(None))
    with pytest.raises(KeyError, match="td_error"):
        having.update_priority(having.sample(None))


@pytest.mark.parametrize("prefetch", [None, 2, 3])
def test_prefetched_batches_are_like_the_others_and_forgotten_with_the_trials(prefetch, tmp_path):
    rb = make_buffer([4, 5], prefetch=prefetch, generator=seeded(0))
    rb.dumps(tmp_path)
    rb.sample()
    rb.empty()
    assert not rb.can_sample()
    assert len(rb) == 0
    rb.extend(make_trial(3, first_id=50))
    for _ in range(5):
        assert rows(rb.sample()) == [[50, 51, 52]] * 8
    rb.loads(tmp_path)
    assert rb.sample()["id"].max() < 9
    rb.shutdown()


def test_a_pickled_buffer_is_the_same_and_draws_follow_what_it_loads(tmp_path):
    rb = make_buffer([4], batch_size=400, sample_by="steps", generator=seeded())
    rb.dumps(tmp_path)
    rb.extend(make_trial(40, first_id=10))
    other = pickle.loads(pickle.dumps(rb))  # noqa: S301
    assert torch.equal(other.sample()["id"], rb.sample()["id"])
    other.loads(tmp_path)
    other.extend(make_trial(4, first_id=60))  # the number of the trial of 40 steps
    assert rb.num_trials == 2
    assert rb[-1]["id"].item() == 63
    first_id = torch.tensor(rows(rb.sample()))[:, 0]
    assert 150 < int((first_id == 60).sum()) < 250  # of 400, one half


# -- relabelling -------------------------------------------------------------------------------


class Halve(Relabel):
    """Keeps the first half of every trial, and counts from a random number."""

    def __init__(self):
        super().__init__(["id", ("next", "reward")])
        self.seen = []

    def relabel(self, trials, generator):
        self.seen.append(trials.clone())
        length = (trials["collector", "mask"].sum(1, keepdim=True) + 1) // 2
        shift = torch.randint(100, (len(trials), 1), generator=generator)
        out = TensorDict(batch_size=trials.shape)
        out["id"] = trials["id"] + 1000 * shift
        out["next", "reward"] = -trials["next", "reward"]
        out["collector", "mask"] = torch.arange(trials.shape[1]) < length
        return out


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=6),
    st.integers(1, 6),
    st.sampled_from(["none", "both"]),
    st.sampled_from(["left", "right"]),
)
def test_relabelled_entries_replace_stored_ones_step_by_step(lengths, slice_length, crop, padding):
    relabel = Halve()
    rb = make_buffer(
        lengths, slice_length=slice_length, batch_size=20, relabel=relabel, crop=crop,
        padding=padding, generator=seeded(0),
    )  # fmt: skip
    written = make_trials(lengths)
    before = rb[:].clone()
    state = rb._rng.get_state()
    batch = rb.sample()
    (whole,) = relabel.seen
    assert set(whole.keys(True, True)) == {"id", ("next", "reward"), ("collector", "mask")}
    number = batch["index"][:, 0]
    assert whole.shape == (20, max(lengths[n] for n in number))
    for row, trial in enumerate(number.tolist()):
        mask = whole["collector", "mask"][row]
        assert mask.sum() == lengths[trial]
        assert torch.equal(whole["id"][row][mask], written[trial]["id"])
        mask = batch["collector", "mask"][row]
        ids = batch["id"][row][mask]
        step = ids % 1000 - written[trial]["id"][0]
        assert step.tolist() == list(range(int(step[0]), int(step[0]) + len(step)))
        assert int(step[-1]) < (lengths[trial] + 1) // 2
        assert len(set((ids // 1000).tolist())) == 1
        original = written[trial][step]
        assert torch.equal(batch["next", "reward"][row][mask], -original["next", "reward"])
        for key in ("observation", ("nested", "state"), ("next", "nested", "state"), "is_init"):
            assert torch.equal(batch[key][row][mask], original[key])
    assert_same(rb[:], before)
    rb._rng.set_state(state)
    assert_same(rb.sample(), batch)


# -- what goes wrong ---------------------------------------------------------------------------


def test_impossible_sizes_raise(tmp_path):
    make_buffer([5], capacity=10, path=tmp_path)
    again = dict(slice_length=11, capacity=None, path=tmp_path, mode="continue")
    for options, error, message in [
        (dict(slice_length=11), ValueError, r"slice_length must be in \[1, capacity=10\], got 11"),
        (again, ValueError, r"slice_length must be in \[1, capacity=10\], got 11"),
        (dict(batch_size=0), ValueError, "batch_size must be at least 1, got 0"),
        (dict(mode="read"), FileNotFoundError, "mode='read' needs the path"),
    ]:
        with pytest.raises(error, match=message):
            make_buffer(**{"capacity": 10} | options)


def test_other_than_whole_trials_raises():
    rb, trial = make_buffer(), make_trial(5)
    for steps, message in [
        (trial[:3], r"end with the end of a trial, got 3 steps.*fragment_length"),
        (trial.exclude(("next", "done")), r"whole trials with a flag.*got steps \[5\]"),
        (trial.unsqueeze(0), r"got steps \[1, 5\]"),
        (trial[:0], r"got steps \[0\] and lengths \[\]"),
    ]:
        with pytest.raises(ValueError, match=message):
            rb.extend(steps)
    with pytest.raises(TypeError, match="Write new ones with extend"):
        rb.add(trial[0])
    assert rb.write_count == 0


# -- folders -----------------------------------------------------------------------------------


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=12),
    st.sampled_from(["trials", "steps", "priority"]),
    st.sampled_from([None, Halve]),
    st.integers(0, 2**31),
)
def test_the_same_seed_gives_the_same_batches_after_a_reopening(lengths, draw, relabel, seed):
    with tempfile.TemporaryDirectory() as folder:

        def opened(mode, lengths=()):
            return make_buffer(
                lengths, capacity=30, batch_size=6, path=Path(folder, "replay"), mode=mode,
                sample_by=draw, crop="both", relabel=relabel and relabel(), generator=seeded(seed),
            )  # fmt: skip

        rb = opened("create", lengths)
        expected = [rb.sample() for _ in range(3)]
        for mode in ("continue", "read"):
            again = opened(mode)
            for batch in expected:
                assert_same(again.sample(), batch)


class OnlyWhole(Relabel):
    """Changes nothing, and sees to it that it is given whole trials."""

    def relabel(self, trials, generator):
        id_BL, mask_BL = trials["id"], trials["collector", "mask"]
        assert (id_BL == id_BL[:, :1] + torch.arange(id_BL.shape[1]))[mask_BL].all()
        return TensorDict({}, trials.batch_size)


@pytest.mark.parametrize("mode", ["continue", "read"])
@pytest.mark.parametrize("relabel", [None, OnlyWhole])
def test_others_write_before_or_after_a_batch_is_read(relabel, mode, tmp_path):
    options = dict(capacity=12, path=tmp_path / "replay")
    writer = make_buffer([4, 4], **options)
    learner = make_buffer(mode=mode, relabel=relabel and relabel(["id"]), **options)
    new = torch.cat(make_trials([3, 9], 100))  # in place of all others
    with trials.written_beside(learner.storage, "get", writer.extend, new):
        assert {row[0] for row in rows(learner.sample())} <= {0, 4}
    assert {row[0] for row in rows(learner.sample())} <= {100, *range(103, 110)}


@pytest.mark.parametrize("mode", ["continue", "read"])
def test_sampling_waits_for_a_writer_that_replaces_all_trials(tmp_path, mode):
    options = dict(capacity=12, path=tmp_path / "replay", min_trials=2)
    writer = make_buffer([6, 6], **options)
    learner = make_buffer(mode=mode, **options)
    assert learner.can_sample()
    table = writer.storage.table()
    announce, evicted = table.announce, threading.Event()

    def slowly(entries):
        begin, end = table.counters()
        assert begin == end  # all were given up
        evicted.set()
        time.sleep(0.2)
        return announce(entries)

    table.announce = slowly
    thread = threading.Thread(target=lambda: writer.extend(make_trial(12, 50)))
    thread.start()
    assert evicted.wait(10)
    # Fewer trials than it once waited for, but longer ones.
    assert {50 <= row[0] <= 58 for row in rows(learner.sample())} == {True}
    thread.join()
    assert not learner.can_sample()
    assert learner.sample().shape == (8, 4)
