"""Values in units of the size of large targets: moments, masks, scales."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from torchrl.objectives import SoftUpdate

from torchrl_amago import MetaFrozenLake, amago_loss, make_policy, make_trial_env
from torchrl_amago.modules.value_codec import RunningScale


def everything(*shape):
    return torch.ones(*shape, 1, dtype=torch.bool)


@given(
    seed=st.integers(0, 2**31),
    beta=st.floats(0.001, 0.9),
    batches=st.integers(1, 6),
    power=st.sampled_from([2, 4]),
)
def test_moments_are_weighted_ones_of_all_targets(seed, beta, batches, power):
    generator = torch.Generator().manual_seed(seed)
    codec = RunningScale(2, beta, power).double()
    targets = 3 + 2 * torch.randn(batches, 7, 2, generator=generator, dtype=torch.float64)
    for target in targets:
        codec.update(target, everything(7))
    age = torch.arange(batches - 1, -1, -1, dtype=torch.float64)
    weight = (1 - beta) ** age[:, None, None] / (7 * ((1 - beta) ** age).sum())
    mean = (weight * targets).sum((0, 1))
    moment = (weight * targets.abs().pow(power)).sum((0, 1))
    torch.testing.assert_close(codec.mu, mean, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(codec.sigma, moment.pow(1 / power), rtol=1e-6, atol=1e-6)


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
    assert clean.sigma.item() == pytest.approx(((3**4 + 5**4) / 2) ** 0.25)


def test_values_are_zero_before_the_first_targets():
    codec = RunningScale(3)
    assert codec.decode(torch.randn(5, 3)).abs().max() < 1e-3
    codec.update(torch.full((4, 3), 7.0), everything(4))
    codec.reset_parameters()
    fresh = RunningScale(3).state_dict()
    assert all(torch.equal(x, fresh[name]) for name, x in codec.state_dict().items())


@given(seed=st.integers(0, 2**31), scale=st.floats(1e-2, 1e4), offset=st.floats(-1e3, 1e3))
def test_later_targets_do_not_change_what_predictions_mean(seed, scale, offset):
    generator = torch.Generator().manual_seed(seed)
    codec, prediction = RunningScale(2, beta=0.3).double(), torch.randn(9, 2).double()
    codec.update(torch.randn(20, 2, generator=generator).double(), everything(20))
    before = codec.decode(prediction)
    target = scale * torch.randn(20, 2, generator=generator).double() + offset
    codec.update(target, everything(20))
    torch.testing.assert_close(codec.decode(prediction), before, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("takes_actions", [False, True])
def test_critics_take_over_the_scale(takes_actions):
    """Online and target values stay, and a step of the raw prediction is one of the scale."""
    torch.manual_seed(0)
    env = make_trial_env(MetaFrozenLake(batch_size=(4,)), episodes=2)
    policy = make_policy(env, context_length=18)
    batch = env.rollout(18, policy, break_when_any_done=False)
    codec = RunningScale(len(policy.discounts), beta=0.5)
    options = {"online_coeff": 0.0, "offline_coeff": 1.0} if takes_actions else {}
    critic_options = {"takes_actions": takes_actions}
    loss = amago_loss(policy, value_codec=codec, critic_options=critic_options, **options)
    SoftUpdate(loss, tau=0.01)
    loss(batch)  # the first scale
    size = torch.arange(1.0, 1 + len(policy.discounts))
    codec.update(5 + 100 * size * torch.randn(64, len(size)), everything(64))
    assert codec.weight.max() < 0.1

    state = torch.randn(5, policy.state_size)
    action = torch.zeros(5, 1, policy.distribution.space.size)

    def values():
        with torch.no_grad(), loss.target_critic_network_params.to_module(loss.critic_network):
            raw = loss.critic_network(*((state, action) if takes_actions else (state,)))
        raw = raw if takes_actions else raw[..., 0]
        return loss.estimates(batch)["q_value"], codec.decode(raw)

    before = values()
    loss._absorb_scale()
    torch.testing.assert_close(values(), before, rtol=1e-4, atol=1e-4)
    # Critics that take the action have one output for all discounts, so that their ratios stay.
    assert codec.weight.log().mean() == pytest.approx(0.0, abs=1e-5)
    if not takes_actions:
        assert torch.equal(codec.weight, torch.ones(len(size)))
        assert torch.equal(codec.bias, torch.zeros(len(size)))


def test_targets_that_are_all_alike_have_a_scale():
    codec = RunningScale(1)
    codec.update(torch.full((8, 1), -5.0), everything(8))
    assert codec.sigma.item() == pytest.approx(5.0)
    assert codec.decode(torch.tensor([0.1])).item() == pytest.approx(-4.5, rel=1e-4)


def test_the_scale_of_rare_rewards_is_close_to_their_size():
    """With one target of 10 among 100 of nothing, no label is further than 4 from another."""
    codec, target = RunningScale(1), torch.zeros(100, 1)
    target[7] = 10.0
    codec.update(target, everything(100))
    label = codec.encode(target)
    assert (label.max() - label.min()).item() == pytest.approx(100**0.25)  # 10 in units of the rms


def test_encode_inverts_decode():
    codec = RunningScale(2)
    codec.update(torch.randn(4, 5, 2) * 7 + 3, everything(4, 5))
    target = torch.randn(4, 5, 2)
    torch.testing.assert_close(codec.decode(codec.encode(target)), target, rtol=1e-5, atol=1e-5)


def test_loss_has_a_row_for_each_critic():
    codec = RunningScale(2)
    loss = codec.loss(torch.zeros(6, 4, 2), torch.ones(6, 2))
    assert loss.shape == (6, 4, 2)


@pytest.mark.parametrize("wrong", [{"beta": 0.0}, {"beta": 1.5}, {"power": 3}])
def test_numbers_out_of_their_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        RunningScale(1, **wrong)
