"""Trajectory encoders: from the embeddings of single steps to states that remember the trial.

`base` holds the contract every encoder keeps, `streams` the memory of rollouts, `transformer` with
`attention` and `kv_cache` the default encoder, `recurrent` with `recurrence` GRU and LSTM,
`feedforward` those without memory. A new encoder is one class with three functions of
tensors, see :class:`TrajectoryEncoder`.
"""

from torchrl_amago.modules.trajectory.base import TrajectoryEncoder
from torchrl_amago.modules.trajectory.feedforward import FeedForwardEncoder, IdentityEncoder
from torchrl_amago.modules.trajectory.kv_cache import RingCache
from torchrl_amago.modules.trajectory.recurrent import GRUEncoder, LSTMEncoder
from torchrl_amago.modules.trajectory.streams import Memory, StreamTable
from torchrl_amago.modules.trajectory.transformer import TransformerEncoder

__all__ = [
    "FeedForwardEncoder",
    "GRUEncoder",
    "IdentityEncoder",
    "LSTMEncoder",
    "Memory",
    "RingCache",
    "StreamTable",
    "TrajectoryEncoder",
    "TransformerEncoder",
]
