"""Attention by definition: a loop over what each step may see."""

from __future__ import annotations

import math

import pytest
import torch

from torchrl_amago.modules.trajectory.attention import (
    attention_bias,
    ring_attention,
    window_attention,
)


def naive(q, k, v, sees):
    """Softmax attention of each query over the keys that `sees(b, i, j)` allows."""
    out = torch.zeros_like(q)
    B, H, T, D = q.shape
    for b in range(B):
        for h in range(H):
            for i in range(T):
                seen = [j for j in range(T) if sees(b, i, j)]
                scores = torch.stack([q[b, h, i] @ k[b, h, j] for j in seen]) / math.sqrt(D)
                out[b, h, i] = scores.softmax(0) @ v[b, h, seen]
    return out


@pytest.mark.parametrize("window", [None, 1, 3, 100])
@pytest.mark.parametrize("several", [False, True])
def test_window_attention(window, several):
    q, k, v = torch.randn(3, 2, 2, 7, 4)
    is_init = torch.zeros(2, 7, dtype=torch.bool)
    is_init[0, [0, 4]] = True
    is_init[1, [2, 3]] = True
    trial = is_init.cumsum(1)

    def sees(b, i, j):
        same = not several or trial[b, i] == trial[b, j]
        return j <= i and same and (window is None or i - j < window)

    bias = attention_bias(is_init if several else None, 7, window, like=q)
    assert (bias is None) == (not several and window in (None, 100))
    torch.testing.assert_close(window_attention(q, k, v, bias), naive(q, k, v, sees))


def test_bias_by_hand():
    bias = attention_bias(torch.tensor([[True, False, True]]), 3, None, like=torch.zeros(()))
    off = -math.inf
    assert bias.tolist() == [[[[0, off, off], [0, 0, off], [off, off, 0]]]]


def test_dropout_leaves_attention_weights_out():
    q, k, v = torch.randn(3, 1, 1, 6, 4)
    whole = window_attention(q, k, v, None)
    assert not torch.allclose(window_attention(q, k, v, None, dropout=0.5), whole)


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
