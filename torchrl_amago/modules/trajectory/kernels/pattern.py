"""Patterns of attention: the steps that a step sees, as a bias on its scores.

Legend: B batch, T steps, S sinks, M blocks of queries, Q queries of a block, K keys of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from torchrl_amago._validation import check_counts, check_positive


@dataclass(frozen=True)
class AttentionPattern:
    """Steps that a step attends to, and changes to their scores.

    Args:
        window: number of steps that a step sees, itself included; None for all of its trial.
        num_sinks: number of a trial's first steps that stay visible beyond the window, attention
            sinks (arXiv 2309.17453). By position: a slice that starts later has none.
        sink_bias: added to scores of sinks.
        logit_clip: scores are clamped to plus and minus this, before the softmax.

    Example:
        >>> AttentionPattern(window=256, num_sinks=4)
        AttentionPattern(window=256, num_sinks=4, sink_bias=0.0, logit_clip=None)
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


def _take(value_BT: Tensor, step_MX: Tensor) -> Tensor:
    """Values at the given steps, `[M, B, X]`; at a row's end for those past it."""
    return value_BT[:, step_MX.clamp(max=value_BT.shape[1] - 1)].transpose(0, 1)
