"""Attention over whole windows, and of one new token over a ring of stored keys and values.

Legend: B batch, T steps, H heads, D features of one head, S slots of the ring, N = B * H,
M blocks of queries, Q queries of a block, K keys that a block of queries sees.
"""

from __future__ import annotations

import math
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchrl_amago._cpu import float32_attention
from torchrl_amago.modules._layers import at_least_float32
from torchrl_amago.modules.trajectory.kernels.pattern import AttentionPattern, ScoreBias


def window_attention(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    pattern: AttentionPattern,
    positions_BT: Tensor | None = None,
    is_init_BT: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from every step to the steps of its trial that the pattern shows.

    With a sliding window, time and memory grow linearly with T. All T x T scores are held at once
    only for sinks in rows with several trials, and under `torch.compile`, which unrolls loops, for
    clipping without a window.

    Args:
        q_BHTD: queries; then keys and values.
        pattern: window, sinks and clipping.
        positions_BT: steps since the trial began; needed for sinks.
        is_init_BT: bool, True at the first step of a trial; None if rows hold one trial each.
        dropout: probability of zeroing an attention weight.

    Returns:
        `[B, H, T, D]`.

    Example:
        >>> q, k, v = torch.randn(3, 2, 1, 5, 4)
        >>> out = window_attention(q, k, v, AttentionPattern(window=1))
        >>> torch.allclose(out, v)
        True
    """
    qkv = (q_BHTD, k_BHTD, v_BHTD)
    num_steps, window = q_BHTD.shape[2], pattern.window
    bias = ScoreBias(pattern, positions_BT, is_init_BT, like=q_BHTD)
    attend = partial(_attend, clip=pattern.logit_clip, dropout=dropout)
    if window is not None and window < num_steps:
        # Sinks of rows with several trials may lie anywhere.
        if num_steps > window + bias.BLOCK and (bias.trial_BT is None or bias.sink_BT is None):
            return _attend_in_blocks(*qkv, bias, attend)
        return attend(*qkv, bias.dense(num_steps))
    if pattern.logit_clip is not None and not torch.compiler.is_compiling():
        return _attend_by_queries(*qkv, bias, attend)
    if bias.trial_BT is None and not pattern.sink_bias and pattern.logit_clip is None:
        # Kernels have a faster path if causality is all there is.
        return _sdpa(*qkv, dropout_p=dropout, is_causal=True)
    return attend(*qkv, bias.dense(num_steps))


def ring_attention(
    q_BHD: Tensor,
    keys_NDS: Tensor,
    values_NSD: Tensor,
    bias_N1S: Tensor,
    logit_clip: float | None = None,
) -> Tensor:
    """Attend with the newest step's queries to stored keys and values in any order: `[B, H, D]`.

    The bias is finite on visible slots and -inf on others, which must hold finite numbers all the
    same. `logit_clip`: see :class:`AttentionPattern`.
    """
    # Batched matrix products beat scaled_dot_product_attention here by up to 3x on a CPU: with a
    # single query there is nothing for the fused kernel to save.
    size = q_BHD.shape[-1]
    q_N1D = q_BHD.reshape(-1, 1, size)
    if logit_clip is None:
        score_N1S = torch.baddbmm(bias_N1S, q_N1D, keys_NDS, alpha=1.0 / math.sqrt(size))
    else:
        score_N1S = _clip(torch.bmm(q_N1D, keys_NDS) / math.sqrt(size), bias_N1S, logit_clip)
    return torch.bmm(_softmax(score_N1S), values_NSD).view(q_BHD.shape)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, clip: float | None, dropout: float
) -> Tensor:
    if clip is None:
        return _sdpa(q, k, v, attn_mask=bias, dropout_p=dropout)
    if torch.is_grad_enabled() and q.requires_grad:
        # Scores are cheaper to compute again than to keep for every layer.
        return checkpoint(_attend_clipped, q, k, v, bias, clip, dropout, use_reentrant=False)
    return _attend_clipped(q, k, v, bias, clip, dropout)


def _sdpa(q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, **options) -> Tensor:
    """PyTorch's attention; on CPUs in float32 if there will be a backward pass."""
    if not (float32_attention(q) and torch.is_grad_enabled() and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)
    mask = None if attn_mask is None else at_least_float32(attn_mask)
    with torch.autocast(q.device.type, enabled=False):
        out = F.scaled_dot_product_attention(
            *(at_least_float32(x) for x in (q, k, v)), attn_mask=mask, **options
        )
    return out.to(q.dtype)


def _attend_clipped(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, clip: float, dropout: float
) -> Tensor:
    score = q @ k.transpose(-1, -2) * (1.0 / math.sqrt(q.shape[-1]))
    weight = _softmax(_clip(score, bias, clip))
    return F.dropout(weight, dropout, training=dropout > 0) @ v


def _softmax(score: Tensor) -> Tensor:
    """Softmax in float32 at least, in the dtype given."""
    return at_least_float32(score).softmax(-1).to(score.dtype)


def _clip(score: Tensor, bias: Tensor, clip: float) -> Tensor:
    """Add the bias and clamp visible scores."""
    hidden = bias == -math.inf
    clipped = (score + bias.masked_fill(hidden, 0.0)).clamp(-clip, clip)
    return clipped.masked_fill(hidden, -math.inf)


def _attend_by_queries(q_BHTD: Tensor, k: Tensor, v: Tensor, bias: ScoreBias, attend) -> Tensor:
    """Block after block of queries, each over all keys before: no T x T scores at once."""
    out = []
    for start in range(0, q_BHTD.shape[2], bias.BLOCK):
        q = q_BHTD[:, :, start : start + bias.BLOCK]
        end = start + q.shape[2]
        out.append(attend(q, k[:, :, :end], v[:, :, :end], bias.dense(end, start)))
    return torch.cat(out, 2)


def _attend_in_blocks(q_BHTD: Tensor, k: Tensor, v: Tensor, bias: ScoreBias, attend) -> Tensor:
    """Sliding window: all blocks of queries at once, each over its own few keys."""
    block, num_steps = bias.BLOCK, q_BHTD.shape[2]
    # The first blocks' windows reach before the start; all others are alike.
    first = math.ceil((bias.pattern.window - 1) / block)
    head = first * block
    blocks = math.ceil(num_steps / block) - first
    q_MBHQD = F.pad(q_BHTD, (0, 0, 0, (first + blocks) * block - num_steps))[:, :, head:]
    q_MBHQD = q_MBHQD.unflatten(2, (blocks, block)).permute(2, 0, 1, 3, 4)
    kv = (_blocks_of_keys(z, bias, first, blocks) for z in (k, v))
    tail = attend(*(z.flatten(0, 1) for z in (q_MBHQD, *kv)), bias.blocks(first, blocks))
    tail = tail.unflatten(0, (blocks, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)
    if head:
        start = attend(*(z[:, :, :head] for z in (q_BHTD, k, v)), bias.dense(head))
        tail = torch.cat((start, tail), 2)
    return tail[:, :, :num_steps]


def _blocks_of_keys(x_BHTD: Tensor, bias: ScoreBias, first_block: int, num_blocks: int) -> Tensor:
    """The sinks and then the window of every block of queries, see :meth:`ScoreBias.blocks`."""
    block, before = bias.BLOCK, bias.pattern.window - 1
    start, end = first_block * block - before, (first_block + num_blocks) * block
    padded = F.pad(x_BHTD, (0, 0, 0, end - x_BHTD.shape[2]))[:, :, start:]
    x_MBHKD = padded.unfold(2, before + block, block).permute(2, 0, 1, 4, 3)
    if not bias.pattern.num_sinks:
        return x_MBHKD
    sinks = x_BHTD[:, :, : bias.pattern.num_sinks].expand(num_blocks, -1, -1, -1, -1)
    return torch.cat((sinks, x_MBHKD), 3)
