"""Branches that differ between CPUs and GPUs: the switch, and the same results both ways."""

from __future__ import annotations

import pytest
import torch

from tests.modules.trajectory.helpers import random_trials, sequence_states
from tests.modules.trajectory.test_contract import ENCODERS, build
from torchrl_amago import _cpu
from torchrl_amago._cpu import cpu_paths
from torchrl_amago._masking import Steps
from torchrl_amago.modules._dropout import dropout
from torchrl_amago.modules.trajectory.kernels.attention import AttentionPattern, window_attention
from torchrl_amago.modules.trajectory.kernels.mamba_scan import selective_scan

PREDICATES = (
    _cpu.float32_attention,
    _cpu.shared_dropout_bits,
    _cpu.skip_empty_cuts,
    _cpu.compact_batches,
    _cpu.chunk_rows,
)
both_ways = pytest.mark.parametrize("enabled", [True, False])


@pytest.mark.parametrize("predicate", PREDICATES, ids=lambda f: f.__name__)
def test_the_device_decides_unless_it_is_overridden(predicate):
    on_cpu, elsewhere = torch.zeros(2), torch.zeros(2, device="meta")
    assert predicate(on_cpu)
    assert not predicate(elsewhere)
    with cpu_paths(True):
        assert predicate(elsewhere)
        with cpu_paths(False):
            assert not predicate(on_cpu)
            with cpu_paths(None):
                assert predicate(on_cpu)
        assert predicate(elsewhere)
    with pytest.raises(RuntimeError), cpu_paths(False):
        raise RuntimeError
    assert predicate(on_cpu)


def test_traced_values_never_decide():
    results = []
    torch.vmap(lambda x: results.append(_cpu.compact_batches(x)) or x)(torch.zeros(2, 3))
    assert results == [False]


@both_ways
@pytest.mark.parametrize("pattern", [AttentionPattern(), AttentionPattern(9, 2, 0.5)])
def test_attention_in_half_precision(pattern, enabled):
    halves = torch.randn(3, 2, 3, 40, 4, dtype=torch.bfloat16)
    positions = torch.arange(40).expand(2, 40)
    weight = torch.randn(2, 3, 40, 4, dtype=torch.bfloat16)
    found, exact = halves.clone().requires_grad_(), halves.float().requires_grad_()
    with cpu_paths(enabled), torch.autocast("cpu"):
        out = window_attention(*found.unbind(0), pattern, positions_BT=positions)
    (out * weight).sum().backward()
    expected = window_attention(*exact.unbind(0), pattern, positions_BT=positions)
    (expected * weight).sum().backward()
    assert out.dtype == torch.bfloat16
    if enabled:
        assert torch.equal(out, expected.bfloat16())
    torch.testing.assert_close(out.float(), expected, rtol=2e-2, atol=2e-2)
    # Sums over uses of a key are rounded once more.
    tolerance = 2e-2 if enabled else 5e-2
    torch.testing.assert_close(found.grad.float(), exact.grad, rtol=tolerance, atol=tolerance)


@both_ways
def test_dropout_keeps_the_mean_and_the_gradient(enabled):
    torch.manual_seed(0)
    x = torch.ones(400, 101, requires_grad=True)
    with cpu_paths(enabled):
        out = dropout(x, 0.25, training=True)
    kept = out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 4 / 3), rtol=1e-4, atol=0.0)
    assert abs(len(kept) / x.numel() - 0.75) < 5 * (0.25 / x.numel()) ** 0.5
    assert torch.equal(torch.autograd.grad(out.sum(), x)[0], out.detach())


@pytest.mark.parametrize("reset_fraction", [0.0, 0.02, 0.5])
def test_scan_with_and_without_a_look_at_resets(reset_fraction):
    x, write, read = (torch.randn(2, 150, n, dtype=torch.float64) for n in (3, 2, 2))
    inputs = (x, torch.rand_like(x), -torch.rand(3, 2, dtype=torch.float64), write, read)
    inputs = [z.requires_grad_() for z in inputs]
    is_init = torch.rand(2, 150) < reset_fraction
    results = []
    for enabled in (True, False):
        with cpu_paths(enabled):
            y = selective_scan(*inputs, is_init)
            results.append([y, *torch.autograd.grad(y.square().sum(), inputs)])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other)


def test_real_steps_in_one_row_or_in_place():
    mask = torch.rand(3, 5) < 0.5
    x = torch.randn(3, 5, 2)
    for enabled in (True, False):
        with cpu_paths(enabled):
            steps = Steps(mask)
        assert steps.compact == enabled
        restored = steps.restore(steps.select(x, fill=0.0))
        assert torch.equal(restored, torch.where(mask[..., None], x, 0.0))


@pytest.mark.parametrize("name", ENCODERS)
def test_encoders_give_the_same_states_and_gradients(name):
    encoder, trials = build(name).eval(), random_trials(3, 40)
    results = []
    for enabled in (True, False):
        with cpu_paths(enabled):
            states = sequence_states(encoder, *trials)
            parameters = [p for p in encoder.parameters() if p.requires_grad]
            grads = (
                torch.autograd.grad(states.square().sum(), parameters, allow_unused=True)
                if parameters
                else []
            )
            results.append([states, *grads])
    for one, other in zip(*results, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
