"""Gated linear attention: recurrence, gradient, resets, decays, long sequences, recall."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.modules.trajectory.helpers import (
    assert_no_drift,
    assert_same_gradients,
    assert_same_on_a_gpu,
    random_trials,
    sequence_states,
)
from torchrl_amago.modules import SEQ_MODELS
from torchrl_amago.modules.trajectory import GatedLinearAttentionEncoder
from torchrl_amago.modules.trajectory.kernels import gated_scan as scan_module
from torchrl_amago.modules.trajectory.kernels.gated_scan import (
    gated_linear_attention,
    gated_linear_attention_step,
)
from torchrl_amago.modules.trajectory.linear_attention import GatedLinearAttention


def build(seed=0, **options) -> GatedLinearAttentionEncoder:
    torch.manual_seed(seed)
    defaults = {"d_model": 16, "num_heads": 2, "num_layers": 2}
    return GatedLinearAttentionEncoder(4, **{**defaults, **options})


def scan_inputs(batch, steps, heads=2, decay=1.0, dtype=torch.float64):
    q, k = (torch.randn(batch, steps, heads, 3, dtype=dtype) for _ in range(2))
    v = torch.randn(batch, steps, heads, 2, dtype=dtype)
    log_decay = -decay * torch.rand(batch, steps, heads, dtype=dtype)
    return [z.requires_grad_() for z in (q, k, v, log_decay)]


def scan_by_definition(q, k, v, log_decay, is_init=None):
    state, outputs = q.new_zeros(len(q), q.shape[2], q.shape[3], v.shape[3]), []
    for t in range(q.shape[1]):
        if is_init is not None:
            state = torch.where(is_init[:, t, None, None, None], 0.0, state)
        written = torch.einsum("bhk,bhv->bhkv", k[:, t], v[:, t])
        state = log_decay[:, t].exp()[..., None, None] * state + written
        outputs.append(torch.einsum("bhk,bhkv->bhv", q[:, t], state))
    return torch.stack(outputs, 1)


# --- the scan ---


def test_scan_by_hand():
    key = torch.eye(2).view(1, 2, 1, 2)[:, [0, 1, 0]]
    value = torch.tensor([8.0, 5.0, 1.0]).view(1, 3, 1, 1)
    half = torch.full((1, 3, 1), 0.5).log()
    out = gated_linear_attention(key, key, value, half)
    torch.testing.assert_close(out.flatten(), torch.tensor([8.0, 5.0, 3.0]))
    out = gated_linear_attention(key, key, value, half, torch.tensor([[True, False, True]]))
    torch.testing.assert_close(out.flatten(), torch.tensor([8.0, 5.0, 1.0]))


@given(
    batch=st.integers(1, 4),
    steps=st.integers(1, 140),
    reset_fraction=st.sampled_from([0.0, 0.02, 0.5]),
    decay=st.sampled_from([0.01, 1.0, 50.0]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_scan_is_the_recurrence(batch, steps, reset_fraction, decay, seed):
    torch.manual_seed(seed)
    inputs, is_init = (
        scan_inputs(batch, steps, decay=decay),
        torch.rand(batch, steps) < reset_fraction,
    )
    expected = scan_by_definition(*inputs, is_init)
    torch.testing.assert_close(gated_linear_attention(*inputs, is_init), expected)
    state = torch.zeros(batch, 2, 3, 2, dtype=torch.float64)
    for t in range(steps):
        state.masked_fill_(is_init[:, t, None, None, None], 0.0)
        out = gated_linear_attention_step(*(z[:, t] for z in inputs), state)
        torch.testing.assert_close(out, expected[:, t])


@pytest.mark.parametrize("reset_fraction", [None, 0.3])
def test_gradient_of_the_scan(monkeypatch, reset_fraction):
    monkeypatch.setattr(scan_module, "_CHUNK_STEPS", 4)
    torch.manual_seed(0)
    inputs = scan_inputs(1, 11)
    is_init = None if reset_fraction is None else torch.rand(1, 11) < reset_fraction
    assert torch.autograd.gradcheck(lambda *z: gated_linear_attention(*z, is_init), inputs)


@pytest.mark.parametrize("decay", [0.01, 30.0])
def test_gradient_over_many_chunks_is_that_of_the_recurrence(decay):
    torch.manual_seed(1)
    inputs, is_init = scan_inputs(2, 150, decay=decay), torch.rand(2, 150) < 0.03
    assert_same_gradients(gated_linear_attention, scan_by_definition, inputs, is_init)


def test_strong_decays_neither_overflow_nor_make_nan():
    inputs = scan_inputs(1, 70, decay=1e6, dtype=torch.float32)
    out = gated_linear_attention(*inputs)
    out.sum().backward()
    for z in (out, *(z.grad for z in inputs)):
        assert z.isfinite().all()


@pytest.mark.parametrize("strong", [-20.0, -1e2, -1e4])
@torch.no_grad()
def test_a_strong_decay_leaves_later_ones_their_digits(strong):
    torch.manual_seed(0)
    inputs = scan_inputs(4, 64, dtype=torch.float32)
    inputs[-1].fill_(-1e-3)[:, [3, 40]] = strong
    expected = scan_by_definition(*(z.double() for z in inputs)).float()
    torch.testing.assert_close(gated_linear_attention(*inputs), expected, rtol=1e-5, atol=1e-5)


def test_bfloat16_products_keep_the_state_in_float32():
    torch.manual_seed(0)
    inputs = scan_inputs(2, 100, dtype=torch.float32)
    low = [z.detach().bfloat16().requires_grad_() for z in inputs[:3]]
    outs = [gated_linear_attention(*inputs), gated_linear_attention(*low, inputs[3])]
    assert outs[1].dtype == torch.float32
    grads = [
        torch.autograd.grad(out.square().sum(), [*qkv, inputs[3]])
        for out, qkv in zip(outs, (inputs[:3], low), strict=True)
    ]
    for exact, rounded in zip((outs[0], *grads[0]), (outs[1], *grads[1]), strict=True):
        error = (rounded.float() - exact).norm() / exact.norm()
        assert error < 2e-2


def test_backward_holds_neither_scores_nor_states_of_all_steps():
    q, k, v, log_decay = scan_inputs(2, 640, 4, dtype=torch.float32)
    out = gated_linear_attention(q, k, v, log_decay)
    saved = sum(z.nbytes for z in out.grad_fn.saved_tensors if z is not None)
    inputs = sum(z.nbytes for z in (q, k, v, log_decay))
    assert saved < 1.1 * inputs


# --- the layer ---


def test_layer_by_definition():
    """Written out with whole matrices, without chunks, for one trial per row."""
    torch.manual_seed(0)
    layer, x = GatedLinearAttention(12, 3), torch.randn(2, 50, 12)
    q, k, v, gate = layer.qkvg(x).unflatten(-1, (4, 3, 4)).unbind(-3)
    decay, write = layer.gates(x).sigmoid().chunk(2, -1)
    k = k / k.norm(dim=-1, keepdim=True)
    total = decay.log().cumsum(1)
    left = (total[:, :, None] - total[:, None]).exp()  # of step j's write, at step i
    left = torch.where(torch.ones(50, 50).tril().bool()[..., None], left, 0.0)
    out = torch.einsum("bihk,bjhk,bijh,bjh,bjhv->bihv", q, k, left, write, v)
    out = layer.norm.scale * out / (out.square().mean(-1, keepdim=True) + 1e-3).sqrt()
    expected = layer.out_proj((out * gate * gate.sigmoid()).flatten(-2))
    torch.testing.assert_close(layer(x), expected, rtol=1e-4, atol=1e-5)


def test_gradient_of_the_layer():
    torch.manual_seed(0)
    layer = GatedLinearAttention(4, 2).double()
    x = torch.randn(2, 9, 4, dtype=torch.float64, requires_grad=True)
    is_init = torch.rand(2, 9) < 0.3

    def run(x, *values):
        named = dict(zip(dict(layer.named_parameters()), values, strict=True))
        return torch.func.functional_call(layer, named, (x, is_init))

    assert torch.autograd.gradcheck(run, (x, *layer.parameters()))


@pytest.mark.parametrize("num_heads", [1, 4])
def test_initial_decays_cover_episodes_and_trials(num_heads):
    bias = GatedLinearAttention(16, num_heads).gates.bias.detach()
    time_constants = -1.0 / torch.nn.functional.logsigmoid(bias[:num_heads].double())
    torch.testing.assert_close(time_constants[0].item(), 4096.0, rtol=1e-3, atol=0.0)
    if num_heads > 1:
        torch.testing.assert_close(time_constants[-1].item(), 8.0, rtol=1e-3, atol=0.0)
        ratios = time_constants[:-1] / time_constants[1:]
        torch.testing.assert_close(ratios, ratios[:1].expand_as(ratios), rtol=1e-3, atol=0.0)
    assert (bias[num_heads:] == 0).all()


# --- the encoder ---


def test_is_named_in_make_policy():
    assert SEQ_MODELS["linear_attention"] is GatedLinearAttentionEncoder
    encoder = GatedLinearAttentionEncoder(8)
    assert (encoder.output_size, len(encoder.blocks)) == (256, 3)
    assert encoder.blocks[0].ff.hidden[0].out_features == 1024


def test_no_drift_over_long_trials():
    assert_no_drift(build().eval())


@torch.no_grad()
def test_memory_is_moved_in_place_and_has_constant_size():
    encoder = build().eval()
    memory = encoder.new_memory(3, torch.device("cpu"), torch.bfloat16)
    ((first,), (second,)) = memory.layers
    assert first.shape == second.shape == (3, 2, 8, 8)
    encoder.step(torch.ones(3, 4), torch.zeros(3), memory)
    assert first.dtype == torch.float32
    assert first.abs().sum() > 0
    assert second.abs().sum() > 0
    first.fill_(torch.nan)
    memory.clear(torch.tensor([True, False, True]))
    assert (first[[0, 2]] == 0).all()
    assert first[1].isnan().all()


@torch.no_grad()
def test_the_first_step_is_held_over_a_corridor():
    """Before any learning: the slow heads hold it over 1000 steps, fast ones alone don't."""
    encoder = build(d_model=32, num_heads=4).eval()
    x = torch.zeros(2, 1000, 4)
    x[..., 1] = 1.0
    x[:, 0, 0] = torch.tensor([1.0, -1.0])
    change = []
    for _ in range(2):
        one, other = encoder.sequence(x, torch.zeros(2, 1000), None)[:, -1]
        change.append((one - other).norm() / one.norm())
        for block in encoder.blocks:
            block.attention.gates.bias[:4] = block.attention.gates.bias[3]  # the fastest head's
    assert change[0] > 1e-3
    assert change[1] < 1e-6


@pytest.mark.parametrize("kind", ["dropout_ff", "dropout_emb"])
def test_dropouts(kind):
    encoder = build(**{"dropout_ff": 0.0, "dropout_emb": 0.0, kind: 0.5})
    trials = random_trials(2, 5)
    assert not torch.equal(sequence_states(encoder, *trials), sequence_states(encoder, *trials))
    encoder.eval()
    assert torch.equal(sequence_states(encoder, *trials), sequence_states(encoder, *trials))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    assert_same_on_a_gpu(build().eval())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_heads": 3}, "num_heads must divide d_model, got num_heads=3, d_model=16"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"d_ff": 0}, "d_ff must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"activation": "sin"}, "activation must be one of"),
        ({"norm": "batch"}, "norm must be one of"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        build(**options)
