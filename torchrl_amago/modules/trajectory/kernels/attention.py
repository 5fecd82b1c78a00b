"""Attention over whole windows, and of one new token over a ring of stored keys and values.

Legend: B batch, T steps, H heads, D features of one head, S slots of the ring or sinks, N = B * H,
M blocks of queries, Q queries of a block, K keys that a block of queries sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchrl_amago._cpu import float32_attention
from torchrl_amago._validation import check_counts, check_positive
from torchrl_amago.modules._layers import at_least_float32


@dataclass(frozen=True)
class AttentionPattern:
    """Steps that a step attends to, and changes to their scores.

    Args:
        window: number of steps that a step sees, itself included; None for all of its trial.
        num_sinks: number of a trial's first steps that stay visible beyond the window, attention
            sinks (arXiv 2309.17453). By position: a slice that starts later has none.
        sink_bias: added to scores of sinks.
        logit_clip: scores are clamped to plus and minus this, before the softmax.
    """

    window: int | None = None
    num_sinks: int = 0
    sink_bias: float = 0.0
    logit_clip: float | None = None

    def __post_init__(self) -> None:
        if self.window is not None:
            check_counts("A step always sees itself.", window=self.window)
        if self.num_sinks:
            check_counts(num_sinks=self.num_sinks)
        fits = self.window is not None and math.isfinite(self.sink_bias)
        if not (fits if self.num_sinks else self.sink_bias == 0.0):
            raise ValueError(
                "sinks need a window, beyond which they are seen, and sink_bias a finite number, "
                f"0 without sinks; got num_sinks={self.num_sinks}, window={self.window}, "
                f"sink_bias={self.sink_bias}."
            )
        if self.logit_clip is not None:
            check_positive("Leave it out not to clip.", logit_clip=self.logit_clip)


class ScoreBias:
    """Bias on attention scores: 0 (or the sinks' bias) where step i sees step j, else -inf.

    Step i sees step j of its own trial if 0 <= i - j < window, or if j is a sink and j <= i.
    """

    #: Queries of a block. With a sliding window each block reads window - 1 + BLOCK keys: smaller
    #: blocks waste less compute, larger ones copy less.
    BLOCK = 128

    def __init__(
        self,
        pattern: AttentionPattern,
        positions_BT: Tensor | None,
        is_init_BT: Tensor | None,
        like: Tensor,
    ) -> None:
        self.pattern, self.like = pattern, like
        self.trial_BT = None if is_init_BT is None else is_init_BT.cumsum(1)
        self.sink_BT = positions_BT < pattern.num_sinks if pattern.num_sinks else None

    def dense(self, num_steps: int, first_query: int = 0) -> Tensor:
        """Return the bias of steps from `first_query` on among all: `[B or 1, 1, Q, T]`."""
        step_1T = torch.arange(num_steps, device=self.like.device)[None]
        return self._between(step_1T[:, first_query:], step_1T)

    def blocks(self, first_block: int, num_blocks: int) -> Tensor:
        """Return the bias of blocks of queries among their own keys: `[M B or 1, 1, Q, K]`.

        A block's keys are the sinks, then the steps from `window - 1` before it to its end.
        """
        if self.trial_BT is None and self.sink_BT is None:
            num_blocks = 1  # all are alike
        first, device = first_block * self.BLOCK, self.like.device
        step_X = torch.arange(first + num_blocks * self.BLOCK, device=device)
        query_MQ = step_X[first:].view(-1, self.BLOCK)
        key_MK = query_MQ[:, :1] + torch.arange(1 - self.pattern.window, self.BLOCK, device=device)
        num_sinks = 0 if self.sink_BT is None else self.sink_BT[0, : self.pattern.num_sinks].numel()
        sink_MS = step_X[:num_sinks].expand(len(key_MK), -1)
        return self._between(query_MQ, torch.cat((sink_MS, key_MK), 1), num_sinks)

    def _between(self, query_MQ: Tensor, key_MK: Tensor, sink_columns: int = 0) -> Tensor:
        """Bias of queries among keys, of which the first columns show sinks beyond the window."""
        first = slice(None if sink_columns else 1)  # without sinks ages are those of any block
        age_M1QK = (query_MQ[first, :, None] - key_MK[first, None])[:, None]
        visible = age_M1QK >= 0
        bias, window = self.like.new_zeros(()), self.pattern.window
        if window is not None:
            visible = visible & (age_M1QK < window)
        if self.sink_BT is not None:
            sink_MB1K = _take(self.sink_BT, key_MK)[:, :, None]
            beyond = sink_MB1K & (age_M1QK >= window)
            if sink_columns:
                near = visible[..., sink_columns:].expand(-1, beyond.shape[1], -1, -1)
                visible = torch.cat((beyond[..., :sink_columns], near), -1)
            else:
                visible = visible | beyond
            if self.pattern.sink_bias:
                bias = torch.where(sink_MB1K, self.pattern.sink_bias, bias)
        if self.trial_BT is not None:
            trial_MBQ, trial_MBK = (_take(self.trial_BT, z) for z in (query_MQ, key_MK))
            visible = visible & (trial_MBQ[..., None] == trial_MBK[:, :, None])
        return torch.where(visible, bias, -math.inf).flatten(0, 1).unsqueeze(1)


def window_attention(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    pattern: AttentionPattern,
    positions_BT: Tensor | None = None,
    is_init_BT: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Attend from every step to those of its trial that the pattern shows: `[B, H, T, D]`.

    With a sliding window, time and memory grow linearly with T. All T x T scores are held at once
    only for sinks in rows with several trials, and under `torch.compile`, which unrolls loops, for
    clipping without a window.

    Args:
        q_BHTD: queries; then keys and values.
        positions_BT: steps since the trial began; needed for sinks.
        is_init_BT: bool, True at the first step of a trial; None if rows hold one trial each.
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
        q32, k32, v32 = map(at_least_float32, (q, k, v))
        out = F.scaled_dot_product_attention(q32, k32, v32, attn_mask=mask, **options)
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
    out, end = [], 0
    for q in q_BHTD.split(bias.BLOCK, 2):
        start, end = end, end + q.shape[2]
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


def _take(value_BT: Tensor, step_MX: Tensor) -> Tensor:
    """Values at the given steps, `[M, B, X]`; at a row's end for those past it."""
    return value_BT[:, step_MX.clamp(max=value_BT.shape[1] - 1)].transpose(0, 1)
