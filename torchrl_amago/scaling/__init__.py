"""Several devices, processes and machines for one run (docs/scaling.md)."""

from torchrl_amago._signals import EXIT_CODES, Outcome
from torchrl_amago.scaling.devices import (
    BatchFeed,
    CudaGraphs,
    collector_devices,
    compile_policy,
    pick_device,
    send,
)
from torchrl_amago.scaling.pool import WorkerPool
from torchrl_amago.scaling.ranks import Ranks
from torchrl_amago.scaling.ray_pool import RayPool
from torchrl_amago.scaling.roles import collect, evaluate_run

__all__ = [
    "EXIT_CODES", "BatchFeed", "CudaGraphs", "Outcome", "Ranks", "RayPool", "WorkerPool", "collect",
    "collector_devices", "compile_policy", "evaluate_run", "pick_device", "send",
]  # fmt: skip
