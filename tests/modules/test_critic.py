"""Critic ensembles against plain ones that put every row's input together, in float64."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict, TensorDictParams
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from torchrl_amago import _cpu
from torchrl_amago.modules.critic import (
    ActionCritic,
    CriticEnsemble,
    DiscreteCritic,
    discount_feature,
)

DISCOUNTS = (0.5, 0.9, 0.999)
D, A, C, G = 6, 2, 3, len(DISCOUNTS)
ACTIVATIONS = {"leaky_relu": F.leaky_relu, "relu": F.relu, "gelu": F.gelu, "mish": F.mish}


def member(critic: CriticEnsemble, c: int, x: Tensor, activation: str) -> Tensor:
    """One member's MLP."""
    for index, layer in enumerate(critic.hidden):
        x = x @ layer.weight[c] + layer.bias[c]
        if critic.norm == "layer" or (critic.norm == "first" and index == 0):
            x = (x - x.mean(-1, keepdim=True)) / (
                x.var(-1, correction=0, keepdim=True) + 1e-5
            ).sqrt()
        x = ACTIVATIONS[activation](x)
    return x @ critic.out.weight[c] + critic.out.bias[c]


def plain_action_values(
    critic: ActionCritic, state: Tensor, action: Tensor, activation: str
) -> Tensor:
    """For each critic and discount the input is put together, as in the equation."""
    batch = action.shape[:-2]
    values = []
    for c in range(critic.num_critics):
        for g, discount in enumerate(critic.discounts.tolist()):
            a = action[..., 0 if action.shape[-2] == 1 else g, :]
            a = a if critic.clip_actions is None else a.clamp(-0.999, 0.999)
            feature = torch.full((*batch, 1), math.log(1 + 1 / (1 - discount)), dtype=a.dtype)
            x = torch.cat([state.expand(*batch, -1), feature, a], -1)
            values.append(member(critic, c, x, activation))
    value = torch.stack(values, -2).unflatten(-2, (critic.num_critics, -1))
    return value if critic.num_outputs else value.squeeze(-1)


def gradients(value: Tensor, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    weight = torch.linspace(-1, 2, value.numel(), dtype=value.dtype).view(value.shape)
    return torch.autograd.grad((weight * value).sum(), inputs)


def assert_all_close(got, expected, **tolerances):
    for x, y in zip(got, expected, strict=True):
        torch.testing.assert_close(x, y, **tolerances)


@given(
    batch=st.lists(st.integers(1, 4), max_size=2),
    samples=st.lists(st.integers(1, 3), max_size=2),
    shared=st.booleans(),
    num_outputs=st.sampled_from([None, 1, 4]),
    num_layers=st.integers(1, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    norm=st.sampled_from(["none", "first", "layer"]),
    clip=st.sampled_from([0.999, None]),
    rows_at_once=st.sampled_from([1, 12, 2048]),
)
def test_equals_the_plain_ensemble(
    batch, samples, shared, num_outputs, num_layers, activation, norm, clip, rows_at_once
):
    critic = ActionCritic(
        D,
        A,
        DISCOUNTS,
        C,
        clip_actions=clip,
        num_outputs=num_outputs,
        hidden_size=7,
        num_layers=num_layers,
        activation=activation,
        norm=norm,
    ).double()
    state = torch.randn(*batch, D, dtype=torch.float64, requires_grad=True)
    shape = (*samples, *batch, 1 if shared else G, A)
    action = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_cpu, "CHUNK_ROWS", rows_at_once)
        value = critic(state, action)
    event = () if num_outputs is None else (num_outputs,)
    assert value.shape == (*samples, *batch, C, G, *event)
    expected = plain_action_values(critic, state, action, activation)
    torch.testing.assert_close(value, expected)
    inputs = [state, action, *critic.parameters()]
    assert_all_close(gradients(value, inputs), gradients(expected, inputs))


def test_gradients_numerically():
    critic = ActionCritic(D, A, DISCOUNTS, C, hidden_size=4, activation="gelu").double()
    state = torch.randn(2, D, dtype=torch.float64, requires_grad=True)
    action = torch.rand(3, 2, G, A, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(critic, (state, action))
    assert torch.autograd.gradgradcheck(critic, (state, action))


def test_discount_feature_by_hand():
    """Horizons of 1, 10 and 1000 steps, and of no more than a million."""
    discounts = torch.tensor([0.0, 0.9, 0.999, 1.0], dtype=torch.float64)
    expected = torch.tensor([2.0, 11.0, 1001.0, 1_000_001.0], dtype=torch.float64).log()
    torch.testing.assert_close(discount_feature(discounts), expected)


def test_actions_are_clipped():
    critic, state = ActionCritic(D, 1, [0.9], hidden_size=8), torch.randn(1, D)
    action = torch.tensor([-2.0, -0.9995, 0.5, 1.0]).view(4, 1, 1, 1).requires_grad_()
    value = critic(state, action)
    bounded = critic(state, action.clamp(-0.999, 0.999))
    assert torch.equal(value, bounded)
    (grad,) = gradients(value, [action])
    assert (grad.flatten() != 0).tolist() == [False, False, True, False]
    free = ActionCritic(D, 1, [0.9], hidden_size=8, clip_actions=None)
    assert (gradients(free(state, action), [action])[0] != 0).all()


def test_gradient_of_the_action_alone():
    """Weights and states may be constants, as in an actor's loss."""
    critic = ActionCritic(D, A, DISCOUNTS, hidden_size=8)
    state, action = torch.randn(5, D), torch.randn(2, 5, G, A, requires_grad=True)
    (expected,) = gradients(critic(state, action), [action])
    critic.requires_grad_(False)
    (grad,) = gradients(critic(state, action), [action])
    torch.testing.assert_close(grad, expected)


@pytest.mark.parametrize("activation", ["leaky_relu", "relu"])
@pytest.mark.parametrize("rows_at_once", [1000, 10**6])
def test_memory(activation, rows_at_once, monkeypatch):
    """Kept for the backward pass: one tensor of all rows per hidden layer, no input of all rows."""
    hidden, steps, samples, layers = 32, 50, 5, 3
    critic = ActionCritic(
        64, A, DISCOUNTS, C, hidden_size=hidden, num_layers=layers, activation=activation
    )
    monkeypatch.setattr(_cpu, "CHUNK_ROWS", rows_at_once)
    inputs = [torch.randn(steps, 64), torch.randn(samples, steps, G, A)]
    known = {x.untyped_storage().data_ptr() for x in [*inputs, *critic.parameters()]}
    kept: dict[int, Tensor] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        value = critic(*inputs)
    num_bytes = sum(x.untyped_storage().nbytes() for p, x in kept.items() if p not in known)
    rows = samples * steps * G
    activations = 4 * layers * C * rows * hidden
    small = 4 * rows * (1 + 2 * A) + rows * A  # discount and action, the action clipped and how
    assert activations <= num_bytes <= activations + small + 10_000
    value.sum().backward()


@pytest.mark.parametrize("num_outputs", [None, 1, 4])
def test_discrete_critic_by_hand(num_outputs):
    """Its output holds discounts, then actions, then the numbers of a value."""
    critic = DiscreteCritic(D, 5, G, C, num_outputs=num_outputs, hidden_size=7).double()
    state = torch.randn(2, 3, D, dtype=torch.float64)
    event = () if num_outputs is None else (num_outputs,)
    rows = [member(critic, c, state, "leaky_relu") for c in range(C)]
    expected = torch.stack(rows, 2).unflatten(-1, (G, 5, *event))
    torch.testing.assert_close(critic(state), expected)
    assert critic.event_shape == event


def make_critics(num_outputs: int | None = None, **options) -> dict[str, CriticEnsemble]:
    options |= {"num_outputs": num_outputs, "hidden_size": 8}
    return {
        "discrete": DiscreteCritic(D, 5, G, C, **options),
        "action": ActionCritic(D, A, DISCOUNTS, C, **options),
    }


INPUTS = {
    "discrete": lambda *batch: (torch.randn(*batch, D),),
    "action": lambda *batch: (torch.randn(*batch, D), torch.randn(*batch, G, A)),
}


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("num_outputs", [None, 4])
def test_set_output_bias(kind, num_outputs):
    """The first prediction of every member, discount and action, where states say nothing."""
    critic = make_critics(num_outputs)[kind]
    bias = torch.arange(1.0, 1.0 + (num_outputs or 1))
    pointer = critic.out.bias.data_ptr()
    critic.set_output(bias=bias)
    critic.out.weight.data.zero_()
    value = critic(*INPUTS[kind](4))
    expected = bias if num_outputs else bias.squeeze()
    assert torch.equal(value, expected.expand_as(value))
    assert critic.out.bias.data_ptr() == pointer
    assert critic.out.bias.requires_grad
    with pytest.raises(RuntimeError, match="shape|size"):
        critic.set_output(bias=torch.zeros(2))


@pytest.mark.parametrize("cls", [ActionCritic, DiscreteCritic])
def test_set_output_slope(cls):
    """All outputs of a value vary together, and each value, member and hidden unit by itself."""
    actions = dict(discounts=DISCOUNTS) if cls is ActionCritic else dict(num_discounts=G)
    critic = cls(D, A, num_critics=C, num_outputs=5, hidden_size=8, **actions)
    slope = torch.linspace(-2, 2, 5)
    critic.set_output(slope=slope)
    first_CHV1, *_, last_CHV1 = critic.out.weight.unflatten(-1, (-1, 5)).split(1, -1)
    torch.testing.assert_close(last_CHV1, -first_CHV1)
    assert first_CHV1.unique().numel() == first_CHV1.numel()
    assert first_CHV1.abs().max() <= 2 / math.sqrt(8)
    assert critic.out.weight.requires_grad
    with pytest.raises(RuntimeError, match="size"):
        critic.set_output(slope=torch.zeros(2))


def test_action_gain():
    torch.manual_seed(0)
    plain = ActionCritic(D, A, DISCOUNTS, C, hidden_size=8)
    torch.manual_seed(0)
    gained = ActionCritic(D, A, DISCOUNTS, C, hidden_size=8, action_gain=4.0)
    ratio = gained.hidden[0].weight / plain.hidden[0].weight
    torch.testing.assert_close(ratio[:, :-A], torch.ones_like(ratio[:, :-A]))
    torch.testing.assert_close(ratio[:, -A:], torch.full_like(ratio[:, -A:], 4.0))


@pytest.mark.parametrize("kind", INPUTS)
def test_functional_calls(kind):
    """With other parameters put in, as losses do for target networks, also many at once."""
    critics = [make_critics()[kind] for _ in range(2)]
    inputs = INPUTS[kind](4)
    module = copy.deepcopy(critics[0])
    for critic in critics:
        with TensorDictParams(TensorDict.from_module(critic)).to_module(module):
            assert torch.equal(module(*inputs), critic(*inputs))
    stacked, buffers = torch.func.stack_module_state(critics)

    def call(params, buffers):
        return torch.func.functional_call(module, (params, buffers), inputs)

    values = torch.func.vmap(call)(stacked, buffers)
    assert_all_close(values, [critic(*inputs) for critic in critics])


@pytest.mark.parametrize("kind", INPUTS)
def test_dropout(kind):
    critic = make_critics(dropout=0.5)[kind]
    inputs = INPUTS[kind](50)
    assert not torch.equal(critic(*inputs), critic(*inputs))
    gradients(critic(*inputs), list(critic.parameters()))
    critic.eval()
    assert torch.equal(critic(*inputs), critic(*inputs))


@pytest.mark.parametrize("kind", INPUTS)
def test_compiles_without_graph_break(kind):
    """Values and gradients, and nothing is compiled anew for more steps once sizes are dynamic."""
    critic = make_critics()[kind]
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(critic, backend=counter, fullgraph=True)
    for steps in (4, 6, 9, 13):
        inputs = [x.requires_grad_() for x in INPUTS[kind](steps)]
        leaves = [*inputs, *critic.parameters()]
        got, expected = compiled(*inputs), critic(*inputs)
        torch.testing.assert_close(got, expected)
        assert_all_close(gradients(got, leaves), gradients(expected, leaves))
    assert counter.frame_count <= 2


@pytest.mark.parametrize("kind", INPUTS)
def test_autocast(kind):
    # A smooth activation: a leaky one's slope jumps where rounding changes a sign.
    critic, inputs = make_critics(activation="gelu")[kind], INPUTS[kind](40)
    with torch.autocast("cpu"):
        value = critic(*inputs)
        grads = gradients(value.float(), list(critic.parameters()))
    assert value.dtype == torch.bfloat16
    expected = critic(*inputs)
    torch.testing.assert_close(value.float(), expected, rtol=2e-2, atol=2e-2)
    for grad, exact in zip(grads, gradients(expected, list(critic.parameters())), strict=True):
        assert (grad - exact).norm() <= 2e-2 * exact.norm()


@pytest.mark.parametrize("kind", INPUTS)
def test_a_step_without_numbers_leaves_the_others_alone(kind):
    """Padding may hold anything."""
    critic, inputs = make_critics()[kind], INPUTS[kind](4)
    whole = critic(*inputs)
    inputs[-1][2] = torch.nan
    broken = critic(*inputs)
    torch.testing.assert_close(broken[[0, 1, 3]], whole[[0, 1, 3]])
    assert broken[2].isnan().all()


def test_actions_are_read_in_the_critics_precision():
    critic = ActionCritic(D, A, DISCOUNTS, C, hidden_size=8).double()
    assert critic(torch.randn(3, D).double(), torch.randn(3, 1, A)).dtype == torch.float64


def test_no_steps_and_no_samples():
    critic = ActionCritic(D, A, DISCOUNTS, C, num_outputs=4, hidden_size=8)
    assert critic(torch.zeros(0, D), torch.zeros(2, 0, G, A)).shape == (2, 0, C, G, 4)
    assert critic(torch.zeros(5, D), torch.zeros(0, 5, G, A)).shape == (0, 5, C, G, 4)


def test_discounts_travel_with_the_state_dict():
    one, other = (ActionCritic(D, A, [g], C, hidden_size=8) for g in (0.5, 0.99))
    other.load_state_dict(one.state_dict())
    inputs = torch.randn(3, D), torch.randn(3, 1, A)
    assert torch.equal(other(*inputs), one(*inputs))


@pytest.mark.parametrize(
    ("state", "action"),
    [
        ((4, D + 1), (4, G, A)),
        ((4, D), (4, G + 1, A)),
        ((4, D), (4, G, A + 1)),
        ((4, D), (5, G, A)),
        ((4, D), (4, A)),
        ((4, D), (A,)),
        ((2, 4, D), (4, G, A)),
    ],
)
def test_shapes_that_do_not_fit(state, action):
    critic = ActionCritic(D, A, DISCOUNTS, C, hidden_size=8)
    with pytest.raises(
        ValueError, match=r"reads states \[\*B, 6\] and actions \[\*K, \*B, 3 or 1, 2\]"
    ):
        critic(torch.zeros(state), torch.zeros(action))


def test_wrong_arguments():
    with pytest.raises(ValueError, match="num_critics must be at least 1, got 0"):
        ActionCritic(D, A, DISCOUNTS, num_critics=0)
    with pytest.raises(ValueError, match="num_outputs must be at least 1, got 0"):
        DiscreteCritic(D, 5, G, num_outputs=0)
    with pytest.raises(ValueError, match=r"discount must be in \[0, 1\], got 1.1"):
        ActionCritic(D, A, (0.9, 1.1))
    with pytest.raises(ValueError, match="clip_actions must be positive, got 0"):
        ActionCritic(D, A, DISCOUNTS, clip_actions=0)
    with pytest.raises(ValueError, match="action_gain must be positive, got 0"):
        ActionCritic(D, A, DISCOUNTS, action_gain=0)
    with pytest.raises(
        ValueError, match="norm must be one of 'none', 'first', 'layer', got 'batch'"
    ):
        DiscreteCritic(D, 5, G, norm="batch")
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.0"):
        DiscreteCritic(D, 5, G, dropout=1.0)
