"""Tasks that need memory, as natively batched TorchRL environments.

``MetaFrozenLake`` tests adaptation, and ``bayes_optimal_success`` computes the results of the best
possible agent there; ``TMaze`` tests recall alone, ``DarkKeyDoor`` finding things again,
``MazeRunner`` following goals, with or without hindsight. ``BatchedTask`` and ``GridTask`` are their
bases, also for tasks of one's own.
"""

from __future__ import annotations

from torchrl_amago.envs.tasks.batched_task import BatchedTask
from torchrl_amago.envs.tasks.dark_key_door import DarkKeyDoor
from torchrl_amago.envs.tasks.frozen_lake import (
    LAKE_SPLITS,
    BayesOptimum,
    LakePlanner,
    LakeSplit,
    MetaFrozenLake,
    bayes_optimal_success,
    enumerate_lakes,
    in_split,
    is_crossable,
    random_lakes,
)
from torchrl_amago.envs.tasks.grid_task import GridTask
from torchrl_amago.envs.tasks.maze_runner import MazeRunner
from torchrl_amago.envs.tasks.tmaze import TMaze

__all__ = [
    "LAKE_SPLITS",
    "BatchedTask",
    "BayesOptimum",
    "DarkKeyDoor",
    "GridTask",
    "LakePlanner",
    "LakeSplit",
    "MazeRunner",
    "MetaFrozenLake",
    "TMaze",
    "bayes_optimal_success",
    "enumerate_lakes",
    "in_split",
    "is_crossable",
    "random_lakes",
]
