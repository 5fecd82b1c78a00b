"""Several devices, processes and machines for one run (docs/scaling.md)."""

from torchrl_amago.scaling.compiled import CudaGraphs, QueuedUpdate, compile_policy
from torchrl_amago.scaling.devices import BatchFeed, collector_devices, pick_device, send

__all__ = [
    "BatchFeed",
    "CudaGraphs",
    "QueuedUpdate",
    "collector_devices",
    "compile_policy",
    "pick_device",
    "send",
]
