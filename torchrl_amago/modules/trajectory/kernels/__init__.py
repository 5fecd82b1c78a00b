"""Sequence kernels: attention, scans and recurrences as functions of tensors."""

from torchrl_amago.modules.trajectory.kernels.attention import (
    AttentionPattern,
    ScoreBias,
    ring_attention,
    window_attention,
)
from torchrl_amago.modules.trajectory.kernels.gated_scan import (
    gated_linear_attention,
    gated_linear_attention_step,
)
from torchrl_amago.modules.trajectory.kernels.mamba_scan import selective_scan, selective_step
from torchrl_amago.modules.trajectory.kernels.rnn import recurrence

__all__ = [
    "AttentionPattern",
    "ScoreBias",
    "gated_linear_attention",
    "gated_linear_attention_step",
    "recurrence",
    "ring_attention",
    "selective_scan",
    "selective_step",
    "window_attention",
]
