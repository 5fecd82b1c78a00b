"""Attention over whole windows, and of one new token over a ring of stored keys and values.

Legend: B batch, T steps, H heads, D features of one head, S slots of the ring,
N = B * H.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional as F


def attention_bias(
    is_init_BT: Tensor | None, num_steps: int, window: int | None, like: Tensor
) -> Tensor | None:
    """What to add to attention scores besides nothing: 0 where step i sees step j, else -inf.

    Step i sees step j if j <= i, j > i - window, and no trial starts in (j, i].

    Args:
        is_init_BT: bool, True at the first step of a trial; None if rows hold one trial each.
        num_steps: T.
        window: how many steps a step sees, itself included; None for all.
        like: gives dtype and device.

    Returns:
        `[B or 1, 1, T, T]`, or None if causality is all there is (kernels have a faster path then).
    """
    if is_init_BT is None and (window is None or window >= num_steps):
        return None
    step = torch.arange(num_steps, device=like.device)
    age = step[:, None] - step[None, :]
    visible = (age >= 0) if window is None else (age >= 0) & (age < window)
    if is_init_BT is not None:
        trial_BT = is_init_BT.cumsum(1)
        visible = visible & (trial_BT[:, :, None] == trial_BT[:, None, :])
    else:
        visible = visible[None]
    bias = torch.zeros(visible.shape, dtype=like.dtype, device=like.device)
    return bias.masked_fill_(~visible, -math.inf).unsqueeze(1)


def window_attention(
    q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, bias: Tensor | None, dropout: float = 0.0
) -> Tensor:
    """Causal attention of every step of a window over the steps before it, and itself.

    Args:
        bias: from :func:`attention_bias`; None for plain causal attention.
        dropout: probability of leaving out an attention weight.

    Returns:
        `[B, H, T, D]`.
    """
    return F.scaled_dot_product_attention(
        q_BHTD, k_BHTD, v_BHTD, attn_mask=bias, dropout_p=dropout, is_causal=bias is None
    )


def ring_attention(q_BHD: Tensor, keys_NDS: Tensor, values_NSD: Tensor, bias_N1S: Tensor) -> Tensor:
    """Attention of one token over stored keys and values; their order has no influence.

    Batched matrix products beat scaled_dot_product_attention here by up to 3x on a CPU: with a
    single query there is nothing for the fused kernel to save.

    Args:
        q_BHD: queries of the newest step.
        keys_NDS: stored keys, N = B * H.
        values_NSD: stored values.
        bias_N1S: 0 on visible slots, -inf on others. Slots must hold finite numbers all the same.

    Returns:
        `[B, H, D]`.
    """
    size = q_BHD.shape[-1]
    q_N1D = q_BHD.reshape(-1, 1, size)
    score_N1S = torch.baddbmm(bias_N1S, q_N1D, keys_NDS, alpha=1.0 / math.sqrt(size))
    weight_N1S = score_N1S.softmax(-1, dtype=torch.float32).to(values_NSD.dtype)
    return torch.bmm(weight_N1S, values_NSD).view(q_BHD.shape)
