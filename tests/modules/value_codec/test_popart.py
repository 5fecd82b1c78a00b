"""PopArt: output preservation, masking, first and second moments."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given

from torchrl_amago.modules import PopArt


def _mask(*flags: int) -> torch.Tensor:
    return torch.tensor(flags, dtype=torch.bool).view(1, -1, 1)


@given(seed=st.integers(0, 2**31), scale=st.floats(0.1, 1e3), updates=st.integers(1, 5))
def test_updates_preserve_decoded_values(seed, scale, updates):
    generator = torch.Generator().manual_seed(seed)
    codec = PopArt(num_discounts=3, beta=0.05).double()
    prediction = torch.randn(2, 4, 4, 3, generator=generator, dtype=torch.float64)
    before = codec.decode(prediction)
    for _ in range(updates):
        target = scale * torch.randn(2, 4, 3, generator=generator)
        codec.update(target, torch.ones(2, 4, 1, dtype=torch.bool))
    torch.testing.assert_close(codec.decode(prediction), before, rtol=1e-6, atol=1e-6)


def test_first_update_by_hand():
    codec = PopArt(num_discounts=1, beta=0.5, initial_nu=4.0)
    codec.update(torch.tensor([[[3.0], [5.0]]]), _mask(1, 1))
    step = 0.5 / (1 - 0.5**2)
    torch.testing.assert_close(codec.mu, torch.tensor([step * 4.0]))
    torch.testing.assert_close(codec.nu, torch.tensor([(1 - step) * 4.0 + step * 17.0]))


def test_encode_inverts_decode_of_normalised_values():
    codec = PopArt(num_discounts=2)
    codec.update(torch.randn(4, 5, 2) * 7 + 3, torch.ones(4, 5, 1, dtype=torch.bool))
    target = torch.randn(4, 5, 2)
    torch.testing.assert_close(codec.encode(target) * codec.sigma + codec.mu, target)


def test_padding_has_no_effect_and_an_all_masked_batch_moves_nothing():
    clean, poisoned = PopArt(1), PopArt(1)
    clean.update(torch.tensor([[[3.0], [5.0], [0.0]]]), _mask(1, 1, 0))
    poisoned.update(torch.tensor([[[3.0], [5.0], [float("nan")]]]), _mask(1, 1, 0))
    for name, buffer in clean.named_buffers():
        assert torch.equal(buffer, poisoned.get_buffer(name)), name
    state = {name: buffer.clone() for name, buffer in clean.named_buffers()}
    clean.update(torch.full((1, 2, 1), float("nan")), _mask(0, 0))
    for name, buffer in clean.named_buffers():
        assert torch.equal(buffer, state[name]), name


def test_disabled_is_the_identity():
    codec = PopArt(2, enabled=False)
    x = torch.randn(3, 2)
    codec.update(x.view(1, 3, 2), torch.ones(1, 3, 1, dtype=torch.bool))
    assert torch.equal(codec.decode(x), x)
    assert torch.equal(codec.normalized(x), x)
    assert codec.mu.eq(0).all()


def test_loss_is_the_squared_error_of_normalised_values_without_gradient_to_the_target():
    codec = PopArt(1)
    codec.mu.fill_(2.0), codec.nu.fill_(8.0)  # sigma = 2
    prediction = torch.tensor([1.0, 0.5]).view(1, 1, 2, 1).requires_grad_()
    target = torch.tensor([[[6.0]]], requires_grad=True)
    loss = codec.loss(prediction, target)
    torch.testing.assert_close(loss.flatten(), torch.tensor([1.0, 2.25]))
    loss.sum().backward()
    assert target.grad is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 2.0}, r"beta must be in \[0, 1\], got 2.0"),
        ({"beta": 0.0}, "beta must be positive, got 0.0"),
        ({"beta": float("nan")}, "beta must be positive and finite, got nan"),
        ({"initial_nu": 0.0}, "initial_nu must be positive, got 0.0"),
        ({"initial_nu": float("inf")}, "initial_nu must be positive and finite, got inf"),
        ({"num_discounts": 0}, "num_discounts must be at least 1, got 0"),
        ({"num_discounts": 1.5}, "num_discounts must be an integer of at least 1, got 1.5"),
    ],
)
def test_wrong_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        PopArt(**{"num_discounts": 1, **options})


def test_reset_forgets_all_targets():
    codec, fresh = (PopArt(2, initial_nu=9.0) for _ in range(2))
    codec.update(torch.randn(5, 2), torch.ones(5, 1, dtype=torch.bool))
    assert not torch.equal(codec.mu, fresh.mu)
    codec.reset_parameters()
    for name, value in fresh.named_buffers():
        assert torch.equal(codec.get_buffer(name), value), name
