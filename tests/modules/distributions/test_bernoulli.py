"""Bits against torch's own, by hand and by frequency."""

from __future__ import annotations

import math

import pytest
import torch
from torch import distributions
from torchrl.data import Binary

from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules.distributions import Bernoulli
from torchrl_amago.modules.distributions.discrete import Bits


def _bernoulli(size: int, **options) -> Bernoulli:
    return Bernoulli(ActionSpace.from_spec(Binary(size)), **options)


def test_log_probability_by_hand():
    params = torch.tensor([math.log(3.0), 0.0])  # probabilities 3/4 and 1/2
    action = torch.tensor([1.0, 0.0])
    joint = math.log(0.75 * 0.5)
    assert _bernoulli(2, reduce="sum")(params).log_prob(action) == pytest.approx(joint)
    assert _bernoulli(2)(params).log_prob(action) == pytest.approx(joint / 2)


def test_against_torch():
    params = torch.randn(6, 4)
    theirs = distributions.Independent(distributions.Bernoulli(logits=params), 1)
    ours = _bernoulli(4, reduce="sum")(params)
    action = theirs.sample()
    torch.testing.assert_close(ours.log_prob(action), theirs.log_prob(action))
    torch.testing.assert_close(ours.entropy(), theirs.entropy())


def test_entropy_is_that_of_the_whole_action_however_log_probabilities_are_reduced():
    params = torch.randn(4)
    assert torch.equal(
        _bernoulli(4)(params).entropy(), _bernoulli(4, reduce="sum")(params).entropy()
    )


def test_frequencies_and_independence():
    params = torch.tensor([-1.0, 0.5, 2.0])
    samples = _bernoulli(3)(params).sample((40_000,))
    assert set(samples.unique().tolist()) == {0.0, 1.0}
    torch.testing.assert_close(samples.mean(0), params.sigmoid(), rtol=0, atol=0.0125)
    assert samples.T.corrcoef().fill_diagonal_(0).abs().max() < 0.025


def test_greedy_is_the_more_probable_value():
    dist = _bernoulli(3)(torch.tensor([-0.1, 0.0, 0.1]))
    assert dist.deterministic_sample.tolist() == [0, 0, 1]


def test_forbidden_bits():
    logits = torch.tensor([-torch.inf, 0.0], requires_grad=True)
    bits = Bits(logits, reduce="sum")
    torch.testing.assert_close(bits.probs, torch.tensor([0.0, 0.5]))
    assert (bits.sample((1000,))[:, 0] == 0).all()
    torch.testing.assert_close(bits.log_prob(torch.zeros(2)), torch.tensor(0.5).log())
    torch.testing.assert_close(bits.entropy(), torch.tensor(2.0).log(), atol=1e-6, rtol=0)
    assert -25 < bits.log_prob(torch.tensor([1.0, 0.0])) < -15
    bits.log_prob(torch.zeros(2)).backward()
    assert logits.grad.isfinite().all()
