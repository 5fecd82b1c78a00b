"""Several devices, processes and machines for one run (docs/scaling.md)."""

from torchrl_amago.scaling.compiled import CudaGraphs, QueuedUpdate, compile_policy
from torchrl_amago.scaling.devices import BatchFeed, collector_devices, pick_device, send
from torchrl_amago.scaling.ranks import Ranks

__all__ = [
    "BatchFeed",
    "CudaGraphs",
    "QueuedUpdate",
    "Ranks",
    "collector_devices",
    "compile_policy",
    "pick_device",
    "send",
]
