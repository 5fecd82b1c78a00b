"""Every distribution against recorded numbers, parameters' order and bounds included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torchrl.data import Binary, Bounded, Categorical

from tests.golden_utils import assert_close, cases, load
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules.distributions import (
    Bernoulli,
    Beta,
    Discrete,
    TanhGaussian,
    TanhMixture,
)
from torchrl_amago.modules.distributions import _noise as noise
from torchrl_amago.modules.distributions.continuous import softplus_bounded, tanh_bounded


def _continuous(size: int) -> ActionSpace:
    return ActionSpace.from_spec(Bounded(-1.0, 1.0, shape=(size,)))


def _options(case, *names: str) -> dict:
    """Those of the recorded arguments that differ from the defaults, under our names."""
    hp = case.hyperparameters
    options = {name: hp[name] for name in names if name in hp}
    if "std_activation" in hp:
        options["std_bound"] = hp["std_activation"]
    if "clip_actions_on_log_prob" in hp:
        options["clip_actions"] = tuple(hp["clip_actions_on_log_prob"])
    return options


def _of_each_number(policy_dist, case, num_params: int) -> torch.Tensor:
    """Log-probability of each number of the action, as the reference gives it."""
    each = replace(policy_dist, space=_continuous(1))
    params = torch.stack(case["vec"].chunk(num_params, -1), -1)
    return each(params).log_prob(case["action"].unsqueeze(-1))


def test_bounded_positive_numbers():
    case = load("functional/std_activations")
    hp = case.hyperparameters
    assert_close(tanh_bounded(case["x"], hp["low"], hp["high"]), case["out/tanh_bounded"])
    low, high = hp["softplus_low"], hp["softplus_high"]
    assert_close(softplus_bounded(case["x"], low), case["out/softplus_no_high"])
    assert_close(softplus_bounded(case["x"], low, high), case["out/softplus_high"])


@pytest.mark.parametrize("case", cases("functional/dist_tanh_gaussian*"), ids=str)
def test_tanh_gaussian(case, monkeypatch):
    space = _continuous(case.hyperparameters["d_action"])
    policy_dist = TanhGaussian(space, **_options(case, "std_low", "std_high"))
    params = case["vec"].requires_grad_()
    dist = policy_dist(params)
    assert_close(dist.scale, case["out/std"])
    assert_close(dist.deterministic_sample, case["out/mean"])
    log_prob = dist.log_prob(case["action"])
    assert_close(log_prob, case["out/log_prob"].sum(-1))
    assert_close(_of_each_number(policy_dist, case, 2), case["out/log_prob"])
    (grad,) = torch.autograd.grad(log_prob.sum(), params)
    assert_close(grad, case["out/grad_vec_of_sum_log_prob"])
    monkeypatch.setattr(noise, "standard_normal", lambda shape, like: case["eps"])
    assert_close(dist.rsample(), case["out/sample_from_eps"])
    assert_close(dist.sample(), case["out/sample_from_eps"])


@pytest.mark.parametrize("case", cases("functional/dist_beta*"), ids=str)
def test_beta(case):
    space = _continuous(case.hyperparameters["d_action"])
    names = ("alpha_low", "alpha_high", "beta_low", "beta_high")
    policy_dist = Beta(space, **_options(case, *names))
    params = case["vec"].requires_grad_()
    dist = policy_dist(params)
    assert_close(dist.unit.concentration1, case["out/alpha"])
    assert_close(dist.unit.concentration0, case["out/beta"])
    assert_close(dist.deterministic_sample, case["out/mean"])
    log_prob = dist.log_prob(case["action"])
    assert_close(log_prob, case["out/log_prob"].sum(-1))
    assert_close(_of_each_number(policy_dist, case, 2), case["out/log_prob"])
    (grad,) = torch.autograd.grad(log_prob.sum(), params)
    assert_close(grad, case["out/grad_vec_of_sum_log_prob"])


@pytest.mark.parametrize("case", cases("functional/dist_gmm*"), ids=str)
def test_tanh_mixture(case):
    hp = case.hyperparameters
    options = _options(case, "std_low", "std_high")
    policy_dist = TanhMixture(_continuous(hp["d_action"]), num_modes=hp["gmm_modes"], **options)
    params = case["vec"].requires_grad_()
    assert policy_dist.num_params == params.shape[-1]
    dist = policy_dist(params)
    assert_close(dist.deterministic_sample, case["out/mean"])
    log_prob = dist.log_prob(case["action"])
    assert_close(log_prob, case["out/log_prob"].squeeze(-1))
    (grad,) = torch.autograd.grad(log_prob.sum(), params)
    assert_close(grad, case["out/grad_vec_of_sum_log_prob"])


def test_bernoulli():
    case = load("functional/dist_multibinary")
    space = ActionSpace.from_spec(Binary(case.hyperparameters["d_action"]))
    dist = Bernoulli(space)(case["vec"])
    log_prob = dist.log_prob(case["action"])
    assert_close(log_prob, case["out/log_prob"].mean(-1))  # as the reference's loss takes it
    summed = Bernoulli(space, reduce="sum")(case["vec"]).log_prob(case["action"])
    assert_close(summed, case["out/log_prob"].sum(-1))
    assert_close(dist.entropy(), case["out/entropy"].sum(-1))
    assert_close(dist.probs, case["out/mean"])
    assert torch.equal(dist.deterministic_sample, case["out/mean"].round())


@pytest.mark.parametrize("case", cases("functional/dist_discrete*"), ids=str)
def test_discrete(case, monkeypatch):
    hp = case.hyperparameters
    space = ActionSpace.from_spec(Categorical(hp["d_action"]))
    policy_dist = Discrete(space, hp["clip_prob_low"], hp["clip_prob_high"], temperature=0.5)
    params = case["vec"].requires_grad_()
    dist = policy_dist(params)
    assert_close(dist.probs, case["out/probs"])
    assert torch.equal(dist.deterministic_sample.argmax(-1), case["out/argmax"])
    log_prob = dist.log_prob(case["one_hot"])
    assert_close(log_prob, case["out/like_continuous/log_prob_one_hot"])
    assert_close(dist.entropy(), case["out/like_continuous/entropy"])
    clipped = policy_dist.clip_action(case["one_hot"], policy_dist(params.unsqueeze(-2)))
    assert_close(clipped, case["out/action_from_buffer"])
    stored = policy_dist.stored(params)
    assert_close(stored.log_prob(case["action_index"]), case["out/log_prob"])
    (grad,) = torch.autograd.grad(log_prob.sum(), params, retain_graph=True)
    assert_close(grad, case["out/grad_vec_of_sum_log_prob"])
    (grad,) = torch.autograd.grad((dist.probs * case["probs_weight"]).sum(), params)
    assert_close(grad, case["out/grad_vec_of_weighted_probs"])


@pytest.mark.parametrize("case", cases("functional/dist_discrete*"), ids=str)
def test_straight_through_sample(case, monkeypatch):
    hp = case.hyperparameters
    space = ActionSpace.from_spec(Categorical(hp["d_action"]))
    params = case["vec"].requires_grad_()
    dist = Discrete(space, hp["clip_prob_low"], hp["clip_prob_high"], temperature=0.5)(params)
    monkeypatch.setattr(noise, "gumbel", lambda shape, like: case["gumbel"])
    sample = dist.rsample()
    assert_close(sample, case["out/like_continuous/gumbel_hard_sample_tau0.5"])
    (grad,) = torch.autograd.grad((sample * case["probs_weight"]).sum(), params)
    assert_close(grad, case["out/like_continuous/grad_vec_of_weighted_sample"])
