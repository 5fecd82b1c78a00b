"""Dropout: the fraction it drops, the rest, and that compiled code draws the same."""

from __future__ import annotations

import shutil

import pytest
import torch

from torchrl_amago.modules._dropout import dropout


@pytest.mark.parametrize("p", [0.05, 0.5, 0.9])
@pytest.mark.parametrize("shape", [(1000, 401), (7,), (3, 0)])
def test_fraction_and_scale(p, shape):
    torch.manual_seed(0)
    x = torch.ones(shape, requires_grad=True)
    out = dropout(x, p, training=True)
    assert out.shape == shape
    kept = out[out != 0]
    torch.testing.assert_close(kept, torch.full_like(kept, 1 / (1 - p)), rtol=1e-4, atol=0)
    (grad,) = torch.autograd.grad(out.sum(), x)
    assert torch.equal(grad, out.detach())
    if out.numel() > 1000:
        # Five standard deviations.
        assert abs(out.count_nonzero() / out.numel() - (1 - p)) < 5 * (p / out.numel()) ** 0.5


def test_neighbours_are_independent():
    """Four features share one draw of 64 bits."""
    torch.manual_seed(0)
    dropped = (dropout(torch.ones(100_000, 4), 0.3, training=True) == 0).double()
    assert (dropped.T.corrcoef() - torch.eye(4)).abs().max() < 0.02
    assert (dropped.mean(0) - 0.3).abs().max() < 0.01


def test_does_nothing_outside_of_training():
    x = torch.randn(5)
    assert dropout(x, 0.5, training=False) is x
    assert dropout(x, 0.0, training=True) is x
    assert dropout(torch.ones(8).bfloat16(), 0.5, training=True).dtype == torch.bfloat16


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_code_draws_the_same():
    x = torch.randn(30, 7)
    results = []
    for f in (dropout, torch.compile(dropout, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        leaf = x.clone().requires_grad_()
        out = f(leaf, 0.5, True)
        results.append((out, *torch.autograd.grad(out.square().sum(), leaf)))
    for eager, compiled in zip(*results, strict=True):
        assert torch.equal(eager, compiled)
