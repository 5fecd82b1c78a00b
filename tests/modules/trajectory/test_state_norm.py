"""States normalised over a batch: moments, gradients, averages, and where each of them is used."""

from __future__ import annotations

import copy

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.modules import set_recurrent_mode

from tests.modules.trajectory.helpers import random_trials, take_steps
from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
from torchrl_amago.modules import GRUEncoder, TransformerEncoder
from torchrl_amago.modules._state_norm import StateNorm


def inputs(batch=3, steps=7, fill=0.0):
    x, time_idx, is_init = random_trials(batch, steps, reset_fraction=0.0)
    mask = torch.arange(steps) < torch.tensor([steps, 4, 1])[:, None]
    return TensorDict(
        timestep=torch.where(mask[..., None], x, fill),
        time_idx=time_idx,
        is_init=is_init,
        collector=TensorDict(mask=mask, batch_size=[batch, steps]),
        batch_size=[batch, steps],
    )


def encoders(**options):
    torch.manual_seed(0)
    sizes = dict(d_model=8, num_layers=1, normalize_states=True, **options)
    return [
        GRUEncoder(4, **sizes),
        TransformerEncoder(
            4, num_heads=2, dropout_ff=0.0, dropout_emb=0.0, context_length=64, **sizes
        ),
    ]


@pytest.mark.parametrize("fill", [0.0, torch.nan])
def test_an_update_is_batch_normalisation_of_the_real_steps(fill):
    torch.manual_seed(0)
    x = (3.0 + torch.randn(4, 5, 6, dtype=torch.float64)).requires_grad_()
    mask, weight = torch.rand(4, 5, 1) < 0.6, torch.randn(4, 5, 6, dtype=torch.float64)
    norm = StateNorm(6).double()
    reference = nn.BatchNorm1d(6, eps=norm.eps, affine=False, dtype=torch.float64)
    poisoned = torch.where(mask, x, fill)
    y, expected = norm(poisoned, mask, update=True), reference(x[mask.squeeze(-1)])
    torch.testing.assert_close(y[mask.squeeze(-1)], expected)
    (gradient,) = torch.autograd.grad((y * weight)[mask.squeeze(-1)].sum(), x)
    loss = (expected * weight[mask.squeeze(-1)]).sum()
    torch.testing.assert_close(gradient, torch.autograd.grad(loss, x)[0])
    # A shift of all states changes nothing, so nothing asks for one.
    torch.testing.assert_close(gradient.sum((0, 1)), torch.zeros(6, dtype=torch.float64))


def test_averages_move_by_a_fraction():
    norm = StateNorm(1, beta=0.25)
    norm(torch.tensor([[2.0], [6.0]]), update=True)
    assert (norm.mean.item(), norm.variance.item()) == pytest.approx((1.0, 0.75 + 0.25 * 4.0))
    before = copy.deepcopy(norm.state_dict())
    nothing = norm(torch.full((2, 1), torch.nan), torch.zeros(2, 1, dtype=torch.bool), update=True)
    assert nothing.shape == (2, 1)
    norm(torch.tensor([[100.0]]))
    torch.testing.assert_close(norm.state_dict(), before, rtol=0, atol=0)
    assert norm(torch.tensor([[100.0]])).item() == pytest.approx(99 / 1.75**0.5, rel=1e-5)
    norm.reset_parameters()
    torch.testing.assert_close(norm.state_dict(), StateNorm(1).state_dict())


@pytest.mark.parametrize("index", [0, 1])
def test_only_sequences_in_training_with_gradient_are_an_update(index):
    encoder, data = encoders()[index], inputs(fill=torch.nan)
    norm, mask = encoder.state_norm, data["collector", "mask"]
    with set_recurrent_mode(True):
        state = encoder(data.clone())["state"]
        torch.testing.assert_close(state[mask].mean(0), torch.zeros(8), atol=1e-5, rtol=0)
        deviation = state[mask].var(0, correction=0)
        torch.testing.assert_close(deviation, torch.ones(8), atol=1e-2, rtol=0)
        moved = norm.mean.clone()
        assert moved.abs().max() > 0
        with torch.no_grad():
            encoder(data.clone())
        encoder.eval()(data.clone())
    encoder.train()(data[:, 0].clone())
    assert norm.mean.equal(moved)


@pytest.mark.parametrize("index", [0, 1])
@torch.no_grad()
def test_steps_equal_the_window(index):
    encoder = encoders()[index]
    encoder.state_norm.mean.normal_()
    x, time_idx, is_init = random_trials(3, 9)
    states, _ = take_steps(encoder, x, time_idx, is_init)
    data = TensorDict(timestep=x, time_idx=time_idx, is_init=is_init, batch_size=[3, 9])
    with set_recurrent_mode(True):
        expected = encoder.eval()(data)["state"]
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(states, expected.new_zeros(()), atol=0.1)


def test_earlier_runs_can_be_resumed_and_normalised_ones_are_told_apart():
    normalised, plain = GRUEncoder(4, normalize_states=True), GRUEncoder(4)
    assert normalised.settings == plain.settings  # which hold no word of the option
    assert normalised.state_dict().keys() - plain.state_dict().keys() == {
        "state_norm.mean",
        "state_norm.variance",
    }


def test_exported_steps_are_normalised():
    env = make_trial_env(MetaFrozenLake(batch_size=(2,), seed=0), episodes=2)
    policy = make_policy(
        env,
        context_length=45,
        seq_model="gru",
        seq_model_options=dict(d_model=8, num_layers=1, normalize_states=True),
    )
    policy.encoder.trajectory.state_norm.mean.normal_(0.0, 3.0)
    policy.reset_out_keys()
    step, td, seen = policy.step_module(), env.reset(), []
    step.policy.actor.module.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    step(step.inputs_of(td), step.initial_states(2))
    torch.testing.assert_close(seen[0], policy(td)["state"])
    assert seen[0].abs().max() > 3.0


def test_several_batches_at_once_are_refused():
    norm, x = StateNorm(3), torch.randn(2, 4, 3)
    with pytest.raises(RuntimeError, match="deactivate_vmap"):
        torch.vmap(lambda part: norm(part, update=True))(x)
    torch.testing.assert_close(torch.vmap(norm)(x), norm(x))
