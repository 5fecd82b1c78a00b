from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrl.data import LazyMemmapStorage, LazyTensorStorage, ListStorage, TensorDictReplayBuffer

from tests.data.trials import make_trial, make_trials, rows
from torchrl_amago.data import TrialReplayBuffer, TrialSliceSampler, make_trial_buffer

CROPS = ["none", "left", "right", "both"]


KINDS = ["trials", "tensor", "memmap", "stock"]
on_all = pytest.mark.parametrize("kind", KINDS)


def make_buffer(
    lengths,
    capacity: int = 1000,
    slice_length: int = 4,
    batch_size: int = 8,
    kind="trials",
    **kwargs,
):
    """Whole trials, in our storage or in one of TorchRL's."""
    if kind == "trials":
        rb = make_trial_buffer(capacity, slice_length, batch_size, warn_short=False, **kwargs)
    else:
        generator = kwargs.pop("generator", None)
        storage = (LazyMemmapStorage if kind == "memmap" else LazyTensorStorage)(capacity)
        sampler = TrialSliceSampler(slice_length, warn_short=False, **kwargs)
        rb = (TensorDictReplayBuffer if kind == "stock" else TrialReplayBuffer)(
            storage=storage, sampler=sampler, batch_size=batch_size, generator=generator
        )
    for trial in make_trials(lengths):
        rb.extend(trial)
    return rb


def trial_of(batch, lengths):
    """Return the trial of each slice."""
    stop = torch.tensor(lengths).cumsum(0)
    return torch.searchsorted(stop, batch["id"].contiguous(), right=True)


def numbers(rb):
    return torch.from_numpy(rb.sampler.trials(rb.storage).number)


def windows(batch) -> set[tuple[int, ...]]:
    return {tuple(row) for row in rows(batch)}


def chi_square(count, chance) -> float:
    """Of counts against probabilities, divided by its standard deviation around its mean."""
    expected = count.sum() * chance
    degrees = count.numel() - 1
    statistic = ((count - expected) ** 2 / expected).sum()
    return float((statistic - degrees) / (2 * degrees) ** 0.5)


@on_all
def test_short_trials_are_whole_and_slices_of_long_ones_fit(kind):
    rb = make_buffer([2, 7], batch_size=200, kind=kind)
    batch = rb.sample()
    assert batch.shape == (200, 4)
    assert windows(batch) == {(0, 1), (2, 3, 4, 5), (3, 4, 5, 6), (4, 5, 6, 7), (5, 6, 7, 8)}


@on_all
@given(
    st.lists(st.integers(1, 12), min_size=1, max_size=12),
    st.integers(1, 9),
    st.sampled_from(CROPS),
    st.sampled_from(["left", "right"]),
    st.sampled_from(["trials", "steps", "priority"]),
    st.booleans(),
)
def test_slices_are_runs_of_steps_of_one_trial(
    kind, lengths, slice_length, crop, padding, draw, trim
):
    rb = make_buffer(
        lengths, slice_length=slice_length, batch_size=40, crop=crop, padding=padding,
        sample_by=draw, trim_padding=trim, capacity=200, kind=kind,
    )  # fmt: skip
    batch = rb.sample()
    mask = batch["collector", "mask"]
    width = int(mask.sum(1).max()) if trim else slice_length
    assert batch.shape == mask.shape == (40, width)
    trial_of, length_of = [], []
    for number, length in enumerate(lengths):
        trial_of += [number] * length
        length_of += [length] * length
    for row, ids in enumerate(rows(batch)):
        assert ids == list(range(ids[0], ids[0] + len(ids)))
        assert trial_of[ids[0]] == trial_of[ids[-1]]
        if kind == "trials":
            assert trial_of[ids[0]] == batch["index"][row, 0]
        if crop == "none" or length_of[ids[0]] <= slice_length:
            assert len(ids) == min(slice_length, length_of[ids[0]])
        real = mask[row].nonzero().squeeze(-1)
        assert real.tolist() == list(range(int(real[0]), int(real[-1]) + 1))
        assert int(real[0]) == (0 if padding == "right" else width - len(ids))
    # Every entry is the step's own, in root and next.
    all_ids = [step for ids in rows(batch) for step in ids]
    expected, found = torch.cat(make_trials(lengths))[all_ids], batch[mask]
    for key, value in expected.items(True, True):
        assert torch.equal(found[key], value), key
    # Padding repeats a state: nothing that isn't stored.
    assert batch["observation"].isfinite().all()
    assert set(batch["id"].unique().tolist()) <= set(range(sum(lengths)))


@on_all
def test_padding_repeats_the_nearest_real_step(kind):
    for padding, step, mask in [
        ("right", [0, 1, 2, 2, 2], [True, True, True, False, False]),
        ("left", [0, 0, 0, 1, 2], [False, False, True, True, True]),
    ]:
        batch = make_buffer([3], slice_length=5, batch_size=1, padding=padding, kind=kind).sample()
        assert batch["nested", "state"][0, :, 0].tolist() == step
        assert batch["next", "nested", "state"][0, :, 0].tolist() == [n + 1 for n in step]
        assert batch["collector", "mask"].tolist() == [mask]


@on_all
def test_mask_is_there_when_nothing_is_padded(kind):
    mask = make_buffer([6], slice_length=2, kind=kind).sample()["collector", "mask"]
    assert mask.dtype == torch.bool
    assert mask.shape == (8, 2)
    assert mask.all()


@on_all
def test_trials_are_equally_likely_whatever_their_length(kind):
    rb = make_buffer([1, 3, 400], slice_length=3, batch_size=4000, kind=kind)
    count = trial_of(rb.sample(), [1, 3, 400])[:, 0].bincount(minlength=3).double()
    assert chi_square(count, torch.full((3,), 1 / 3)) < 4


@on_all
@pytest.mark.parametrize("crop", CROPS)
def test_starts_are_uniform_among_the_windows(crop, kind):
    rb = make_buffer([7], slice_length=3, batch_size=6000, crop=crop, kind=kind)
    drawn = [(ids[0], len(ids)) for ids in rows(rb.sample())]
    expected = {
        "none": {(first, 3) for first in range(5)},
        "left": {(0, 1), (0, 2)} | {(first, 3) for first in range(5)},
        "right": {(5, 2), (6, 1)} | {(first, 3) for first in range(5)},
        "both": {(0, 1), (0, 2), (5, 2), (6, 1)} | {(first, 3) for first in range(5)},
    }[crop]
    assert set(drawn) == expected
    count = torch.tensor([drawn.count(window) for window in sorted(expected)]).double()
    assert chi_square(count, torch.full(count.shape, 1 / len(expected))) < 4


@on_all
@given(st.lists(st.integers(1, 15), min_size=2, max_size=8), st.integers(1, 6), st.integers(0, 99))
def test_cropped_on_both_sides_all_steps_of_a_trial_are_equally_likely(kind, lengths, size, seed):
    rb = make_buffer(
        lengths, slice_length=size, batch_size=3000, crop="both",
        generator=torch.Generator().manual_seed(seed), kind=kind,
    )  # fmt: skip
    batch = rb.sample()
    ids, number = batch["id"], trial_of(batch, lengths)
    first = 0
    for trial, length in enumerate(lengths):
        here = (number == trial) & batch["collector", "mask"]
        count = (ids[here] - first).bincount(minlength=length).double()
        assert count.numel() == length
        assert (count > 0).all()
        if length > 1:
            # Steps of one slice come together: their counts vary less than independent ones.
            assert chi_square(count, torch.full((length,), 1 / length)) < 6 * size
        first += length


@on_all
@given(st.lists(st.integers(1, 30), min_size=2, max_size=8), st.integers(1, 6), st.integers(0, 99))
def test_step_weighted_and_on_both_sides_all_stored_steps_are_equally_likely(
    kind, lengths, size, seed
):
    rb = make_buffer(
        lengths, slice_length=size, batch_size=6000, crop="both", sample_by="steps",
        generator=torch.Generator().manual_seed(seed), kind=kind,
    )  # fmt: skip
    batch = rb.sample()
    count = batch["id"][batch["collector", "mask"]].bincount(minlength=sum(lengths)).double()
    assert count.numel() == sum(lengths)
    assert chi_square(count, torch.full(count.shape, 1 / sum(lengths))) < 6 * size


@on_all
@pytest.mark.parametrize("crop", CROPS)
def test_step_weighted_trials_have_their_fraction_of_the_steps(crop, kind):
    lengths = [2, 5, 9, 40]
    rb = make_buffer(
        lengths, slice_length=5, batch_size=20000, sample_by="steps", crop=crop, kind=kind
    )
    batch = rb.sample()
    count = trial_of(batch, lengths)[batch["collector", "mask"]].bincount().double()
    fraction = torch.tensor(lengths).double() / sum(lengths)
    torch.testing.assert_close(count / count.sum(), fraction, rtol=0.06, atol=0)


@pytest.mark.parametrize("kind", KINDS[:3])
def test_priorities_say_how_often_and_the_weights_make_up_for_it(kind):
    rb = make_buffer(
        [3, 5, 4],
        slice_length=3,
        batch_size=8000,
        sample_by="priority",
        alpha=1.0,
        beta=1.0,
        kind=kind,
    )
    rb.update_priority(numbers(rb), torch.tensor([1.0, 2.0, 5.0]))
    batch = rb.sample()
    number, weight = trial_of(batch, [3, 5, 4])[:, 0], batch["priority_weight"][:, 0]
    assert chi_square(number.bincount().double(), torch.tensor([1, 2, 5]) / 8) < 4
    torch.testing.assert_close(weight, torch.tensor([1.0, 0.5, 0.2])[number])


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_new_trial_has_the_largest_priority(kind):
    rb = make_buffer(
        [3, 3], slice_length=3, batch_size=4000, sample_by="priority", alpha=1.0, kind=kind
    )
    rb.update_priority(numbers(rb), torch.tensor([0.0, 6.0]))
    rb.extend(make_trial(3, 6))
    count = trial_of(rb.sample(), [3, 3, 3])[:, 0].bincount(minlength=3).double()
    assert count[0] <= 2  # an error of 0 leaves next to nothing
    assert chi_square(count[1:], torch.tensor([0.5, 0.5])) < 4


@pytest.mark.parametrize("kind", KINDS[:3])
def test_a_batch_brings_its_errors(kind):
    rb = make_buffer(
        [2, 5, 4], slice_length=4, batch_size=500, sample_by="priority", alpha=1.0, kind=kind
    )
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
    rb = make_buffer([], min_trials=2, kind=kind)
    for count in range(3):
        assert len(numbers(rb)) == count
        assert rb.can_sample() == (count == 2)
        if count < 2:
            with pytest.raises(
                RuntimeError, match=f"at least 2 trials.*has {count}.*Collect until"
            ):
                rb.sample()
        rb.extend(make_trial(5))


def test_warns_once_when_no_trial_fills_a_slice():
    rb = make_trial_buffer(100, 8, 8)
    rb.extend(torch.cat(make_trials([3, 5])))
    with pytest.warns(UserWarning, match=r"slice_length=8 steps are longer.*of 2 has 5"):
        rb.sample()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rb.sample()


def test_does_not_warn_when_one_trial_fills_a_slice():
    rb = make_trial_buffer(100, 5, 8)
    rb.extend(torch.cat(make_trials([3, 5])))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rb.sample()


@on_all
def test_draws_come_from_the_global_generator_or_from_the_given_one(kind):
    rb = make_buffer([6] * 10, batch_size=50, kind=kind)
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


def test_another_sampler_finds_the_same_trials():
    rb = make_buffer([4, 5, 6], capacity=12)
    rb.set_sampler(TrialSliceSampler(8, warn_short=False))
    assert windows(rb.sample()) == {tuple(range(4, 9)), tuple(range(9, 15))}


@on_all
@pytest.mark.parametrize("padding", ["right", "left"])
def test_trimmed_padding_leaves_out_what_is_padding_in_every_row(padding, kind):
    batch = make_buffer(
        [3, 2, 3], slice_length=8, batch_size=32, padding=padding, trim_padding=True, kind=kind
    ).sample()
    mask = batch["collector", "mask"]
    assert batch.shape == (32, 3)
    assert mask.any(0).all()
    short = ~mask.all(1)
    assert short.any()
    assert (~mask[short]).sum(1).eq(1).all()
    assert mask[short][:, 0 if padding == "right" else -1].all()


def test_trimmed_padding_never_exceeds_slice_len():
    assert make_buffer([9, 2], slice_length=4, batch_size=16, trim_padding=True).sample().shape == (
        16,
        4,
    )


def test_impossible_arguments_raise():
    with pytest.raises(ValueError, match=r"slice_length must be at least 1, got 0\. It is"):
        TrialSliceSampler(0)
    with pytest.raises(ValueError, match=r"min_trials must be at least 1, got 0"):
        TrialSliceSampler(3, min_trials=0)
    with pytest.raises(ValueError, match=r"padding must be one of 'right', 'left', got 'both'"):
        TrialSliceSampler(4, padding="both")
    with pytest.raises(ValueError, match=r"crop must be one of 'none'.*got 'up'"):
        TrialSliceSampler(4, crop="up")
    with pytest.raises(ValueError, match=r"sample_by must be one of 'trials'.*got 'step'"):
        TrialSliceSampler(4, sample_by="step")
    rb = make_buffer([5])
    with pytest.raises(ValueError, match="sample_by must be one of 'priority', got 'trials'"):
        rb.update_priority(torch.tensor([0]), torch.tensor([1.0]))
    rb = TensorDictReplayBuffer(storage=ListStorage(10), sampler=TrialSliceSampler(4), batch_size=2)
    with pytest.raises(TypeError, match="LazyMemmapStorage.*ndim=1.*got ListStorage"):
        rb.can_sample()


@pytest.mark.parametrize("options", [{"alpha": -1.0}, {"beta": float("nan")}, {"alpha": 2.0}])
def test_exponents_out_of_range(options):
    with pytest.raises(ValueError, match=r"must be in \[0, 1\], got"):
        TrialSliceSampler(4, sample_by="priority", **options)
