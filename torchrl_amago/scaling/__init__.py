"""From one process to many: workers, roles on a shared run folder (docs/scaling.md)."""

from torchrl_amago.scaling._learner import RemoteTrials
from torchrl_amago.scaling._stop import EXIT_CODES
from torchrl_amago.scaling.evaluate import evaluate_run
from torchrl_amago.scaling.pool import WorkerPool
from torchrl_amago.scaling.ray_pool import RayPool
from torchrl_amago.scaling.worker import collect

__all__ = ["EXIT_CODES", "RayPool", "RemoteTrials", "WorkerPool", "collect", "evaluate_run"]
