"""Attention by definition: a matrix of all scores with a mask, in float64."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from torchrl_amago.modules.trajectory.kernels.attention import (
    AttentionPattern,
    ScoreBias,
    ring_attention,
    window_attention,
)


def naive(q, k, v, pattern, positions, is_init):
    """All scores at once, masked as documented."""
    steps = q.shape[2]
    trial = (torch.zeros_like(positions) if is_init is None else is_init).cumsum(1)
    age = torch.arange(steps)[:, None] - torch.arange(steps)
    is_sink = (positions < pattern.num_sinks)[:, None].expand(-1, steps, -1)
    near = (age < (pattern.window or steps)).expand_as(is_sink)
    visible = (near | is_sink) & (age >= 0) & (trial[:, :, None] == trial[:, None])
    score = q @ k.mT / math.sqrt(q.shape[-1]) + pattern.sink_bias * is_sink[:, None].double()
    if pattern.logit_clip is not None:
        score = score.clamp(-pattern.logit_clip, pattern.logit_clip)
    return score.masked_fill(~visible[:, None], -math.inf).softmax(-1) @ v


def trials(batch, steps, reset_fraction):
    """Rows that start at some step of a trial, and in which others start."""
    is_init = torch.rand(batch, steps) < reset_fraction
    positions = torch.randint(0, 3, (batch, 1)) + torch.arange(steps)
    for t in range(steps):
        before = positions[:, t - 1] + 1 if t else positions[:, 0]
        positions[:, t] = torch.where(is_init[:, t], 0, before)
    return positions, is_init


@pytest.fixture(autouse=True)
def short_blocks(monkeypatch):
    monkeypatch.setattr(ScoreBias, "BLOCK", 8)


@given(
    steps=st.integers(1, 70),
    window=st.sampled_from([None, 1, 3, 8, 9, 17]),
    sinks=st.sampled_from([(0, 0.0), (2, 0.0), (2, 0.7), (90, 0.7)]),
    logit_clip=st.sampled_from([None, 0.5]),
    several=st.booleans(),
    seed=st.integers(0, 999),
)
def test_window_attention(steps, window, sinks, logit_clip, several, seed):
    torch.manual_seed(seed)
    pattern = AttentionPattern(window, *(sinks if window else (0, 0.0)), logit_clip)
    q, k, v = torch.randn(3, 2, 3, steps, 4, dtype=torch.float64).requires_grad_().unbind(0)
    positions, is_init = trials(2, steps, 0.2 if several else 0.0)
    is_init = is_init if several else None
    out = window_attention(q, k, v, pattern, positions_BT=positions, is_init_BT=is_init)
    expected = naive(q, k, v, pattern, positions, is_init)
    torch.testing.assert_close(out, expected)
    weight = torch.randn_like(out)
    for found, right in zip(
        torch.autograd.grad((out * weight).sum(), (q, k, v)),
        torch.autograd.grad((expected * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("pattern", [AttentionPattern(logit_clip=1.0), AttentionPattern(16)])
def test_never_holds_all_scores(pattern):
    steps = 400
    sizes = []

    class Sizes(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            sizes.extend(
                z.numel() for z in torch.utils._pytree.tree_leaves(out) if hasattr(z, "numel")
            )
            return out

    q, k, v = torch.randn(3, 1, 1, steps, 4)
    with Sizes():
        window_attention(q, k, v, pattern)
    assert max(sizes) < steps**2 / 4


def test_dropout_leaves_attention_weights_out():
    q, k, v = torch.randn(3, 1, 1, 6, 4)
    for pattern in (AttentionPattern(), AttentionPattern(3), AttentionPattern(logit_clip=1.0)):
        whole = window_attention(q, k, v, pattern)
        assert not torch.allclose(window_attention(q, k, v, pattern, dropout=0.5), whole)


def test_ring_attention_sees_visible_slots_in_any_order():
    q = torch.randn(2, 3, 4)
    keys, values = torch.randn(2, 6, 5, 4)
    bias = torch.zeros(6, 1, 5)
    bias[:, :, 3] = -math.inf
    out = ring_attention(q, keys.transpose(1, 2), values, bias)
    seen = [4, 1, 0, 2]
    scores = torch.einsum("nd,nsd->ns", q.view(6, 4), keys[:, seen]) / 2
    expected = torch.einsum("ns,nsd->nd", scores.softmax(-1), values[:, seen]).view(2, 3, 4)
    torch.testing.assert_close(out, expected)
    out = ring_attention(q, keys.transpose(1, 2), values, bias, logit_clip=0.1)
    weight = scores.clamp(-0.1, 0.1).softmax(-1)
    expected = torch.einsum("ns,nsd->nd", weight, values[:, seen]).view(2, 3, 4)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"num_sinks": 2}, "sinks need a window.*got num_sinks=2"),
        ({"window": 3, "num_sinks": -1}, "num_sinks must be at least 1, got -1"),
        ({"window": 3, "sink_bias": 1.0}, "0 without sinks; .*sink_bias=1.0"),
        ({"logit_clip": 0.0}, "logit_clip must be positive, got 0.0"),
    ],
)
def test_bad_patterns(options, message):
    with pytest.raises(ValueError, match=message):
        AttentionPattern(**options)
