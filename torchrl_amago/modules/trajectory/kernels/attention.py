"""Attention over whole windows, and of one new token over a ring of stored keys and values.

Legend: B batch, T steps, H heads, D features of one head, S slots of the ring, N = B * H,
M blocks of queries, Q queries of a block, K keys that a block of queries sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import partial
from numbers import Integral

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from torchrl_amago._cpu import float32_attention
from torchrl_amago._validation import check_positive
from torchrl_amago.modules._layers import at_least_float32

# Queries of a block. With a sliding window each block reads window - 1 + _BLOCK keys: smaller blocks
# compute less in vain, larger ones copy less.
_BLOCK = 128


@dataclass(frozen=True)
class AttentionPattern:
    """What a step attends to, and what becomes of its scores.

    Args:
        window: how many steps a step sees, itself included; None for all of its trial.
        num_sinks: how many first steps of its trial a step sees beyond the window, attention sinks
            (arXiv 2309.17453). By position: a slice that begins later has none.
        sink_bias: added to scores of sinks.
        logit_clip: scores are clamped to plus and minus this, before the softmax.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> AttentionPattern(window=256, num_sinks=4)
        AttentionPattern(window=256, num_sinks=4, sink_bias=0.0, logit_clip=None)
    """

    window: int | None = None
    num_sinks: int = 0
    sink_bias: float = 0.0
    logit_clip: float | None = None

    def __post_init__(self) -> None:
        if self.window is not None and not (isinstance(self.window, Integral) and self.window >= 1):
            raise ValueError(
                f"window must be at least 1, got {self.window}. A step always sees itself; for an "
                "agent without memory use a feed-forward trajectory encoder."
            )
        if (
            not isinstance(self.num_sinks, Integral)
            or self.num_sinks < 0
            or (self.num_sinks and self.window is None)
        ):
            raise ValueError(
                f"num_sinks must be at least 0, and 0 without a window, got {self.num_sinks} and "
                f"window={self.window}. Sinks are what is seen beyond the window."
            )
        if self.sink_bias and not self.num_sinks:
            raise ValueError(
                f"sink_bias={self.sink_bias} needs sinks, got num_sinks=0. Set both or neither."
            )
        if not math.isfinite(self.sink_bias):
            raise ValueError(f"sink_bias must be finite, got {self.sink_bias}. Use 0 for none.")
        if self.logit_clip is not None:
            check_positive("Leave it out not to clip.", logit_clip=self.logit_clip)


def window_attention(
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    pattern: AttentionPattern,
    *,
    positions_BT: Tensor | None = None,
    is_init_BT: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Causal attention of every step over the steps of its trial that the pattern shows.

    Never holds T x T scores but for sinks in rows with several trials, and where `torch.compile`, which
    fixes the number of a loop's rounds, meets clipping without a window. With a sliding window, time
    and memory grow linearly with T.

    Args:
        pattern: window, sinks and clipping.
        positions_BT: steps since the trial began; needed for sinks.
        is_init_BT: bool, True at the first step of a trial; None if rows hold one trial each.
        dropout: probability of leaving out an attention weight.

    Returns:
        `[B, H, T, D]`.
    """
    num_steps, window = q_BHTD.shape[2], pattern.window
    trial_BT = None if is_init_BT is None else is_init_BT.cumsum(1)
    sink_BT = None if not pattern.num_sinks else positions_BT < pattern.num_sinks
    shown = _Shown(pattern, trial_BT, sink_BT, like=q_BHTD)
    attend = partial(_attend, clip=pattern.logit_clip, dropout=dropout)
    if window is not None and window < num_steps:
        # Sinks of rows with several trials may lie anywhere.
        if num_steps > window + _BLOCK and (trial_BT is None or sink_BT is None):
            return _attend_in_blocks(q_BHTD, k_BHTD, v_BHTD, shown, attend)
        return attend(q_BHTD, k_BHTD, v_BHTD, shown.among_all(num_steps))
    if pattern.logit_clip is not None and not torch.compiler.is_compiling():
        return _attend_by_queries(q_BHTD, k_BHTD, v_BHTD, shown, attend)
    if trial_BT is None and not pattern.sink_bias and pattern.logit_clip is None:
        # Kernels have a faster path if causality is all there is.
        return _sdpa(q_BHTD, k_BHTD, v_BHTD, dropout_p=dropout, is_causal=True)
    return attend(q_BHTD, k_BHTD, v_BHTD, shown.among_all(num_steps))


def ring_attention(
    q_BHD: Tensor,
    keys_NDS: Tensor,
    values_NSD: Tensor,
    bias_N1S: Tensor,
    logit_clip: float | None = None,
) -> Tensor:
    """Attention of one token over stored keys and values; their order has no influence.

    Batched matrix products beat scaled_dot_product_attention here by up to 3x on a CPU: with a
    single query there is nothing for the fused kernel to save.

    Args:
        q_BHD: queries of the newest step.
        keys_NDS: stored keys, N = B * H.
        values_NSD: stored values.
        bias_N1S: finite on visible slots, -inf on others. Slots must hold finite numbers all the same.
        logit_clip: see :class:`AttentionPattern`.

    Returns:
        `[B, H, D]`.
    """
    size = q_BHD.shape[-1]
    q_N1D = q_BHD.reshape(-1, 1, size)
    if logit_clip is None:
        score_N1S = torch.baddbmm(bias_N1S, q_N1D, keys_NDS, alpha=1.0 / math.sqrt(size))
    else:
        score_N1S = torch.bmm(q_N1D, keys_NDS) * (1.0 / math.sqrt(size))
        score_N1S = _clip(score_N1S, bias_N1S, logit_clip)
    return torch.bmm(_softmax(score_N1S), values_NSD).view(q_BHD.shape)


class _Shown:
    """What is added to scores: 0 (or the sinks' bias) where step i sees step j, else -inf.

    Step i sees step j of its own trial if 0 <= i - j < window, or if j is a sink and j <= i.
    """

    def __init__(
        self,
        pattern: AttentionPattern,
        trial_BT: Tensor | None,
        sink_BT: Tensor | None,
        like: Tensor,
    ) -> None:
        self.pattern, self.trial_BT, self.sink_BT, self.like = pattern, trial_BT, sink_BT, like

    def among_all(self, num_steps: int, first_query: int = 0) -> Tensor:
        """Steps from `first_query` on among all: `[B or 1, 1, Q, T]`."""
        step_T = torch.arange(num_steps, device=self.like.device)
        age_QT = step_T[first_query:, None] - step_T
        visible = self._in_window(age_QT)[None]
        if self.sink_BT is not None:
            visible = visible | ((age_QT >= 0) & self.sink_BT[:, None, :num_steps])
        if self.trial_BT is not None:
            trial_BT = self.trial_BT[:, :num_steps]
            visible = visible & (trial_BT[:, first_query:, None] == trial_BT[:, None])
        sink = None if self.sink_BT is None else self.sink_BT[:, None, :num_steps]
        return self._bias(visible, sink).unsqueeze(1)

    def in_blocks(self, first_block: int, num_blocks: int) -> Tensor:
        """Blocks of queries among the keys of :func:`_blocks_of_keys`: `[M B or 1, 1, Q, K]`."""
        window = self.pattern.window
        key_K = torch.arange(window - 1 + _BLOCK, device=self.like.device) - (window - 1)
        query_Q = torch.arange(_BLOCK, device=self.like.device)
        visible = self._in_window(query_Q[:, None] - key_K)[None]
        if self.trial_BT is None and self.sink_BT is None:
            return self._bias(visible, None).unsqueeze(1)
        start_M = torch.arange(first_block, first_block + num_blocks, device=self.like.device)
        start_M11 = (start_M * _BLOCK)[:, None, None]
        if self.sink_BT is None:
            last = self.trial_BT.shape[1] - 1
            trial_MBQ = self.trial_BT[:, (start_M11[:, 0] + query_Q).clamp(max=last)].transpose(
                0, 1
            )
            trial_MBK = self.trial_BT[:, (start_M11[:, 0] + key_K).clamp(max=last)].transpose(0, 1)
            visible = visible & (trial_MBQ[..., None] == trial_MBK[:, :, None])
            return self._bias(visible, None).flatten(0, 1).unsqueeze(1)
        # Sinks have columns of their own, seen once the window has passed them.
        num_sinks = min(self.pattern.num_sinks, self.sink_BT.shape[1])
        sink_BS = self.sink_BT[:, :num_sinks]
        age_MQS = start_M11 + query_Q[:, None] - torch.arange(num_sinks, device=self.like.device)
        beyond_MBQS = (age_MQS >= window)[:, None] & sink_BS[:, None]
        is_sink_MBK = self.sink_BT[
            :, (start_M11[:, 0] + key_K).clamp(max=self.sink_BT.shape[1] - 1)
        ]
        is_sink_MBK = is_sink_MBK.transpose(0, 1)
        visible = visible.expand(*is_sink_MBK.shape[:2], _BLOCK, -1)
        sink = torch.cat((sink_BS.expand(num_blocks, -1, -1), is_sink_MBK), -1)
        bias = self._bias(torch.cat((beyond_MBQS, visible), -1), sink[:, :, None])
        return bias.flatten(0, 1).unsqueeze(1)

    def _in_window(self, age: Tensor) -> Tensor:
        window = self.pattern.window
        return (age >= 0) if window is None else (age >= 0) & (age < window)

    def _bias(self, visible: Tensor, sink: Tensor | None) -> Tensor:
        shown = self.like.new_zeros(())
        if self.pattern.sink_bias and sink is not None:
            shown = torch.where(sink, self.pattern.sink_bias, shown)
        return torch.where(visible, shown, -math.inf)


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
    """PyTorch's attention; on CPUs in float32 if there will be a backward pass.

    The CPU kernel's backward takes up to 5 times as long in half precision, most of all where steps are few.
    """
    if not (float32_attention(q) and torch.is_grad_enabled() and q.requires_grad):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=attn_mask, **options)
    mask = None if attn_mask is None else at_least_float32(attn_mask)
    with torch.autocast("cpu", enabled=False):
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
    """Add the bias and clamp what is visible."""
    hidden = bias == -math.inf
    clipped = (score + bias.masked_fill(hidden, 0.0)).clamp(-clip, clip)
    return clipped.masked_fill(hidden, -math.inf)


def _attend_by_queries(q_BHTD: Tensor, k: Tensor, v: Tensor, shown: _Shown, attend) -> Tensor:
    """Block after block of queries, each over all keys before: no T x T scores at once."""
    out = []
    for start in range(0, q_BHTD.shape[2], _BLOCK):
        q = q_BHTD[:, :, start : start + _BLOCK]
        end = start + q.shape[2]
        out.append(attend(q, k[:, :, :end], v[:, :, :end], shown.among_all(end, start)))
    return torch.cat(out, 2)


def _attend_in_blocks(q_BHTD: Tensor, k: Tensor, v: Tensor, shown: _Shown, attend) -> Tensor:
    """Sliding window: all blocks of queries at once, each over its own few keys."""
    window, num_steps = shown.pattern.window, q_BHTD.shape[2]
    # The first blocks' windows reach before the beginning; all others are alike.
    first = math.ceil((window - 1) / _BLOCK)
    head = first * _BLOCK
    blocks = math.ceil(num_steps / _BLOCK) - first
    q_MBHQD = F.pad(q_BHTD, (0, 0, 0, (first + blocks) * _BLOCK - num_steps))[:, :, head:]
    q_MBHQD = q_MBHQD.unflatten(2, (blocks, _BLOCK)).permute(2, 0, 1, 3, 4)
    k_MBHKD, v_MBHKD = (_blocks_of_keys(z, shown.pattern, first, blocks) for z in (k, v))
    bias = shown.in_blocks(first, blocks)
    tail = attend(*(z.flatten(0, 1) for z in (q_MBHQD, k_MBHKD, v_MBHKD)), bias)
    tail = tail.unflatten(0, (blocks, -1)).permute(1, 2, 0, 3, 4).flatten(2, 3)
    if not head:
        return tail[:, :, :num_steps]
    q, k, v = (z[:, :, :head] for z in (q_BHTD, k, v))
    start = attend(q, k, v, shown.among_all(head))
    return torch.cat((start, tail), 2)[:, :, :num_steps]


def _blocks_of_keys(
    x_BHTD: Tensor, pattern: AttentionPattern, first_block: int, num_blocks: int
) -> Tensor:
    """What each block of queries sees: the sinks, then from window - 1 before it to its end."""
    before = pattern.window - 1
    start = first_block * _BLOCK - before
    end = (first_block + num_blocks) * _BLOCK
    padded = F.pad(x_BHTD, (0, 0, 0, end - x_BHTD.shape[2]))[:, :, start:]
    x_MBHKD = padded.unfold(2, before + _BLOCK, _BLOCK).permute(2, 0, 1, 4, 3)
    if not pattern.num_sinks:
        return x_MBHKD
    sinks = x_BHTD[:, :, : pattern.num_sinks].expand(num_blocks, -1, -1, -1, -1)
    return torch.cat((sinks, x_MBHKD), 3)
