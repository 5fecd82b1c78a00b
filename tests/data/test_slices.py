from __future__ import annotations

import json
import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer

from tests.data.trials import make_trial, make_trials, surviving_trials
from torchrl_amago.data import TrialSliceSampler


def make_buffer(capacity: int = 100, slice_len: int = 4, batch_size: int = 8, **kwargs):
    kwargs.setdefault("warn_short", False)
    return TensorDictReplayBuffer(
        storage=LazyTensorStorage(capacity),
        sampler=TrialSliceSampler(slice_len, **kwargs),
        batch_size=batch_size,
    )


def write(rb, trials) -> None:
    for trial in trials:
        rb.extend(trial)


def rows(batch) -> list[list[int]]:
    """The ids behind the mask, row by row."""
    mask_BT = batch["collector", "mask"]
    return [ids[mask].tolist() for ids, mask in zip(batch["id"], mask_BT, strict=True)]


def test_mask_marks_exactly_the_steps_of_one_trial():
    rb = make_buffer(slice_len=4, batch_size=200)
    write(rb, make_trials([2, 7]))
    batch = rb.sample()
    assert batch.shape == (200, 4)
    assert {tuple(row) for row in rows(batch)} == {
        (0, 1), (2, 3, 4, 5), (3, 4, 5, 6), (4, 5, 6, 7), (5, 6, 7, 8)
    }  # fmt: skip


def test_right_padding_repeats_the_last_step_and_left_padding_the_first():
    for padding, ids, mask in [
        ("right", [0, 1, 2, 2, 2], [True, True, True, False, False]),
        ("left", [0, 0, 0, 1, 2], [False, False, True, True, True]),
    ]:
        rb = make_buffer(slice_len=5, batch_size=1, padding=padding)
        write(rb, [make_trial(3)])
        batch = rb.sample()
        assert batch["id"].tolist() == [ids]
        assert batch["collector", "mask"].tolist() == [mask]


def test_mask_is_there_when_nothing_is_padded():
    rb = make_buffer(slice_len=2)
    write(rb, [make_trial(6)])
    mask = rb.sample()["collector", "mask"]
    assert mask.dtype == torch.bool
    assert mask.shape == (8, 2)
    assert mask.all()


def test_poisoned_neighbours_never_show_behind_the_mask_or_before_it():
    rb = make_buffer(capacity=20, slice_len=6, batch_size=100)
    good, bad = make_trial(3), make_trial(16, first_id=100)
    bad["observation"] = torch.full((16, 2), float("nan"))
    write(rb, [good])
    rb.extend(bad[:15])  # its last step is missing: it must stay out
    batch = rb.sample()
    assert batch["observation"].isfinite().all()
    assert {tuple(row) for row in rows(batch)} == {(0, 1, 2)}


def test_trials_are_equally_likely_whatever_their_length():
    rb = make_buffer(capacity=1000, slice_len=3, batch_size=4000)
    write(rb, make_trials([1, 3, 400]))
    first = rb.sample()["id"][:, 0]
    share = torch.stack([(first == 0), (first == 1), (first >= 4)]).float().mean(-1)
    # Four standard deviations of a share of 1/3 in 4,000 draws.
    torch.testing.assert_close(share, torch.full((3,), 1 / 3), atol=0.03, rtol=0)


def test_starts_are_uniform_among_the_windows_that_fit():
    rb = make_buffer(slice_len=3, batch_size=6000)
    write(rb, [make_trial(7)])
    share = rb.sample()["id"][:, 0].bincount(minlength=5).float() / 6000
    assert share.numel() == 5
    torch.testing.assert_close(share, torch.full((5,), 1 / 5), atol=0.021, rtol=0)


@pytest.mark.parametrize(
    ("overhang", "windows"),
    [
        ("none", {(0, 1, 2), (1, 2, 3), (2, 3, 4)}),
        ("left", {(0,), (0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4)}),
        ("right", {(0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4), (4,)}),
        ("both", {(0,), (0, 1), (0, 1, 2), (1, 2, 3), (2, 3, 4), (3, 4), (4,)}),
    ],
)
def test_overhang_cuts_what_sticks_out(overhang, windows):
    rb = make_buffer(slice_len=3, batch_size=500, overhang=overhang)
    write(rb, [make_trial(5)])
    assert {tuple(row) for row in rows(rb.sample())} == windows


def test_overhang_both_visits_every_step_equally_often():
    rb = make_buffer(slice_len=3, batch_size=7000, overhang="both")
    write(rb, [make_trial(5)])
    batch = rb.sample()
    share = batch["id"][batch["collector", "mask"]].bincount().float() / 7000
    torch.testing.assert_close(share, torch.full((5,), 3 / 7), atol=0.025, rtol=0)


@given(
    st.lists(st.integers(1, 9), min_size=1, max_size=20),
    st.integers(9, 25),
    st.lists(st.booleans(), min_size=20, max_size=20),
    st.booleans(),
)
def test_sampled_trials_are_those_that_survive_the_fifo(lengths, capacity, looks, init_key):
    rb = make_buffer(capacity=capacity, slice_len=9, batch_size=50)
    for number, trial in enumerate(make_trials(lengths, init_key=init_key)):
        rb.extend(trial)
        # With init_key, it makes no difference when the sampler reads what was written.
        if looks[number] or not init_key:
            survivors = surviving_trials(lengths[: number + 1], capacity)
            assert rb.sampler.num_trials(rb.storage) == len(survivors)
    survivors = surviving_trials(lengths, capacity)
    assert rb.sampler.num_trials(rb.storage) == len(survivors)
    assert rb.can_sample() == bool(survivors)
    if survivors:
        allowed = {tuple(range(first, first + length)) for first, length in survivors}
        assert {tuple(row) for row in rows(rb.sample())} <= allowed


def test_waiting_for_the_first_complete_trial():
    rb = make_buffer()
    assert not rb.can_sample()
    with pytest.raises(RuntimeError, match=r"at least one complete trial.*Collect until"):
        rb.sample()
    trial = make_trial(5)
    rb.extend(trial[:3])
    assert not rb.can_sample()
    with pytest.raises(RuntimeError, match="of the 3 steps in the buffer none form one"):
        rb.sample()
    rb.extend(trial[3:])
    assert rb.can_sample()
    assert set(rb.sample()["id"].unique().tolist()) == set(range(5))


def test_warns_once_when_no_trial_fills_a_slice():
    rb = make_buffer(slice_len=8, warn_short=True)
    write(rb, make_trials([3, 5]))
    with pytest.warns(UserWarning, match=r"slice_len=8 steps are longer.*of 2 has 5"):
        rb.sample()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rb.sample()


def test_does_not_warn_when_one_trial_fills_a_slice():
    rb = make_buffer(slice_len=5, warn_short=True)
    write(rb, make_trials([3, 5]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rb.sample()


def test_draws_come_from_the_global_generator_or_from_the_given_one():
    rb = make_buffer(batch_size=50)
    write(rb, make_trials([6] * 10))
    torch.manual_seed(5)
    first = rb.sample()["id"]
    torch.manual_seed(5)
    assert torch.equal(rb.sample()["id"], first)
    assert not torch.equal(rb.sample()["id"], first)

    rb.set_rng(torch.Generator().manual_seed(1))
    own = rb.sample()["id"]
    state = torch.get_rng_state()
    rb.set_rng(torch.Generator().manual_seed(1))
    assert torch.equal(rb.sample()["id"], own)
    assert torch.equal(torch.get_rng_state(), state)


def test_writes_that_the_sampler_did_not_see_are_found():
    rb = make_buffer(capacity=12, slice_len=5, batch_size=100)
    write(rb, make_trials([4, 4]))
    rb.sample()
    for trial in make_trials([4, 5], first_id=8):
        rb.writer.extend(trial)  # as another process does: this sampler isn't told
    assert {tuple(row) for row in rows(rb.sample())} == {(8, 9, 10, 11), (12, 13, 14, 15, 16)}
    write(rb, [make_trial(3, first_id=17)])
    assert {tuple(row) for row in rows(rb.sample())} == {
        (8, 9, 10, 11), (12, 13, 14, 15, 16), (17, 18, 19)
    }  # fmt: skip


def test_a_sampler_put_onto_a_filled_storage_finds_its_trials():
    rb = make_buffer(capacity=12)
    write(rb, make_trials([4, 5, 6]))
    rb.set_sampler(TrialSliceSampler(8, warn_short=False))
    assert {tuple(row) for row in rows(rb.sample())} == {tuple(range(4, 9)), tuple(range(9, 15))}


def test_values_changed_in_place_keep_the_trials():
    rb = make_buffer(capacity=12, slice_len=6, batch_size=100)
    write(rb, make_trials([4, 5, 6]))
    before = {tuple(row) for row in rows(rb.sample())}
    rb[:] = rb[:]
    assert {tuple(row) for row in rows(rb.sample())} == before


def test_emptying_the_buffer_forgets_the_trials():
    rb = make_buffer()
    write(rb, make_trials([4, 5]))
    rb.sample()
    rb.empty()
    assert not rb.can_sample()
    write(rb, [make_trial(3, first_id=50)])
    assert {tuple(row) for row in rows(rb.sample())} == {(50, 51, 52)}


def test_state_is_json_and_survives_unread_writes():
    rb = make_buffer(capacity=12, slice_len=6, batch_size=100)
    write(rb, make_trials([4, 5]))
    rb.sample()
    write(rb, make_trials([6], first_id=9))
    state = json.loads(json.dumps(rb.sampler.state_dict()))
    rb.set_sampler(TrialSliceSampler(6, warn_short=False))
    rb.sampler.load_state_dict(state)
    assert {tuple(row) for row in rows(rb.sample())} == {tuple(range(4, 9)), tuple(range(9, 15))}


def test_refuses_what_cannot_work():
    with pytest.raises(ValueError, match=r"slice_len must be at least 1, got 0\. It is"):
        TrialSliceSampler(0)
    with pytest.raises(ValueError, match=r"padding must be one of 'right', 'left', got 'both'"):
        TrialSliceSampler(4, padding="both")
    with pytest.raises(ValueError, match=r"overhang must be one of 'none'.*got 'up'"):
        TrialSliceSampler(4, overhang="up")

    rb = make_buffer(end_key=("next", "finished"))
    write(rb, [make_trial(4)])
    with pytest.raises(KeyError, match=r"last step of each trial.*finished.*Pass end_key"):
        rb.sample()

    rb = make_buffer(capacity=5)
    rb.extend(torch.cat(make_trials([3, 3])))
    with pytest.raises(
        ValueError, match=r"6 steps at once for a capacity of 5.*Raise the capacity"
    ):
        rb.sample()

    rb = TensorDictReplayBuffer(
        storage=LazyTensorStorage(20, ndim=2), sampler=TrialSliceSampler(2), batch_size=2
    )
    rb.extend(torch.stack([make_trial(4), make_trial(4)]))
    with pytest.raises(ValueError, match=r"flat storage.*got ndim=2.*trajs_per_batch=1"):
        rb.sample()


@pytest.mark.parametrize("padding", ["right", "left"])
def test_trim_leaves_out_what_is_padding_in_every_row(padding):
    rb = make_buffer(slice_len=8, batch_size=32, padding=padding, trim=True)
    write(rb, make_trials([3, 2, 3]))
    batch = rb.sample()
    mask = batch["collector", "mask"]
    assert batch.shape == (32, 3)
    assert mask.any(0).all()
    short = ~mask.all(1)
    assert short.any()
    assert (~mask[short]).sum(1).eq(1).all()
    assert mask[short][:, 0 if padding == "right" else -1].all()


def test_trim_never_exceeds_slice_len():
    rb = make_buffer(slice_len=4, batch_size=16, trim=True)
    write(rb, make_trials([9, 2]))
    assert rb.sample().shape == (16, 4)
