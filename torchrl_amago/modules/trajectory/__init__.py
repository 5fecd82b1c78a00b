"""Trajectory encoders: from the embeddings of single steps to states that remember the trial.

`base` holds the contract of every encoder, the other files one family each. `memory` holds the
memory of rollouts, `kernels` attention, scans and recurrences as functions of tensors. A new
encoder is one class with three functions of tensors, see :class:`TrajectoryEncoder`.
"""

from torchrl_amago.modules.trajectory.base import TrajectoryEncoder
from torchrl_amago.modules.trajectory.feedforward import FeedForwardEncoder, IdentityEncoder
from torchrl_amago.modules.trajectory.linear_attention import GatedLinearAttentionEncoder
from torchrl_amago.modules.trajectory.mamba import MambaEncoder
from torchrl_amago.modules.trajectory.memory import Memory, RingCache, StateMemory, StreamTable
from torchrl_amago.modules.trajectory.recurrent import GRUEncoder, LSTMEncoder
from torchrl_amago.modules.trajectory.transformer import TransformerEncoder

__all__ = [
    "FeedForwardEncoder", "GRUEncoder", "GatedLinearAttentionEncoder", "IdentityEncoder",
    "LSTMEncoder", "MambaEncoder", "Memory", "RingCache", "StateMemory", "StreamTable",
    "TrajectoryEncoder", "TransformerEncoder",
]  # fmt: skip
