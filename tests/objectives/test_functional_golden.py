"""n-step targets and advantage filters against recorded numbers."""

from __future__ import annotations

import pytest
import torch

from tests.golden_utils import assert_close, load
from torchrl_amago.objectives.functional import (
    binary_filter,
    exponential_filter,
    leaky_relu_filter,
    n_step_target,
)


@pytest.mark.parametrize("n", [1, 3, 5, 10])
def test_n_step_target(n):
    case = load("functional/nstep_return")
    reward, done, value = (case[name].squeeze(2, -1) for name in ("r", "d", "q"))
    mask = case["mask"].squeeze(2, -1).bool()
    target = n_step_target(reward, done.bool(), value, case["gamma"].squeeze(-1), mask, n)
    real = mask.expand_as(target)
    assert real.any()
    assert not real.all()
    assert_close(target[real], case[f"out/n{n}"].squeeze(2, -1)[real])


def _bounds(setting: dict, name: str, default: tuple) -> tuple:
    low, high = default
    return setting.get(f"clip_{name}_low", low), setting.get(f"clip_{name}_high", high)


@pytest.mark.parametrize("name", ["exp", "exp_b", "exp_c"])
def test_exponential_filter(name):
    case = load("functional/filters")
    setting = case.hyperparameters["settings"][name]
    advantage = case["adv"] if name == "exp_b" else case["adv"].clamp(-15, 15)
    weight = exponential_filter(
        advantage,
        beta=setting.get("beta", 1.0),
        advantage_range=_bounds(setting, "adv", (None, None)),
        weight_range=_bounds(setting, "weights", (1e-7, None)),
    )
    assert_close(weight, case[f"out/{name}"])


@pytest.mark.parametrize("name", ["leaky", "leaky_b"])
def test_leaky_relu_filter(name):
    case = load("functional/filters")
    setting = case.hyperparameters["settings"][name]
    weight = leaky_relu_filter(
        case["adv"],
        beta=setting.get("beta", 2.0),
        hinge=setting.get("tau", 1e-2),
        negative_slope=setting.get("neg_slope", 0.05),
        weight_at_zero=setting.get("target_f0", 1e-2),
        weight_range=_bounds(setting, "weights", (1e-7, 10.0)),
        add_binary=setting.get("add_binary", True),
    )
    assert_close(weight, case[f"out/{name}"])


@pytest.mark.parametrize("name", ["binary", "binary_t"])
def test_binary_filter(name):
    case = load("functional/filters")
    weight = binary_filter(case["adv"], **case.hyperparameters["settings"][name])
    assert torch.equal(weight.bool(), case[f"out/{name}"])
