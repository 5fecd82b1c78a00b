"""Patterns of attention: the steps that a step sees, as a bias on its scores.

Legend: B batch, T steps, S sinks, M blocks of queries, Q queries of a block, K keys of a block.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from numbers import Integral

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
        if self.window is not None:
            check_counts("A step always sees itself.", window=self.window)
        is_count = isinstance(self.num_sinks, Integral) and self.num_sinks >= 0
        fits = not self.num_sinks or self.window is not None
        bias_fits = not self.sink_bias or (self.num_sinks and math.isfinite(self.sink_bias))
        if not (is_count and fits and bias_fits):
            raise ValueError(
                "num_sinks must be at least 0, 0 without a window, and positive with a finite "
                f"sink_bias; got num_sinks={self.num_sinks}, window={self.window}, "
                f"sink_bias={self.sink_bias}. Sinks are seen beyond the window."
            )
        if self.logit_clip is not None:
            check_positive("Leave it out not to clip.", logit_clip=self.logit_clip)


class ScoreBias:
    """Bias on attention scores: 0 (or the sinks' bias) where step i sees step j, else -inf.

    Step i sees step j of its own trial if 0 <= i - j < window, or if j is a sink and j <= i.

    Args:
        pattern: window and sinks.
        positions_BT: steps since the trial began; needed for sinks.
        is_init_BT: True at first steps of trials; None if rows hold one trial each.
        like: gives device and dtype.
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
        step_T = torch.arange(num_steps, device=self.like.device)
        age_QT = step_T[first_query:, None] - step_T
        visible = self._in_window(age_QT)[None]
        sink = None
        if self.sink_BT is not None:
            sink = self.sink_BT[:, None, :num_steps]
            visible = visible | ((age_QT >= 0) & sink)
        if self.trial_BT is not None:
            trial_BT = self.trial_BT[:, :num_steps]
            visible = visible & (trial_BT[:, first_query:, None] == trial_BT[:, None])
        return self._bias(visible, sink).unsqueeze(1)

    def blocks(self, first_block: int, num_blocks: int) -> Tensor:
        """Return the bias of blocks of queries among their own keys: `[M B or 1, 1, Q, K]`.

        A block's keys are the sinks, then the steps from `window - 1` before it to its end.
        """
        window, device = self.pattern.window, self.like.device
        key_K = torch.arange(window - 1 + self.BLOCK, device=device) - (window - 1)
        query_Q = torch.arange(self.BLOCK, device=device)
        visible = self._in_window(query_Q[:, None] - key_K)[None]
        if self.trial_BT is None and self.sink_BT is None:
            return self._bias(visible, None).unsqueeze(1)
        start_M1 = torch.arange(first_block, first_block + num_blocks, device=device)[:, None]
        start_M1 = start_M1 * self.BLOCK

        def per_block(value_BT: Tensor, offset_X: Tensor) -> Tensor:
            last = value_BT.shape[1] - 1
            return value_BT[:, (start_M1 + offset_X).clamp(max=last)].transpose(0, 1)

        if self.sink_BT is None:
            trial_MBQ, trial_MBK = (per_block(self.trial_BT, z) for z in (query_Q, key_K))
            visible = visible & (trial_MBQ[..., None] == trial_MBK[:, :, None])
            return self._bias(visible, None).flatten(0, 1).unsqueeze(1)
        # Sinks have columns of their own, seen once the window has passed them.
        num_sinks = min(self.pattern.num_sinks, self.sink_BT.shape[1])
        sink_BS = self.sink_BT[:, :num_sinks]
        age_MQS = (start_M1 + query_Q)[..., None] - torch.arange(num_sinks, device=device)
        beyond_MBQS = (age_MQS >= window)[:, None] & sink_BS[:, None]
        sink_MBK = per_block(self.sink_BT, key_K)
        visible = visible.expand(*sink_MBK.shape[:2], self.BLOCK, -1)
        sink = torch.cat((sink_BS.expand(num_blocks, -1, -1), sink_MBK), -1)
        bias = self._bias(torch.cat((beyond_MBQS, visible), -1), sink[:, :, None])
        return bias.flatten(0, 1).unsqueeze(1)

    def _in_window(self, age: Tensor) -> Tensor:
        window = self.pattern.window
        return (age >= 0) if window is None else (age >= 0) & (age < window)

    def _bias(self, visible: Tensor, sink: Tensor | None) -> Tensor:
        bias = self.like.new_zeros(())
        if self.pattern.sink_bias and sink is not None:
            bias = torch.where(sink, self.pattern.sink_bias, bias)
        return torch.where(visible, bias, -math.inf)
