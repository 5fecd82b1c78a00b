from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn

from torchrl_amago.modules.critic import DiscreteCritic
from torchrl_amago.modules.trajectory import TransformerEncoder
from torchrl_amago.trainers import FiniteOptimizationStepper, make_optimizer, make_schedule
from torchrl_amago.trainers.optim import is_decayed


def test_what_decays():
    encoder = TransformerEncoder(4, context_length=3, d_model=8, num_heads=2, num_layers=1)
    critic = DiscreteCritic(4, num_actions=2, num_discounts=3)
    named = [*encoder.named_parameters(), *critic.named_parameters()]
    decayed = {name for name, p in named if is_decayed(name, p)}
    assert {"blocks.0.qkv.weight", "hidden.0.weight", "out.weight"} <= decayed
    # Shifts and scales of two dimensions: head_scale is [H, 1], hidden.0.bias [C, out].
    others = {"blocks.0.head_scale", "blocks.0.qkv.gamma", "blocks.0.norm_ff.weight"}
    assert others | {"hidden.0.bias"} <= {name for name, _ in named} - decayed
    assert not any(name.endswith("bias") for name in decayed)


def test_decay_shrinks_weights_only():
    net = nn.Linear(2, 2)
    for p in net.parameters():
        nn.init.ones_(p)
        p.grad = torch.zeros_like(p)
    make_optimizer(net, learning_rate=0.1, weight_decay=0.5).step()
    torch.testing.assert_close(net.weight, torch.full((2, 2), 1 - 0.1 * 0.5))
    torch.testing.assert_close(net.bias, torch.ones(2))


def test_decay_all():
    (group,) = make_optimizer(nn.Linear(2, 2), decay_all=True).param_groups
    assert group["weight_decay"] == 1e-3
    assert len(group["params"]) == 2


def test_frozen_parameters_are_left_out():
    net = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    net[0].requires_grad_(False)
    assert sum(len(g["params"]) for g in make_optimizer(net).param_groups) == 2
    net[1].requires_grad_(False)
    with pytest.raises(ValueError, match="empty parameter list"):
        make_optimizer(net)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((4,), [2.0, 4.0, 6.0, 8.0, 8.0, 8.0]), ((0,), [8.0] * 6), ((1, 4, 0.25), [8, 8, 6, 4, 2, 2])],
)
def test_the_rate_rises_from_one_nth_then_falls(arguments, expected):
    optimizer = make_optimizer(nn.Linear(1, 1), learning_rate=8.0)
    scheduler, rates = make_schedule(optimizer, *arguments), []
    for _ in expected:
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        scheduler.step()
    assert rates == [[rate, rate] for rate in expected]
    with pytest.raises(ValueError, match="warmup_updates must be at least 1, got -1"):
        make_schedule(optimizer, -1)


@pytest.mark.parametrize("weight_decay", [-1.0, float("nan"), float("inf")])
def test_weight_decay_out_of_range(weight_decay):
    with pytest.raises(ValueError, match="weight_decay must be positive"):
        make_optimizer(nn.Linear(1, 1), weight_decay=weight_decay)


@pytest.mark.parametrize("optimizer", ["fused AdamW", "SGD"])
def test_updates_of_any_optimizer_and_of_weights_frozen_later(optimizer):
    linear = nn.Linear(2, 2)
    mean = TensorDictModule(torch.mean, ["y"], ["loss_y"])
    loss = TensorDictSequential(TensorDictModule(linear, ["x"], ["y"]), mean)
    chosen = make_optimizer(loss) if optimizer != "SGD" else torch.optim.SGD(loss.parameters(), 0.1)
    trainer = SimpleNamespace(loss_module=loss, optimizer=chosen, replay_buffer=None)
    linear.bias.requires_grad_(False)
    weight, bias = linear.weight.detach().clone(), linear.bias.clone()
    FiniteOptimizationStepper().step(trainer, TensorDict(x=torch.tensor([1.0, -1.0])))
    assert (linear.weight - weight).sign().equal(torch.tensor([[-1.0, 1.0]] * 2))
    assert linear.bias.equal(bias)
