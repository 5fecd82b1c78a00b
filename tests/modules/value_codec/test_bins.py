"""Two-hot and HL-Gauss: round trips, labels, cross-entropy, what lies outside, what is masked."""

from __future__ import annotations

import copy
import io
import math
import pickle
import shutil
import warnings
from statistics import NormalDist

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torch.nn.functional import cross_entropy
from torchrl.modules import functional as F

from torchrl_amago.modules import HLGauss, PopArt, TwoHot
from torchrl_amago.modules.value_codec import BinCodec

CODECS = {"two_hot": TwoHot, "hl_gauss": HLGauss}
every_codec = pytest.mark.parametrize("cls", CODECS.values(), ids=CODECS)

B, T, C, G, A, N = 2, 3, 4, 3, 5, 16


def with_bins(cls: type[BinCodec], num_bins: int, low: float, high: float, **options) -> BinCodec:
    return cls(1, num_bins=num_bins, min_return=low, max_return=high, **options)


def make(cls: type[BinCodec], **options) -> BinCodec:
    return cls(G, **{"num_bins": N, "min_return": -40.0, "max_return": 90.0, **options})


def everything(*shape: int) -> torch.Tensor:
    return torch.ones(*shape, 1, dtype=torch.bool)


def targets_inside(codec: BinCodec, seed: int, count: int) -> torch.Tensor:
    """Values between the ends, spread over the bins."""
    generator = torch.Generator().manual_seed(seed)
    fraction = torch.rand(count, generator=generator, dtype=codec.bins.dtype)
    value = codec.bins[0] + fraction * (codec.bins[-1] - codec.bins[0])
    return F.symexp(value) if codec.symlog else value


# --- labels and their mean ---


@given(
    seed=st.integers(0, 2**31),
    num_bins=st.integers(2, 256),
    low=st.floats(-1e6, 1e3),
    span=st.floats(1e-2, 1e3),
    symlog=st.booleans(),
)
def test_two_hot_labels_decode_to_the_target(seed, num_bins, low, span, symlog):
    high = low + span * (1 + abs(low))
    codec = with_bins(TwoHot, num_bins, low, high, symlog=symlog)
    target = targets_inside(codec, seed, 20).unsqueeze(-1)
    label = codec.encode(target)
    assert label.shape == (20, 1, num_bins)
    assert (label >= 0).all()
    assert (label > 0).sum(-1).le(2).all()
    torch.testing.assert_close(label.sum(-1), torch.ones(20, 1))
    # Equally spaced bins are as exact as the range's ends are.
    scale = 1 + target.abs() if symlog else 1 + max(abs(low), abs(high))
    assert ((codec.decode(label.log()) - target).abs() <= 1e-4 * scale).all()


@given(
    seed=st.integers(0, 2**31),
    num_bins=st.integers(32, 256),
    reach=st.floats(1.0, 1e6),
    symlog=st.booleans(),
    sigma=st.floats(0.3, 2.0),
)
def test_hl_gauss_labels_decode_to_nearly_the_target(seed, num_bins, reach, symlog, sigma):
    """Within the documented fraction of a bin; nearer to the ends than 5 sigma, inwards at most."""
    codec = with_bins(HLGauss, num_bins, -reach, reach, symlog=symlog, sigma=sigma).double()
    target = targets_inside(codec, seed, 20).unsqueeze(-1)
    label = codec.encode(target)
    assert (label >= 0).all()
    torch.testing.assert_close(label.sum(-1), torch.ones_like(target))
    decoded = codec.decode(label.log())
    if symlog:
        target, decoded = F.symlog(target), F.symlog(decoded)
    shift = (decoded - target) / codec.bin_width
    bound = 1.1 * math.exp(-2 * (math.pi * sigma) ** 2) / math.pi + 1e-4
    from_end = (codec.bins[-1] - target.abs()) / codec.bin_width
    assert (shift.abs() <= bound)[from_end > 5 * sigma].all()
    inwards = -shift * target.sign()
    assert (inwards >= -bound).all()
    assert (inwards <= 0.8 * sigma + bound).all()


def test_the_bound_of_hl_gauss_is_sharp():
    """A quarter of a bin beside a bin, where the label's mean is off most."""
    codec = with_bins(HLGauss, 41, -20.0, 20.0, symlog=False, sigma=0.5).double()
    target = torch.tensor([0.25], dtype=torch.float64)
    shift = (codec.decode(codec.encode(target).log()) - target).abs().item()
    assert shift == pytest.approx(math.exp(-2 * (math.pi * 0.5) ** 2) / math.pi, rel=1e-3)


def test_two_hot_label_by_hand():
    codec = with_bins(TwoHot, 5, -2.0, 2.0, symlog=False)
    label = codec.encode(torch.tensor([-2.0, -1.75, 0.0, 1.9, 2.0]))
    expected = [[1, 0, 0, 0, 0], [0.75, 0.25, 0, 0, 0], [0, 0, 1, 0, 0]]
    expected += [[0, 0, 0, 0.1, 0.9], [0, 0, 0, 0, 1]]
    torch.testing.assert_close(label, torch.tensor(expected, dtype=torch.float32))


def test_hl_gauss_label_equals_the_normal_cdf_over_the_edges():
    codec = with_bins(HLGauss, 9, -4.0, 4.0, symlog=False, sigma=1.5)
    for target in (-4.0, -1.3, 0.0, 3.9):
        cdf = NormalDist(target, 1.5).cdf
        mass = torch.tensor([cdf(n + 0.5) - cdf(n - 0.5) for n in range(-4, 5)])
        torch.testing.assert_close(
            codec.encode(torch.tensor([target]))[0], mass / mass.sum(), rtol=1e-5, atol=1e-6
        )


def test_the_mean_is_taken_in_symlog_space():
    codec = with_bins(TwoHot, 3, -(math.e**2 - 1), math.e**2 - 1)  # bins at symlog -2, 0, 2
    half_way = torch.tensor([[float("-inf"), 0.0, 0.0]])
    torch.testing.assert_close(codec.decode(half_way), torch.tensor([math.e - 1]))


@every_codec
def test_targets_outside_get_the_label_of_the_end(cls):
    codec = make(cls)
    low, high = codec.encode(torch.tensor([-40.0, 90.0]))
    outside = codec.encode(torch.tensor([-40.5, -1e30, -math.inf, 90.5, 1e30, math.inf]))
    torch.testing.assert_close(outside[:3], low.expand(3, -1))
    torch.testing.assert_close(outside[3:], high.expand(3, -1))
    prediction = torch.randn(6, C, 1, N)
    loss = codec.loss(prediction, torch.tensor([[-40.5], [-math.inf], [91], [1e30], [-40], [90]]))
    ends = codec.loss(prediction, torch.tensor([[-40.0], [-40], [90], [90], [-40], [90]]))
    torch.testing.assert_close(loss, ends)


@every_codec
def test_decode_reads_the_last_dimension_only(cls):
    codec = make(cls)
    prediction = torch.randn(B, T, C, G, A, N)
    value = codec.decode(prediction)
    assert value.shape == (B, T, C, G, A)
    torch.testing.assert_close(value[1, 2, 3, 0, 4], codec.decode(prediction[1, 2, 3, 0, 4]))
    assert codec.event_shape == (N,)


# --- loss ---


@every_codec
def test_loss_equals_dense_cross_entropy(cls):
    codec = make(cls).double()
    target = targets_inside(codec, 0, B * T * G).view(B, T, G)
    target[0, 0] = torch.tensor([-50.0, 0.0, 1e6])
    prediction = torch.randn(B, T, C, G, N, dtype=torch.float64, requires_grad=True)
    loss = codec.loss(prediction, target)
    assert loss.shape == (B, T, C, G)
    label = codec.encode(target).unsqueeze(-3).expand_as(prediction)
    dense = cross_entropy(prediction.flatten(0, -2), label.flatten(0, -2), reduction="none")
    torch.testing.assert_close(loss.flatten(), dense, rtol=1e-12, atol=1e-12)
    (grad,) = torch.autograd.grad(loss.sum(), prediction)
    torch.testing.assert_close(grad, prediction.softmax(-1) - label, rtol=1e-12, atol=1e-12)


@every_codec
def test_loss_is_least_where_the_prediction_is_the_label(cls):
    codec = make(cls).double()
    target = targets_inside(codec, 3, G)
    label = codec.encode(target)
    entropy = torch.special.entr(label).sum(-1)
    best = codec.loss((label + 1e-300).log().unsqueeze(0), target)
    torch.testing.assert_close(best, entropy.unsqueeze(0))
    worse = codec.loss((label + 0.01).log().unsqueeze(0), target)
    assert (worse > best + 1e-3).all()


@every_codec
def test_gradients(cls):
    codec = make(cls, num_bins=5).double()
    target = targets_inside(codec, 1, G).requires_grad_()
    prediction = torch.randn(2, G, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda p: codec.loss(p, target), prediction)
    assert torch.autograd.gradcheck(codec.decode, prediction)
    assert torch.autograd.gradcheck(codec.normalized, prediction)
    codec.loss(prediction, target).sum().backward()
    assert target.grad is None


@every_codec
def test_a_nan_stays_where_it_is(cls):
    codec = make(cls)
    prediction = torch.randn(B, T, C, G, N, requires_grad=True)
    target = targets_inside(codec, 0, B * T * G).view(B, T, G)
    poisoned = target.clone()
    poisoned[1, 2, 0] = math.nan
    clean_loss, loss = codec.loss(prediction, target), codec.loss(prediction, poisoned)
    harmed = torch.zeros_like(loss, dtype=torch.bool)
    harmed[1, 2, :, 0] = True
    assert loss[harmed].isnan().all()
    assert torch.equal(loss[~harmed], clean_loss[~harmed])
    (grad,) = torch.autograd.grad(loss[~harmed].sum(), prediction)
    (clean_grad,) = torch.autograd.grad(clean_loss[~harmed].sum(), prediction)
    torch.testing.assert_close(grad[~harmed], clean_grad[~harmed])
    label = codec.encode(poisoned)
    assert torch.equal(label.isnan().any(-1), poisoned.isnan())


@every_codec
def test_half_precision_is_computed_in_single(cls):
    codec = make(cls)
    prediction = torch.randn(B, C, G, N).bfloat16()
    target = torch.tensor([0.1, 77.7, -3.3]).expand(B, G)
    for x in (prediction, prediction.float()):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            value, loss = codec.decode(x), codec.loss(x, target)
        assert value.dtype == loss.dtype == torch.float32
        torch.testing.assert_close(value, codec.decode(prediction.float()))
        torch.testing.assert_close(loss, codec.loss(prediction.float(), target))
    half = target.bfloat16()
    torch.testing.assert_close(codec.encode(half), codec.encode(half.float()))


# --- statistics ---


@every_codec
def test_normalized_follows_the_targets_scale(cls):
    codec = make(cls, popart=PopArt(G, beta=0.5))
    target = torch.tensor([[[3.0, 0.0, -2.0], [5.0, 1.0, 20.0]]])
    codec.update(target, everything(1, 2))
    alone = PopArt(G, beta=0.5)
    alone.update(target, everything(1, 2))
    prediction = torch.randn(B, C, G, N)
    expected = (codec.decode(prediction) - alone.mu) / alone.sigma
    torch.testing.assert_close(codec.normalized(prediction), expected)
    assert not torch.allclose(alone.mu, torch.zeros(G))
    before = codec.decode(prediction)
    codec.update(10 * target, everything(1, 2))
    assert torch.equal(codec.decode(prediction), before)


@every_codec
def test_padding_has_no_effect_and_an_all_masked_batch_moves_nothing(cls):
    clean, poisoned = make(cls), make(cls)
    target = targets_inside(clean, 0, B * T * G).view(B, T, G)
    mask = torch.tensor([[True, True, False], [True, False, False]]).unsqueeze(-1)
    clean.update(torch.where(mask, target, 0.0), mask)
    garbage = torch.tensor([math.nan, math.inf, -1e30])
    poisoned.update(torch.where(mask, target, garbage), mask)
    for name, buffer in clean.named_buffers():
        assert torch.equal(buffer, poisoned.get_buffer(name)), name
    state = {name: buffer.clone() for name, buffer in clean.named_buffers()}
    clean.update(garbage.expand(B, T, G), torch.zeros(B, T, 1, dtype=torch.bool))
    for name, buffer in clean.named_buffers():
        assert torch.equal(buffer, state[name]), name


@every_codec
def test_targets_outside_are_counted_and_warned_of_once(cls):
    codec = make(cls)
    target = torch.tensor([[[-41.0, 5.0, 91.0], [math.inf, math.nan, -1e9], [1e3, 1e3, 1e3]]])
    mask = torch.tensor([[[True], [True], [False]]])
    with pytest.warns(
        UserWarning, match=r"4 TD targets so far lie outside of \[-40, 90\].*Widen"
    ) as caught:
        codec.update(target, mask)
    assert [warning.filename for warning in caught] == [__file__]
    assert codec.num_outside == 4
    for _ in range(2 * codec.UPDATES_PER_CHECK):  # would raise if it warned again
        codec.update(target, mask)
    assert codec.num_outside == 4 * (2 * codec.UPDATES_PER_CHECK + 1)


def test_a_late_target_outside_warns_at_the_next_check(monkeypatch):
    monkeypatch.setattr(TwoHot, "UPDATES_PER_CHECK", 3)
    codec = make(TwoHot)
    codec.update(torch.zeros(1, G), everything(1))
    for _ in range(2):
        codec.update(torch.full((1, G), 1e3), everything(1))
    with pytest.warns(UserWarning, match="9 TD targets"):
        codec.update(torch.full((1, G), 1e3), everything(1))


@every_codec
@pytest.mark.parametrize("symlog", [True, False])
def test_the_range_includes_its_ends(cls, symlog):
    for low, high in ((-100_000.0, 100_000.0), (-0.3, 7.7), (-1e-3, 123_456.0)):
        codec = make(cls, min_return=low, max_return=high, symlog=symlog)
        ends = torch.tensor([low, high, 0.0])
        codec.update(torch.stack([ends, ends.double().float()]), everything(2))
        codec.double().update(torch.tensor([[low, high, 0.0]]).double(), everything(1))
        assert codec.num_outside == 0


def test_popart_statistics_can_be_switched_off():
    codec = make(TwoHot, popart=PopArt(G, enabled=False))
    codec.update(torch.full((1, G), 50.0), everything(1))
    prediction = torch.randn(C, G, N)
    assert torch.equal(codec.normalized(prediction), codec.decode(prediction))


# --- a range in units of the targets ---


@every_codec
@given(
    seed=st.integers(0, 2**31),
    scale=st.floats(1e-2, 1e4),
    offset=st.floats(-5, 5),
    symlog=st.booleans(),
)
def test_a_relative_range_fits_rewards_of_any_size(cls, seed, scale, offset, symlog):
    target = torch.randn(7, G, generator=torch.Generator().manual_seed(seed)) + offset
    prediction = torch.randn(7, C, G, N, generator=torch.Generator().manual_seed(seed + 1))
    options = dict(min_return=-5.0, max_return=5.0, relative=True, symlog=symlog)
    codec, scaled = make(cls, **options), make(cls, **options)
    codec.update(target, everything(7))
    scaled.update(scale * target, everything(7))
    assert codec.num_outside == scaled.num_outside == 0
    close = dict(rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(
        scaled.loss(prediction, scale * target), codec.loss(prediction, target), **close
    )
    expected = scale * codec.decode(prediction)
    torch.testing.assert_close(scaled.decode(prediction), expected, rtol=1e-3, atol=1e-3 * scale)
    torch.testing.assert_close(scaled.normalized(prediction), codec.normalized(prediction), **close)


@every_codec
def test_relative_labels_decode_to_the_target(cls):
    codec = make(cls, min_return=-3.0, max_return=3.0, relative=True, symlog=False).double()
    target = torch.linspace(900.0, 1100.0, 50, dtype=torch.float64).unsqueeze(-1).expand(50, G)
    codec.update(target, everything(50))
    scale = target.square().mean(0).sqrt()
    torch.testing.assert_close(codec.mean_and_scale(), (target.mean(0), scale), rtol=1e-6, atol=0)
    decoded = codec.decode(codec.encode(target).log())
    bound = 1e-5 * codec.bin_width.item() * scale[0].item()
    torch.testing.assert_close(decoded, target, rtol=1e-9, atol=bound)


@every_codec
def test_a_relative_range_in_double_precision_takes_targets_in_single(cls):
    codec = make(cls, min_return=-3.0, max_return=3.0, relative=True).double()
    target = torch.randn(20, G)
    codec.update(target, everything(20))
    prediction = torch.randn(20, C, G, N, dtype=torch.float64)
    expected = codec.loss(prediction, target.double())
    torch.testing.assert_close(codec.loss(prediction, target), expected)


@every_codec
def test_averages_of_relative_values_are_averages_in_reward_units(cls):
    codec = make(cls, min_return=-3.0, max_return=3.0, relative=True)
    codec.update(1e3 * torch.randn(20, G), everything(20))
    listed = torch.randn(B, C, G, A, N)
    raw = codec.raw_value(listed)
    assert raw.shape == (B, C, G, A)
    assert raw.abs().max() <= 3.0
    for_each = torch.stack([codec.decode(listed[..., a, :]) for a in range(A)], -1)
    torch.testing.assert_close(codec.to_space(raw.mean(-1), "value"), for_each.mean(-1))
    torch.testing.assert_close(codec.to_space(raw.mean(-1), "normalized"), raw.mean(-1))
    prediction = listed[..., 0, :]
    torch.testing.assert_close(codec.normalized(prediction), codec.raw_value(prediction))


def test_relative_targets_outside_are_counted_without_a_warning():
    codec = make(TwoHot, min_return=-2.0, max_return=2.0, relative=True)
    target = torch.zeros(100, G)
    target[0] = 1e4
    codec.update(target, everything(100))
    assert codec.num_outside == G


# --- initial value ---


@every_codec
@pytest.mark.parametrize("symlog", [True, False])
def test_initial_bias_predicts_the_initial_value(cls, symlog):
    codec = make(cls, num_bins=128, init_value=12.0, symlog=symlog)
    assert codec.initial_bias().shape == codec.event_shape
    torch.testing.assert_close(
        codec.decode(codec.initial_bias()), torch.tensor(12.0), rtol=1e-3, atol=0
    )


def test_no_initial_bias_by_default():
    assert make(TwoHot).initial_bias() is None
    assert PopArt(G).initial_bias() is None
    assert PopArt(G).event_shape == ()


@every_codec
def test_initial_slope_orders_the_bins(cls):
    slope = make(cls, init_slope=10.0).initial_slope()
    torch.testing.assert_close(slope[[0, -1]], torch.tensor([-10.0, 10.0]))
    torch.testing.assert_close(slope.diff(), torch.full((len(slope) - 1,), 20 / (len(slope) - 1)))


def test_no_initial_slope_by_default():
    assert make(TwoHot).initial_slope() is None
    assert PopArt(G).initial_slope() is None


# --- state ---


@every_codec
def test_state_travels(cls):
    codec = make(cls)
    with pytest.warns(UserWarning, match="outside"):
        codec.update(torch.full((1, G), 1e3), everything(1))
    other = make(cls, min_return=-1.0, max_return=1.0)
    other.load_state_dict(codec.state_dict())
    buffer = io.BytesIO()
    torch.save(codec.state_dict(), buffer)
    saved = make(cls, symlog=True)
    saved.load_state_dict(torch.load(io.BytesIO(buffer.getvalue()), weights_only=True))
    prediction, target = torch.randn(B, C, G, N), torch.randn(B, G)
    pickled = pickle.loads(pickle.dumps(codec))  # noqa: S301
    for same in (other, saved, copy.deepcopy(codec), pickled):
        assert same.num_outside == 3
        assert torch.equal(same.normalized(prediction), codec.normalized(prediction))
        assert torch.equal(same.loss(prediction, target), codec.loss(prediction, target))
    assert codec.state_dict().keys() >= {"bins", "num_outside", "popart.mu", "popart.nu"}


@every_codec
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
def test_compiles_without_breaks(cls):
    torch._dynamo.reset()
    eager, codec = make(cls), make(cls)
    eager._has_warned = True

    def step(codec, prediction, target, mask):
        codec.update(target, mask)
        return codec.loss(prediction, target), codec.normalized(prediction)

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    for scale in (1.0, 100.0):  # with targets outside at last, of which compiled code doesn't tell
        prediction = torch.randn(B, T, C, G, N, requires_grad=True)
        target, mask = scale * torch.randn(B, T, G), torch.rand(B, T, 1) < 0.7
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            loss, value = compiled(codec, prediction, target, mask)
        expected_loss, expected_value = step(eager, prediction, target, mask)
        torch.testing.assert_close(loss, expected_loss)
        torch.testing.assert_close(value, expected_value)
        (grad,) = torch.autograd.grad(loss.sum() + value.sum(), prediction)
        (expected,) = torch.autograd.grad(expected_loss.sum() + expected_value.sum(), prediction)
        torch.testing.assert_close(grad, expected)
    for name, value in eager.named_buffers():
        torch.testing.assert_close(codec.get_buffer(name), value, msg=name)
    assert codec.num_outside > 0


# --- errors ---


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bins": 1}, "room for two or more different bins in float32, got 1 bins"),
        ({"num_bins": 2.5}, "num_bins must be an integer of at least 1, got 2.5"),
        ({"min_return": 90.0}, r"different bins in float32, got 16 bins in \[90.0, 90.0\]"),
        ({"max_return": math.inf}, "must be finite and leave room.*inf"),
        ({"min_return": math.nan}, "must be finite and leave room.*nan"),
        ({"max_return": -40.0 + 1e-6}, "different bins in float32, got 16 bins"),
        ({"init_value": 90.5}, r"init_value must be in \[min_return=-40.0, .*got 90.5. Widen"),
        ({"init_value": math.nan}, "init_value must be in.*nan"),
        ({"init_slope": 0.0}, "init_slope must be positive, got 0.0. Use None"),
        ({"init_slope": math.inf}, "init_slope must be positive and finite, got inf"),
    ],
)
@every_codec
def test_arguments_out_of_range(cls, options, message):
    with pytest.raises(ValueError, match=message):
        make(cls, **options)


@pytest.mark.parametrize("sigma", [0.0, -0.75, math.nan, math.inf])
def test_sigma_must_be_positive(sigma):
    with pytest.raises(ValueError, match=f"sigma must be positive.*got {sigma}"):
        make(HLGauss, sigma=sigma)


@every_codec
def test_predictions_of_a_wrong_shape(cls):
    codec = make(cls)
    for shape in ((B, C, G, N + 1), (B, C, G), (B, C, G, 1)):
        with pytest.raises(RuntimeError, match="size mismatch"):
            codec.decode(torch.zeros(shape))
        with pytest.raises(ValueError, match=r"\[..., C, G, 16\] with targets .*make_critic"):
            codec.loss(torch.zeros(shape), torch.zeros(B, G))
    for shape in ((B, 1, G), (B, 1), (B, C, G), (G,)):
        with pytest.raises(ValueError, match=r"\[..., C, G, 16\] with targets \[..., G\], got"):
            codec.loss(torch.zeros(B, C, G, N), torch.zeros(shape))
