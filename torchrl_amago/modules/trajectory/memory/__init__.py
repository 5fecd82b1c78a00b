"""Memory of rollouts: tensors that an encoder keeps between the steps of several environments."""

from torchrl_amago.modules.trajectory.memory.base import Memory, StateMemory
from torchrl_amago.modules.trajectory.memory.ring_cache import RingCache
from torchrl_amago.modules.trajectory.memory.streams import StreamTable

__all__ = ["Memory", "RingCache", "StateMemory", "StreamTable"]
