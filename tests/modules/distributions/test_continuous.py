"""Densities against integrals and torch's own, samples against densities, clipping at the edges."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import distributions
from torchrl.data import Bounded
from torchrl.modules import TanhNormal

from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules.distributions import Beta, TanhGaussian, TanhMixture
from torchrl_amago.modules.distributions.continuous import (
    SquashedMixture,
    SquashedNormal,
    StretchedBeta,
    log_tanh_slope,
)

EDGES = (-1 + 1e-12, 1 - 1e-12)  # clipping that changes nothing here


def _space(size: int) -> ActionSpace:
    return ActionSpace.from_spec(Bounded(-1.0, 1.0, shape=(size,)))


def _double(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64)


CLIPPED = {
    "Gaussian": TanhGaussian(_space(1), std_low=0.2, std_high=1.5, clip_actions=EDGES),
    "Beta": Beta(_space(1), alpha_high=6.0, clip_actions=EDGES),
}
DENSITIES = {**CLIPPED, "mixture": TanhMixture(_space(1), num_modes=3, std_low=0.2)}


@pytest.fixture(params=DENSITIES.values(), ids=DENSITIES.keys())
def policy_dist(request):
    return request.param


def _integral(function, num: int = 40_001, reach: float = 12.0) -> torch.Tensor:
    """Integrate over (-1, 1), on a grid finer towards the edges; ``[N, 1] -> [N, ...]``."""
    x = torch.linspace(-reach, reach, num, dtype=torch.float64)
    slope = 1.0 / x.cosh().square()
    values = function(x.tanh().unsqueeze(-1))
    return torch.trapezoid(values * slope.view(-1, *[1] * (values.ndim - 1)), x, dim=0)


def test_densities_integrate_to_one(policy_dist):
    dist = policy_dist(_double(5, policy_dist.num_params))
    total = _integral(lambda a_N1: dist.log_prob(a_N1.unsqueeze(1)).exp())
    # The mixture's log-density is slightly off near the edges: see `SquashedMixture.EDGE`.
    atol = 2e-3 if isinstance(policy_dist, TanhMixture) else 1e-6
    torch.testing.assert_close(total, torch.ones_like(total), rtol=0, atol=atol)


def test_entropies_are_integrals(policy_dist):
    params = _double(5, policy_dist.num_params)
    dist = policy_dist(params)

    def integrand(a_N1: torch.Tensor) -> torch.Tensor:
        log_prob = dist.log_prob(a_N1.unsqueeze(1))
        return -torch.where(log_prob > -500, log_prob.exp() * log_prob, 0.0)

    expected = _integral(integrand)
    num = 1 if isinstance(policy_dist, Beta) else 20_000
    estimates = policy_dist(params.expand(num, *params.shape)).entropy()
    spread = estimates.std(0) if num > 1 else torch.zeros(5)
    tolerance = 5 * spread / math.sqrt(num) + 1e-3
    assert ((estimates.mean(0) - expected).abs() < tolerance).all()
    if num > 1:
        assert (spread > 0.05).all()  # of one sample each, as documented


def test_samples_have_the_density(policy_dist):
    dist = policy_dist(_double(3, policy_dist.num_params))
    num = 40_000
    samples = dist.sample((num,)).squeeze(-1)
    for power in (1, 2):
        expected = _integral(
            lambda a_N1, power=power: a_N1**power * dist.log_prob(a_N1.unsqueeze(1)).exp()
        )
        tolerance = 5 * (samples**power).std(0) / math.sqrt(num) + 1e-4
        assert ((samples**power).mean(0).sub(expected).abs() < tolerance).all()


@pytest.mark.parametrize("policy_dist", CLIPPED.values(), ids=CLIPPED.keys())
def test_reparameterised_samples_move_with_their_parameters(policy_dist):
    """The mean gradient of a sample is the gradient of the mean, by finite differences."""
    params = torch.tensor([0.3, -0.2], dtype=torch.float64, requires_grad=True)
    samples = policy_dist(params).rsample((40_000,)).squeeze(-1)
    (grad,) = torch.autograd.grad(samples.mean(), params)
    for i in range(2):
        step = torch.zeros(2, dtype=torch.float64)
        step[i] = 1e-4
        means = [
            _integral(lambda a_N1, p=p: a_N1.squeeze(-1) * policy_dist(p).log_prob(a_N1).exp())
            for p in (params.detach() + step, params.detach() - step)
        ]
        assert grad[i].item() == pytest.approx((means[0] - means[1]).item() / 2e-4, abs=0.02)


# --------------------------------------------------------------------- torch's own


def _tanh(base: distributions.Distribution) -> distributions.Distribution:
    return distributions.TransformedDistribution(base, distributions.TanhTransform())


def test_squashed_normal_against_torch_and_torchrl():
    loc, scale = _double(50, 3), _double(50, 3).exp()
    action = _double(50, 3).tanh()
    ours = SquashedNormal(loc, scale, EDGES).log_prob(action)
    normal = distributions.Independent(distributions.Normal(loc, scale), 1)
    torch.testing.assert_close(ours, _tanh(normal).log_prob(action))
    torch.testing.assert_close(ours, TanhNormal(loc, scale).log_prob(action))


def test_stretched_beta_against_torch():
    alpha, beta = 1 + _double(50, 3).exp(), 1 + _double(50, 3).exp()
    action = _double(50, 3).tanh()
    stretch = distributions.AffineTransform(loc=-1.0, scale=2.0)
    theirs = distributions.TransformedDistribution(distributions.Beta(alpha, beta), stretch)
    ours = StretchedBeta(alpha, beta, EDGES)
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action).sum(-1))


def test_squashed_mixture_against_torch():
    loc, scale, logits = _double(50, 4, 3), _double(50, 4, 3).exp(), _double(50, 4)
    normal = distributions.Independent(distributions.Normal(loc, scale), 1)
    base = distributions.MixtureSameFamily(distributions.Categorical(logits=logits), normal)
    action = 0.9 * _double(50, 3).tanh()
    ours = SquashedMixture(loc, scale, logits).log_prob(action)
    torch.testing.assert_close(ours, _tanh(base).log_prob(action), rtol=1e-5, atol=1e-4)


def test_modes_are_drawn_as_often_as_their_weights_say():
    loc = torch.tensor([[-2.0], [0.0], [2.0]])
    logits = torch.tensor([0.2, 0.5, 0.3]).log()
    samples = SquashedMixture(loc, torch.full_like(loc, 0.01), logits).sample((40_000,))
    fractions = torch.tensor(
        [(samples.atanh() - mode).abs().lt(0.2).float().mean() for mode in loc]
    )
    torch.testing.assert_close(fractions, logits.exp(), rtol=0, atol=0.0125)


# ----------------------------------------------------------------------- at the edges


@pytest.mark.parametrize("cls", [TanhGaussian, Beta])
def test_stored_actions_are_clipped_before_their_log_probability(cls):
    low, high = -0.9, 0.95
    params = _double(4)
    dist = cls(_space(2), clip_actions=(low, high))(params)
    exact = cls(_space(2), clip_actions=EDGES)(params)
    inside = torch.tensor([0.3, -0.89], dtype=torch.float64)
    torch.testing.assert_close(dist.log_prob(inside), exact.log_prob(inside))
    outside, edge = torch.tensor([[1.0, -1.0], [high, low]], dtype=torch.float64)
    torch.testing.assert_close(dist.log_prob(outside), exact.log_prob(edge))


def test_nothing_is_clipped_in_the_entropy_of_own_samples():
    """Nearly all samples are beyond the clipping: the entropy still falls with the scale."""
    loc = torch.full((20_000, 1), 5.0, dtype=torch.float64)
    entropies = [
        SquashedNormal(loc, torch.full_like(loc, scale)).entropy().mean() for scale in (0.1, 0.2)
    ]
    # Entropy of the Gaussian plus the mean of log(1 - tanh^2), which is 2 log 2 - 2 |x| out there.
    for entropy, scale in zip(entropies, (0.1, 0.2), strict=True):
        expected = 0.5 * math.log(2 * math.pi * math.e * scale**2) + 2 * math.log(2) - 10
        assert entropy.item() == pytest.approx(expected, abs=0.02)


@given(st.floats(-300, 300))
def test_slope_of_tanh(x):
    expected = -2 * (abs(x) + math.log1p(math.exp(-2 * abs(x))) - math.log(2))
    value = log_tanh_slope(torch.tensor(x, dtype=torch.float64)).item()
    assert value == pytest.approx(expected, rel=1e-12, abs=1e-12)


def test_greedy_actions_by_hand():
    params = torch.tensor([0.5, -2.0, 0.0, 1.0])
    assert TanhGaussian(_space(2))(params).deterministic_sample.tolist() == pytest.approx(
        [math.tanh(0.5), math.tanh(-2.0)]
    )
    alpha, beta = (torch.nn.functional.softplus(params) + 1.0001).chunk(2)
    expected = 2 * alpha / (alpha + beta) - 1
    torch.testing.assert_close(Beta(_space(2))(params).deterministic_sample, expected)
    mixture = TanhMixture(_space(1), num_modes=2)(torch.tensor([1.0, 3.0, 0.0, 0.0, 0.0, 0.0]))
    assert mixture.deterministic_sample.item() == pytest.approx(math.tanh(2.0))


def test_standard_deviations_stay_within_bounds():
    params = torch.tensor([0.0, -50.0]), torch.tensor([0.0, 0.0]), torch.tensor([0.0, 50.0])
    stds = [TanhGaussian(_space(1))(p).scale.item() for p in params]
    assert stds == pytest.approx([math.exp(-5), math.exp(-1.5), math.exp(2)], rel=1e-5)
