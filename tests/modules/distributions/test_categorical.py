"""Clipping, forbidden actions, frequencies of samples, gradients of straight-through ones."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.distributions import Categorical as TorchCategorical
from torchrl.data import Categorical, MultiCategorical, OneHot

from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules.distributions import ClippedCategorical, Discrete
from torchrl_amago.modules.distributions import _noise as noise
from torchrl_amago.modules.distributions.discrete import (
    OneHotParts,
    clip_probabilities,
    clipped_softmax,
)

NEVER = -torch.inf
LOGITS = torch.tensor([2.0, NEVER, 0.0, 1.0, NEVER])
PARTS = (2, 3)
PARTS_LOGITS = torch.tensor([NEVER, 1.0, 0.0, NEVER, 3.0])


def _discrete(spec, **options) -> Discrete:
    return Discrete(ActionSpace.from_spec(spec), **options)


# --------------------------------------------------------------------- probabilities


def test_each_part_is_clipped_alone():
    dist = OneHotParts(torch.tensor([50.0, 0.0, 0.0, 0.0, 50.0]), PARTS)
    two, three = 0.99 + 0.001, 0.99 + 0.002
    expected = [0.99 / two, 0.001 / two, 0.001 / three, 0.001 / three, 0.99 / three]
    torch.testing.assert_close(dist.probs, torch.tensor(expected))


@given(st.lists(st.floats(-20, 20), min_size=2, max_size=6), st.floats(0, 0.1), st.floats(0.6, 1))
def test_clipping_against_doubles(logits, low, high):
    logits = torch.tensor(logits, dtype=torch.float64)
    weights = [min(max(p, low), high) for p in logits.softmax(-1).tolist()]
    expected = torch.tensor([w / sum(weights) for w in weights], dtype=torch.float64)
    torch.testing.assert_close(clipped_softmax(logits, low, high), expected)
    torch.testing.assert_close(clip_probabilities(logits.softmax(-1), low, high), expected)


def test_softened_actions_are_what_a_certain_policy_would_be():
    policy_dist = _discrete(MultiCategorical(PARTS))
    action = policy_dist.space.to_vector(torch.tensor([1, 0]))
    certain = policy_dist(1e4 * action)
    clipped = policy_dist.clip_action(action, policy_dist(torch.randn(7, 5)))
    torch.testing.assert_close(clipped, certain.probs)


def test_the_largest_entry_of_a_softened_action_counts():
    policy_dist = _discrete(MultiCategorical(PARTS))
    action = policy_dist.space.to_vector(torch.tensor([[1, 0], [0, 2]]))
    dist = policy_dist(torch.randn(2, 5))
    clipped = policy_dist.clip_action(action, policy_dist(torch.randn(2, 7, 5)))
    assert torch.equal(dist.log_prob(clipped), dist.log_prob(action))


def test_softened_actions_are_0_where_the_policy_may_not_go():
    """A forbidden action that is in the data stays, as of a policy that is certain of it."""
    policy_dist = _discrete(MultiCategorical(PARTS))
    mask = torch.tensor([0.0, 0.0, 0.0, -torch.inf, 0.0])
    action = policy_dist.space.to_vector(torch.tensor([[1, 0], [0, 1]]))
    clipped = policy_dist.clip_action(action, policy_dist(torch.randn(2, 7, 5) + mask))
    torch.testing.assert_close(clipped[0], policy_dist(1e4 * action[0] + mask).probs)
    torch.testing.assert_close(clipped[1, 2:], torch.tensor([0.001, 0.99, 0.001]) / 0.992)


# ------------------------------------------------------------------ forbidden actions


@pytest.mark.parametrize(("low", "high"), [(1e-3, 0.99), (0.1, 1.0), (0.0, 1.0)])
def test_forbidden_actions_by_hand(low, high):
    allowed = LOGITS > NEVER
    probs = clipped_softmax(LOGITS, low, high)
    assert torch.equal(probs == 0, ~allowed)
    torch.testing.assert_close(probs[allowed], clipped_softmax(LOGITS[allowed], low, high))


def test_forbidden_actions_in_parts():
    dist = OneHotParts(PARTS_LOGITS, PARTS)
    assert torch.equal(dist.probs == 0, PARTS_LOGITS == NEVER)
    assert dist.probs[1] == 1.0
    torch.testing.assert_close(dist.probs[[2, 4]], clipped_softmax(torch.tensor([0.0, 3.0])))


@pytest.mark.parametrize("low", [0.0, 1e-3])
def test_forbidden_actions_are_never_sampled(low):
    index = ClippedCategorical(LOGITS, low).sample((100_000,))
    assert set(index.unique().tolist()) == {0, 2, 3}
    forbidden = PARTS_LOGITS == NEVER
    dist = OneHotParts(PARTS_LOGITS, PARTS, low)
    for samples in (dist.sample((50_000,)), dist.rsample((50_000,)).round()):
        assert not samples[:, forbidden].any()
        assert samples[:, ~forbidden].any(0).all()


@pytest.mark.parametrize("name", ["exponential", "gumbel"])
def test_forbidden_actions_are_not_drawn_by_any_noise(monkeypatch, name):
    """Noise all in favour of a forbidden action."""
    wish = torch.tensor([1.0, 0.0, 1.0, 1.0, 1.0])
    extreme = {"exponential": 1e-30 + wish * 1e30, "gumbel": 80.0 * (1 - wish)}
    monkeypatch.setattr(noise, name, lambda shape, like: extreme[name].expand(shape))
    dist = OneHotParts(LOGITS, [5])
    sample = dist.sample() if name == "exponential" else dist.rsample()
    assert not sample[1]


def test_forbidden_actions_harm_no_gradient():
    logits = torch.stack([LOGITS, torch.randn(5)]).requires_grad_()
    dist = OneHotParts(logits, [5])
    allowed = logits > NEVER
    action = torch.eye(5)[[0, 1]]
    weights = torch.randn(2, 5)
    for value in (
        dist.log_prob(action),
        dist.entropy(),
        (dist.probs * weights).sum(-1),
        (dist.rsample((7,)) * weights).sum(-1),
    ):
        assert value.isfinite().all()
        (grad,) = torch.autograd.grad(value.sum(), logits, retain_graph=True)
        assert grad.isfinite().all()
        assert (grad[~allowed] == 0).all()
        assert (grad[0, allowed[0]] != 0).any()


def test_gradient_of_the_allowed_is_as_if_the_others_were_not_there():
    masked = LOGITS.double().requires_grad_()
    alone = LOGITS[LOGITS > NEVER].double().requires_grad_()
    for one, other in (
        (ClippedCategorical(masked).entropy(), ClippedCategorical(alone).entropy()),
        (
            ClippedCategorical(masked).log_prob(torch.tensor(2)),
            ClippedCategorical(alone).log_prob(torch.tensor(1)),
        ),
    ):
        torch.testing.assert_close(one, other)
        grads = torch.autograd.grad(one, masked)[0], torch.autograd.grad(other, alone)[0]
        torch.testing.assert_close(grads[0][LOGITS > NEVER], grads[1])


def test_a_forbidden_action_in_the_data_costs_a_finite_amount():
    log_prob = ClippedCategorical(LOGITS).log_prob(torch.tensor(1))
    assert -20 < log_prob < -10


# ---------------------------------------------------------------------------- samples


def _assert_frequencies(counts: torch.Tensor, probs: torch.Tensor, num: int) -> None:
    """Within 5 standard deviations of the binomial."""
    tolerance = 5 * (probs * (1 - probs) / num).sqrt()
    assert ((counts / num - probs).abs() <= tolerance).all()


@pytest.mark.parametrize("method", ["sample", "rsample"])
def test_frequencies(method):
    num = 40_000
    logits = torch.tensor([0.3, -1.0, 1.0, 0.0, -2.0])
    dist = OneHotParts(logits, PARTS)
    samples = getattr(dist, method)((num,)).round()
    _assert_frequencies(samples.sum(0), dist.probs, num)
    joint = (samples[:, :2].unsqueeze(-1) * samples[:, None, 2:]).sum(0)
    expected = dist.probs[:2].unsqueeze(-1) * dist.probs[2:]
    _assert_frequencies(joint, expected, num)


def test_one_part_draws_what_a_categorical_draws():
    logits = torch.randn(64, 5)
    torch.manual_seed(4)
    expected = ClippedCategorical(logits).sample()
    torch.manual_seed(4)
    stored = _discrete(Categorical(5)).stored(logits).sample()
    torch.manual_seed(4)
    one_hot = _discrete(OneHot(5)).stored(logits).sample()
    torch.manual_seed(4)
    of_torch = TorchCategorical(clipped_softmax(logits)).sample()
    assert torch.equal(stored, expected)
    assert torch.equal(one_hot.int().argmax(-1), expected)
    assert torch.equal(of_torch, expected)


def test_straight_through_gradient_is_that_of_the_softmax():
    logits = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(3, 5, dtype=torch.float64)
    gumbel = torch.randn(3, 5, dtype=torch.float64)

    def soft(logits: torch.Tensor, temperature: float) -> torch.Tensor:
        parts = [
            ((ClippedCategorical(part, 0.0, 1.0).probs.log() + g) / temperature).softmax(-1)
            for part, g in zip(logits.split(PARTS, -1), gumbel.split(PARTS, -1), strict=True)
        ]
        return (torch.cat(parts, -1) * weights).sum()

    for temperature in (0.5, 2.0):
        draws = iter(gumbel.split(PARTS, -1))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(noise, "gumbel", lambda shape, like, draws=draws: next(draws))
            sample = OneHotParts(logits, PARTS, 0.0, 1.0, temperature).rsample()
        assert ((sample - sample.round()).abs() < 1e-12).all()
        (grad,) = torch.autograd.grad((sample * weights).sum(), logits)
        (expected,) = torch.autograd.grad(soft(logits, temperature), logits)
        torch.testing.assert_close(grad, expected)


def test_noise():
    like = torch.zeros((), dtype=torch.float64)
    clocks = noise.exponential(torch.Size([40_000]), like)
    assert clocks.dtype == torch.float64
    assert clocks.min() > 0
    assert clocks.mean().item() == pytest.approx(1, abs=0.03)
    gumbel = noise.gumbel(torch.Size([40_000]), like)
    assert gumbel.mean().item() == pytest.approx(0.5772, abs=0.04)
    assert gumbel.isfinite().all()
    normal = noise.standard_normal(torch.Size([40_000]), like)
    assert normal.std().item() == pytest.approx(1, abs=0.02)
