"""Values in units of their targets' deviation: moments, masks, scales."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from torchrl_amago.modules.value_codec import RunningScale


def everything(*shape):
    return torch.ones(*shape, 1, dtype=torch.bool)


@given(seed=st.integers(0, 2**31), beta=st.floats(0.001, 0.9), batches=st.integers(1, 6))
def test_moments_are_weighted_ones_of_all_targets(seed, beta, batches):
    generator = torch.Generator().manual_seed(seed)
    codec = RunningScale(2, beta).double()
    targets = 3 + 2 * torch.randn(batches, 7, 2, generator=generator, dtype=torch.float64)
    for target in targets:
        codec.update(target, everything(7))
    age = torch.arange(batches - 1, -1, -1, dtype=torch.float64)
    weight = (1 - beta) ** age[:, None, None] / (7 * ((1 - beta) ** age).sum())
    mean = (weight * targets).sum((0, 1))
    variance = (weight * (targets - mean).square()).sum((0, 1))
    torch.testing.assert_close(codec.mu, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(codec.sigma, variance.sqrt(), rtol=1e-6, atol=1e-6)


@given(scale=st.floats(1e-3, 1e5), offset=st.floats(-3, 3))
def test_labels_do_not_depend_on_the_unit_of_rewards(scale, offset):
    small, large = RunningScale(1), RunningScale(1)
    for seed in range(3):
        target = torch.randn(50, 1, generator=torch.Generator().manual_seed(seed)) + offset
        small.update(target, everything(50))
        large.update(scale * target, everything(50))
    torch.testing.assert_close(
        large.encode(scale * target), small.encode(target), rtol=1e-3, atol=1e-3
    )


def test_padding_has_no_effect_and_an_all_masked_batch_moves_nothing():
    clean, poisoned = RunningScale(1), RunningScale(1)
    clean.update(torch.tensor([[3.0], [5.0]]), everything(2))
    mask = torch.tensor([[True], [True], [False]])
    poisoned.update(torch.tensor([[3.0], [5.0], [float("nan")]]), mask)
    poisoned.update(torch.full((2, 1), float("nan")), ~everything(2))
    for name, buffer in clean.named_buffers():
        assert torch.equal(buffer, poisoned.get_buffer(name)), name
    assert clean.mu.item() == pytest.approx(4.0)
    assert clean.sigma.item() == pytest.approx(1.0, rel=1e-4)


def test_values_are_zero_before_the_first_targets():
    codec = RunningScale(3)
    assert codec.decode(torch.randn(5, 3)).abs().max() < 1e-3
    codec.update(torch.full((4, 3), 7.0), everything(4))
    codec.reset_parameters()
    assert all((buffer == 0).all() for buffer in codec.buffers())


def test_encode_inverts_decode():
    codec = RunningScale(2)
    codec.update(torch.randn(4, 5, 2) * 7 + 3, everything(4, 5))
    target = torch.randn(4, 5, 2)
    torch.testing.assert_close(codec.decode(codec.encode(target)), target, rtol=1e-5, atol=1e-5)


def test_loss_has_a_row_for_each_critic():
    codec = RunningScale(2)
    loss = codec.loss(torch.zeros(6, 4, 2), torch.ones(6, 2))
    assert loss.shape == (6, 4, 2)


@pytest.mark.parametrize("beta", [0.0, 1.5])
def test_step_sizes_are_fractions(beta):
    with pytest.raises(ValueError, match="beta"):
        RunningScale(1, beta=beta)
