"""Mamba: recurrence, gradient, the kernels' wiring, resets, bad arguments, long sequences."""

from __future__ import annotations

import importlib
import itertools
import math
import sys
from types import ModuleType

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from tests.modules.trajectory.helpers import (
    assert_no_drift,
    assert_same_gradients,
    assert_same_on_a_gpu,
)
from torchrl_amago.modules import SEQ_MODELS
from torchrl_amago.modules.trajectory import MambaEncoder
from torchrl_amago.modules.trajectory.kernels import mamba_scan as scan_module
from torchrl_amago.modules.trajectory.kernels.mamba_scan import selective_scan, selective_step
from torchrl_amago.modules.trajectory.mamba import MambaBlock, load_kernels


def build(seed=0, **options) -> MambaEncoder:
    torch.manual_seed(seed)
    return MambaEncoder(4, **{"d_model": 16, "num_layers": 2, **options})


def scan_inputs(batch, steps, channels=3, states=2, dtype=torch.float64):
    x, write, read = (torch.randn(batch, steps, n, dtype=dtype) for n in (channels, states, states))
    delta = torch.rand(batch, steps, channels, dtype=dtype)
    rate = -torch.rand(channels, states, dtype=dtype) - 0.1
    return [z.requires_grad_() for z in (x, delta, rate, write, read)]


def scan_by_definition(x, delta, rate, write, read, is_init=None):
    state, outputs = torch.zeros(len(x), *rate.shape, dtype=x.dtype), []
    for t in range(x.shape[1]):
        if is_init is not None:
            state = torch.where(is_init[:, t, None, None], 0.0, state)
        decay = (delta[:, t, :, None] * rate).exp()
        state = decay * state + (delta[:, t] * x[:, t]).unsqueeze(-1) * write[:, t, None]
        outputs.append((state * read[:, t, None]).sum(-1))
    return torch.stack(outputs, 1)


# --- the scan ---


def test_scan_by_hand():
    x, one = torch.tensor([1.0, 0.0, 2.0]).view(1, 3, 1), torch.ones(1, 3, 1)
    rate, read = torch.tensor([[-math.log(4.0)]]), 10 * one
    # Half a step of size: decay 1/2, half of the input written.
    y = selective_scan(x, one / 2, rate, one, read)
    torch.testing.assert_close(y.flatten(), torch.tensor([5.0, 2.5, 11.25]))
    y = selective_scan(x, one / 2, rate, one, read, torch.tensor([[False, False, True]]))
    torch.testing.assert_close(y.flatten(), torch.tensor([5.0, 2.5, 10.0]))


@given(
    batch=st.integers(1, 4),
    steps=st.integers(1, 150),
    reset_fraction=st.sampled_from([0.0, 0.05, 0.5]),
    seed=st.integers(0, 99),
)
@torch.no_grad()
def test_scan_is_the_recurrence(batch, steps, reset_fraction, seed):
    torch.manual_seed(seed)
    inputs, is_init = scan_inputs(batch, steps), torch.rand(batch, steps) < reset_fraction
    expected = scan_by_definition(*inputs, is_init)
    torch.testing.assert_close(selective_scan(*inputs, is_init), expected)
    state = torch.zeros(batch, 2, 3, dtype=torch.float64)
    x, delta, rate, write, read = inputs
    for t in range(steps):
        state.masked_fill_(is_init[:, t, None, None], 0.0)
        y = selective_step(x[:, t], delta[:, t], rate, write[:, t], read[:, t], state)
        torch.testing.assert_close(y, expected[:, t])


@pytest.mark.parametrize("reset_fraction", [None, 0.3])
def test_gradient_of_the_scan(monkeypatch, reset_fraction):
    monkeypatch.setattr(scan_module, "_SEGMENT_ELEMENTS", 1)  # segments of 4 steps, the last of 3
    torch.manual_seed(0)
    inputs = scan_inputs(2, 11)
    is_init = None if reset_fraction is None else torch.rand(2, 11) < reset_fraction
    assert torch.autograd.gradcheck(lambda *z: selective_scan(*z, is_init), inputs)


def test_gradient_over_many_segments_is_that_of_the_recurrence():
    torch.manual_seed(1)
    inputs, is_init = scan_inputs(2, 200), torch.rand(2, 200) < 0.03
    assert_same_gradients(selective_scan, scan_by_definition, inputs, is_init)


def test_strong_decays_neither_overflow_nor_make_nan():
    inputs = scan_inputs(1, 70, dtype=torch.float32)
    with torch.no_grad():
        inputs[1].mul_(1e6)
        inputs[1][:, ::2] = 0.0
    y = selective_scan(*inputs)
    y.sum().backward()
    for z in (y, *(z.grad for z in inputs)):
        assert z.isfinite().all()


@torch.no_grad()
def test_nan_does_not_cross_the_start_of_a_trial():
    inputs = scan_inputs(2, 40)
    is_init = torch.zeros(2, 40, dtype=torch.bool)
    is_init[1, 20] = True
    expected = selective_scan(*inputs, is_init)
    inputs[0][1, 10] = torch.nan
    found = selective_scan(*inputs, is_init)
    assert found[1, 10:20].isnan().all()
    assert torch.equal(found[0], expected[0])
    assert torch.equal(found[1, 20:], expected[1, 20:])


def test_backward_holds_no_states_of_all_steps():
    inputs = scan_inputs(2, 640, 32, 16, torch.float32)
    y = selective_scan(*inputs)
    saved = sum(z.nbytes for z in y.grad_fn.saved_tensors if z is not None)
    states = 2 * 640 * 32 * 16 * 4
    assert saved < states / 2


# --- the block ---


def test_parameters_are_those_of_mamba_ssm():
    """Names and shapes of `mamba_ssm.Mamba(d_model=20, d_state=16, d_conv=4, expand=2)`."""
    shapes = {name: tuple(p.shape) for name, p in MambaBlock(20).named_parameters()}
    assert shapes == {
        "A_log": (40, 16),
        "D": (40,),
        "in_proj.weight": (80, 20),
        "conv1d.weight": (40, 1, 4),
        "conv1d.bias": (40,),
        "x_proj.weight": (2 + 32, 40),
        "dt_proj.weight": (40, 2),
        "dt_proj.bias": (40,),
        "out_proj.weight": (20, 40),
    }


def test_initial_values_are_the_papers():
    block = MambaBlock(64)
    rates = torch.arange(1.0, 17.0).expand(128, 16)
    torch.testing.assert_close(block.A_log.exp().detach(), rates)
    delta = F.softplus(block.dt_proj.bias)
    assert 1e-3 * 0.99 <= delta.min() < 3e-3
    assert 3e-2 < delta.max() <= 0.1 * 1.01
    assert block.dt_proj.weight.abs().max() <= 4**-0.5


def block_by_definition(block: MambaBlock, x_NTD: torch.Tensor) -> torch.Tensor:
    """The paper's figure 3 for one trial per row, with torch's own convolution."""
    steps = x_NTD.shape[1]
    x, gate = block.in_proj(x_NTD).chunk(2, -1)
    conv = block.conv1d
    padded = F.pad(x.transpose(1, 2), (block.d_conv - 1, 0))
    x = F.silu(F.conv1d(padded, conv.weight, conv.bias, groups=block.d_inner)).transpose(1, 2)
    assert x.shape[1] == steps
    low, write, read = block.x_proj(x).split((block.dt_rank, block.d_state, block.d_state), -1)
    delta = F.softplus(block.dt_proj(low))
    y = scan_by_definition(x, delta, -block.A_log.exp(), write, read) + block.D * x
    return block.out_proj(y * F.silu(gate))


@pytest.mark.parametrize("sizes", [{}, {"d_state": 3, "d_conv": 1, "expand": 1}, {"d_conv": 2}])
def test_block_is_the_papers(sizes):
    torch.manual_seed(0)
    block, x = MambaBlock(16, **sizes), torch.randn(2, 21, 16)
    torch.testing.assert_close(block(x), block_by_definition(block, x), rtol=1e-5, atol=1e-6)


def test_gradient_of_the_block():
    torch.manual_seed(0)
    block = MambaBlock(3, d_state=2, expand=1).double()
    x = torch.randn(2, 9, 3, dtype=torch.float64, requires_grad=True)
    is_init = torch.rand(2, 9) < 0.3
    parameters = tuple(block.parameters())

    def run(x, *values):
        named = dict(zip(dict(block.named_parameters()), values, strict=True))
        return torch.func.functional_call(block, named, (x, is_init))

    assert torch.autograd.gradcheck(run, (x, *parameters))


@given(
    steps=st.integers(1, 12), reset_fraction=st.sampled_from([0.1, 0.6]), seed=st.integers(0, 99)
)
@torch.no_grad()
def test_resets_equal_trials_on_their_own(steps, reset_fraction, seed):
    torch.manual_seed(seed)
    block, x = MambaBlock(8), torch.randn(1, steps, 8)
    is_init = torch.rand(1, steps) < reset_fraction
    starts = [0, *(t for t in range(1, steps) if is_init[0, t]), steps]
    alone = [block(x[:, a:b]) for a, b in itertools.pairwise(starts)]
    torch.testing.assert_close(block(x, is_init), torch.cat(alone, 1), rtol=1e-5, atol=1e-6)


# --- the kernels of mamba-ssm ---


def fake_selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False
):
    """By mamba_ssm's page: u, delta, z [B, D, L]; A [D, N]; B, C [B, N, L]; D, delta_bias [D]."""
    for t in (u, delta, B, C, z):
        assert t.stride(-1) == 1  # its kernel reads along time
        assert t.dtype == u.dtype
    for t in (A, D, delta_bias):
        assert t.dtype == torch.float32  # as its kernel demands
    delta = delta.float() + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta
    sequences = (s.float().transpose(1, 2) for s in (u, delta, B, C))
    u_BLD, delta_BLD, B_BLN, C_BLN = sequences
    y = scan_by_definition(u_BLD, delta_BLD, A, B_BLN, C_BLN).transpose(1, 2)
    return ((y + u.float() * D[:, None]) * F.silu(z.float())).to(u.dtype)


def fake_causal_conv1d_fn(x, weight, bias=None, activation=None):
    """As causal_conv1d documents: x [B, D, L], weight [D, W], bias [D]."""
    assert x.stride(-1) == 1
    assert x.dtype == weight.dtype == bias.dtype
    width = weight.shape[1]
    out = F.conv1d(F.pad(x, (width - 1, 0)), weight.unsqueeze(1), bias, groups=len(weight))
    return {None: out, "silu": F.silu(out)}[activation]


@pytest.fixture
def fake_kernels(monkeypatch):
    ops, conv = ModuleType("mamba_ssm.ops.selective_scan_interface"), ModuleType("causal_conv1d")
    ops.selective_scan_fn = fake_selective_scan_fn
    conv.causal_conv1d_fn = fake_causal_conv1d_fn
    for module in (ModuleType("mamba_ssm"), ModuleType("mamba_ssm.ops"), ops, conv):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return load_kernels("mamba_ssm", 4, 16)


def test_kernels_compute_the_same_from_the_same_weights(fake_kernels):
    torch.manual_seed(0)
    block, x = MambaBlock(16), torch.randn(2, 30, 16)
    grads = []
    for kernels in (None, fake_kernels):
        out = block(x, kernels=kernels)
        grads.append((out, *torch.autograd.grad(out.square().sum(), list(block.parameters()))))
    for plain, kernel in zip(*grads, strict=True):
        torch.testing.assert_close(kernel, plain, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_kernels_under_autocast(fake_kernels):
    torch.manual_seed(0)
    block, x = MambaBlock(16), torch.randn(2, 30, 16)
    with torch.autocast("cpu", torch.bfloat16):
        states = [block(x, kernels=kernels).float() for kernels in (None, fake_kernels)]
    torch.testing.assert_close(*states, rtol=2e-2, atol=2e-2)


def test_uses_of_kernels(fake_kernels):
    encoder = build(backend="auto")
    on_gpu = torch.empty(1, 1, device="meta")
    assert encoder._kernels is not None
    assert encoder._kernels_for(on_gpu, None) is None  # CUDA only
    on_gpu = torch.empty(1, 1).as_subclass(type("OnGPU", (torch.Tensor,), {"is_cuda": True}))
    assert encoder._kernels_for(on_gpu, None) is encoder._kernels
    assert encoder._kernels_for(on_gpu.double(), None) is None
    assert encoder._kernels_for(on_gpu, torch.ones(1, 2, dtype=torch.bool)) is None
    assert build(backend="torch")._kernels is None
    assert build(backend="auto", d_conv=5)._kernels is None


def test_sizes_that_kernels_lack(fake_kernels):
    with pytest.raises(ValueError, match=r"needs d_conv in \(2, 3, 4\).*got d_conv=5"):
        build(backend="mamba_ssm", d_conv=5)
    with pytest.raises(ValueError, match="d_state up to 256.*d_state=300"):
        build(backend="mamba_ssm", d_state=300)


@pytest.mark.skipif(importlib.util.find_spec("mamba_ssm") is not None, reason="it is installed")
def test_missing_kernels():
    with pytest.raises(ImportError, match=r"pip install .*torchrl-amago\[mamba\]"):
        build(backend="mamba_ssm")
    assert build(backend="auto")._kernels is None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    """With mamba-ssm installed also its kernels."""
    for reset_fraction in (0.0, 0.1):
        assert_same_on_a_gpu(build().eval(), reset_fraction=reset_fraction)


# --- the encoder ---


def test_is_named_in_make_policy():
    assert SEQ_MODELS["mamba"] is MambaEncoder
    encoder = MambaEncoder(8)
    assert (encoder.output_size, len(encoder.blocks), encoder.blocks[0].d_inner) == (256, 3, 512)


def test_no_drift_over_long_trials():
    assert_no_drift(build().eval())


@torch.no_grad()
def test_memory_is_moved_in_place_and_has_constant_size():
    encoder = build().eval()
    memory = encoder.new_memory(3, torch.device("cpu"), torch.bfloat16)
    tensors = [state for layer in memory.layers for state in layer]
    assert [tuple(z.shape) for z in tensors] == [(3, 4, 32), (3, 16, 32)] * 2
    encoder.step(torch.ones(3, 4), torch.zeros(3), memory)
    assert all(z.dtype == torch.float32 and z.abs().sum() > 0 for z in tensors)
    tensors[1].fill_(torch.nan)
    memory.clear(torch.tensor([True, False, True]))
    assert all((z[[0, 2]] == 0).all() for z in tensors)
    assert tensors[1][1].isnan().all()


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"d_state": 0}, "d_state must be at least 1, got 0"),
        ({"d_conv": 0}, "d_conv must be at least 1, got 0"),
        ({"expand": 0}, "expand must be at least 1, got 0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"backend": "cuda"}, "backend must be one of 'auto', 'torch', 'mamba_ssm', got 'cuda'"),
        ({"norm": "batch"}, "norm must be one of"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        build(**options)
