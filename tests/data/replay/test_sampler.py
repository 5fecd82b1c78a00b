from __future__ import annotations

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torchrl.data import ListStorage, TensorDictReplayBuffer

from tests.data import trials
from tests.data.trials import make_trial, make_trials, rows, seeded, windows
from torchrl_amago.data import TrialReplayBuffer, TrialSliceSampler, make_trial_buffer

CROPS = ["none", "left", "right", "both"]
KINDS = ["trials", "tensor", "memmap", "stock"]
on_all = pytest.mark.parametrize("kind", KINDS)
with_priorities = pytest.mark.parametrize("kind", KINDS[:3])


def make_buffer(lengths, kind="trials", *, capacity=1000, **options):
    """Whole trials, in our storage or in one of TorchRL's."""
    if kind == "trials":
        return trials.make_buffer(lengths, capacity=capacity, **options)
    options["buffer"] = TensorDictReplayBuffer if kind == "stock" else TrialReplayBuffer
    kind = "memmap" if kind == "memmap" else "tensor"
    return trials.filled(trials.stock_buffer(kind, capacity, **options), lengths)


def trial_of(batch, lengths):
    """Return the trial of each slice."""
    return torch.searchsorted(torch.tensor(lengths).cumsum(0), batch["id"].contiguous(), right=True)


def numbers(rb):
    return torch.from_numpy(rb.sampler.trials(rb.storage).number)


def chi_square(count, chance=None) -> float:
    """Of counts against probabilities, divided by its standard deviation around its mean."""
    count = count.double()
    expected = count.sum() * (1 / count.numel() if chance is None else chance)
    degrees = count.numel() - 1
    statistic = ((count - expected) ** 2 / expected).sum()
    return float((statistic - degrees) / (2 * degrees) ** 0.5)


@on_all
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.integers(1, 9),
    st.sampled_from(CROPS),
    st.sampled_from(["left", "right"]),
    st.sampled_from(["trials", "steps", "priority"]),
    st.booleans(),
)
@example([2, 7], 4, "none", "right", "trials", False)
@example([3], 5, "none", "right", "trials", False)
@example([3], 5, "none", "left", "trials", False)
@example([6], 2, "none", "right", "trials", False)
@example([3, 2, 3], 8, "none", "right", "trials", True)
@example([3, 2, 3], 8, "none", "left", "trials", True)
@example([9, 2], 4, "none", "right", "trials", True)
def test_slices_are_runs_of_one_trial(kind, lengths, slice_length, crop, padding, draw, trim):
    rb = make_buffer(
        lengths, kind, slice_length=slice_length, batch_size=40, crop=crop, padding=padding,
        sample_by=draw, trim_padding=trim, capacity=200,
    )  # fmt: skip
    batch = rb.sample()
    mask = batch["collector", "mask"]
    width = int(mask.sum(1).max()) if trim else slice_length
    assert batch.shape == mask.shape == (40, width)
    assert mask.dtype == torch.bool
    trial_BT = trial_of(batch, lengths)
    assert (trial_BT == trial_BT[:, :1]).all()
    if kind == "trials":
        assert torch.equal(batch["index"], trial_BT)
    masks, padded = [], []
    for trial, ids in zip(trial_BT[:, 0].tolist(), rows(batch), strict=True):
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        if crop == "none" or lengths[trial] <= slice_length:
            assert len(ids) == min(slice_length, lengths[trial])
        extra = width - len(ids)
        real, unreal = [True] * len(ids), [False] * extra
        masks.append(real + unreal if padding == "right" else unreal + real)
        # Padding repeats the nearest real step.
        padded.append(ids + extra * ids[-1:] if padding == "right" else extra * ids[:1] + ids)
    assert mask.tolist() == masks
    # Every entry is the step's own, in root and next.
    for key, value in torch.cat(make_trials(lengths))[torch.tensor(padded)].items(True, True):
        assert torch.equal(batch[key], value), key


@on_all
def test_trials_are_equally_likely_whatever_their_length(kind):
    batch = make_buffer([1, 3, 400], kind, slice_length=3, batch_size=4000).sample()
    assert chi_square(trial_of(batch, [1, 3, 400])[:, 0].bincount(minlength=3)) < 4


@on_all
@pytest.mark.parametrize("crop", CROPS)
def test_starts_are_uniform_among_the_windows(crop, kind):
    rb = make_buffer([7], kind, slice_length=3, batch_size=6000, crop=crop)
    drawn = [(ids[0], len(ids)) for ids in rows(rb.sample())]
    expected = {(first, 3) for first in range(5)}
    if crop in ("left", "both"):
        expected |= {(0, 1), (0, 2)}
    if crop in ("right", "both"):
        expected |= {(5, 2), (6, 1)}
    assert set(drawn) == expected
    assert chi_square(torch.tensor([drawn.count(window) for window in expected])) < 4


@on_all
@pytest.mark.parametrize("draw", ["trials", "steps"])
@given(st.lists(st.integers(1, 30), min_size=2, max_size=8), st.integers(1, 6), st.integers(0, 99))
def test_cropped_on_both_sides_all_steps_are_equally_likely(kind, draw, lengths, size, seed):
    """All of a trial, and if draws are weighted by steps, all that are stored."""
    draws = dict(batch_size=6000, crop="both", sample_by=draw, generator=seeded(seed))
    batch = make_buffer(lengths, kind, slice_length=size, **draws).sample()
    count = batch["id"][batch["collector", "mask"]].bincount(minlength=sum(lengths))
    assert (count > 0).all()
    for equal in [count] if draw == "steps" else count.split(lengths):
        if len(equal) > 1:
            # Steps of one slice come together: their counts vary less than independent ones.
            assert chi_square(equal) < 6 * size


@on_all
@pytest.mark.parametrize("crop", CROPS)
def test_step_weighted_trials_have_their_fraction_of_the_steps(crop, kind):
    lengths = [2, 5, 9, 40]
    draws = dict(batch_size=20000, sample_by="steps", crop=crop)
    batch = make_buffer(lengths, kind, slice_length=5, **draws).sample()
    count = trial_of(batch, lengths)[batch["collector", "mask"]].bincount().double()
    fraction = torch.tensor(lengths).double() / sum(lengths)
    torch.testing.assert_close(count / count.sum(), fraction, rtol=0.06, atol=0)


PRIORITY = dict(sample_by="priority", alpha=1.0)


@with_priorities
def test_priorities_say_how_often_and_the_weights_make_up_for_it(kind):
    rb = make_buffer([3, 5, 4], kind, slice_length=3, batch_size=8000, beta=1.0, **PRIORITY)
    rb.update_priority(numbers(rb), torch.tensor([1.0, 2.0, 5.0]))
    batch = rb.sample()
    number, weight = trial_of(batch, [3, 5, 4])[:, 0], batch["priority_weight"][:, 0]
    assert chi_square(number.bincount(), torch.tensor([1, 2, 5]) / 8) < 4
    torch.testing.assert_close(weight, torch.tensor([1.0, 0.5, 0.2])[number])


@with_priorities
def test_a_new_trial_has_the_largest_priority(kind):
    rb = make_buffer([3, 3], kind, slice_length=3, batch_size=4000, **PRIORITY)
    rb.update_priority(numbers(rb), torch.tensor([0.0, 6.0]))
    rb.extend(make_trial(3, 6))
    count = trial_of(rb.sample(), [3, 3, 3])[:, 0].bincount(minlength=3)
    assert count[0] <= 2  # an error of 0 leaves next to nothing
    assert chi_square(count[1:]) < 4


@with_priorities
def test_a_batch_brings_its_errors(kind):
    rb = make_buffer([2, 5, 4], kind, batch_size=500, **PRIORITY)
    batch = rb.sample()
    error = torch.where(batch["collector", "mask"], batch["id"], 1000).unsqueeze(-1)
    batch["td_error"] = -error.float()
    rb.update_priority(batch)
    weight = rb.sampler.state_dict()["weights"]
    # 0.9 of the largest error and 0.1 of the mean; of several slices the larger.
    expected = [0.9 * 1 + 0.1 * 0.5, 0.9 * 6 + 0.1 * 4.5, 0.9 * 10 + 0.1 * 8.5]
    torch.testing.assert_close(torch.tensor(weight), torch.tensor(expected))


@on_all
def test_waiting_for_enough_trials(kind):
    rb = make_buffer([], kind, min_trials=2)
    for count in range(2):
        assert len(numbers(rb)) == count
        assert not rb.can_sample()
        with pytest.raises(RuntimeError, match=f"at least 2 trials.*has {count}.*Collect until"):
            rb.sample()
        rb.extend(make_trial(5))
    assert len(numbers(rb)) == 2
    assert rb.can_sample()


@pytest.mark.parametrize("slice_length", [8, 5])
def test_warns_once_if_no_trial_fills_a_slice(slice_length):
    rb = make_trial_buffer(100, slice_length, 8)
    rb.extend(torch.cat(make_trials([3, 5])))
    if slice_length == 8:
        with pytest.warns(UserWarning, match=r"slice_length=8 steps are longer.*of 2 has 5"):
            rb.sample()
    rb.sample()  # any warning is an error here


@on_all
def test_draws_come_from_the_global_generator_or_from_the_given_one(kind):
    rb = make_buffer([6] * 10, kind, batch_size=50)
    torch.manual_seed(5)
    first = rb.sample()["id"]
    torch.manual_seed(5)
    assert torch.equal(rb.sample()["id"], first)
    assert not torch.equal(rb.sample()["id"], first)

    rb.set_rng(seeded(1))
    own = rb.sample()["id"]
    state = torch.get_rng_state()
    rb.set_rng(seeded(1))
    assert torch.equal(rb.sample()["id"], own)
    assert torch.equal(torch.get_rng_state(), state)


def test_another_sampler_finds_the_same_trials():
    rb = make_buffer([4, 5, 6], capacity=12)
    rb.set_sampler(TrialSliceSampler(8, warn_short=False))
    assert windows(rb.sample()) == {tuple(range(4, 9)), tuple(range(9, 15))}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"slice_length": 0}, r"slice_length must be at least 1, got 0\. It is"),
        ({"min_trials": 0}, r"min_trials must be at least 1, got 0"),
        ({"padding": "both"}, r"padding must be one of 'right', 'left', got 'both'"),
        ({"crop": "up"}, r"crop must be one of 'none'.*got 'up'"),
        ({"sample_by": "step"}, r"sample_by must be one of 'trials'.*got 'step'"),
        ({"sample_by": "priority", "alpha": -1.0}, r"must be in \[0, 1\], got"),
        ({"sample_by": "priority", "beta": float("nan")}, r"must be in \[0, 1\], got"),
        ({"sample_by": "priority", "alpha": 2.0}, r"must be in \[0, 1\], got"),
    ],
)
def test_impossible_arguments_raise(options, message):
    with pytest.raises(ValueError, match=message):
        TrialSliceSampler(**{"slice_length": 4} | options)


def test_other_buffers_have_no_priorities_or_no_trials():
    with pytest.raises(ValueError, match="sample_by must be one of 'priority', got 'trials'"):
        make_buffer([5]).update_priority(torch.tensor([0]), torch.tensor([1.0]))
    rb = TensorDictReplayBuffer(storage=ListStorage(10), sampler=TrialSliceSampler(4), batch_size=2)
    with pytest.raises(TypeError, match="LazyMemmapStorage.*ndim=1.*got ListStorage"):
        rb.can_sample()
