"""Trajectory encoders: from the embeddings of single steps to states that remember the trial.

`base` holds the contract every encoder keeps, `streams` the memory of rollouts, `transformer` with
`attention` and `kv_cache` the default encoder, `recurrent` with `recurrence` GRU and LSTM, `mamba`
with `selective_scan` and `mamba_kernels` Mamba, `linear_attention` with `gated_scan` gated linear
attention, `feedforward` those without memory; `state_memory` is what all with a state of constant
size remember. A new encoder is one class with three functions of tensors, see
:class:`TrajectoryEncoder`.
"""

from torchrl_amago.modules.trajectory.base import TrajectoryEncoder
from torchrl_amago.modules.trajectory.feedforward import FeedForwardEncoder, IdentityEncoder
from torchrl_amago.modules.trajectory.linear_attention import GatedLinearAttentionEncoder
from torchrl_amago.modules.trajectory.mamba import MambaEncoder
from torchrl_amago.modules.trajectory.memory import Memory, RingCache, StateMemory, StreamTable
from torchrl_amago.modules.trajectory.recurrent import GRUEncoder, LSTMEncoder
from torchrl_amago.modules.trajectory.transformer import TransformerEncoder

__all__ = [
    "FeedForwardEncoder",
    "GRUEncoder",
    "GatedLinearAttentionEncoder",
    "IdentityEncoder",
    "LSTMEncoder",
    "MambaEncoder",
    "Memory",
    "RingCache",
    "StateMemory",
    "StreamTable",
    "TrajectoryEncoder",
    "TransformerEncoder",
]
