"""Tasks that need memory, written as natively batched TorchRL environments.

``MetaFrozenLake`` is the first example's task, and ``bayes_optimal_success`` says how well the best possible
agent does on it; ``TMaze`` tests recall alone, ``DarkKeyDoor`` finding things again, ``MazeRunner`` following
goals, with or without hindsight. ``BatchedTask`` is what they share, and a base for one's own.
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
    draw_lake,
    enumerate_lakes,
    in_split,
    is_crossable,
    random_lakes,
)
from torchrl_amago.envs.tasks.maze_runner import MazeRunner
from torchrl_amago.envs.tasks.tmaze import TMaze

__all__ = [
    "LAKE_SPLITS",
    "BatchedTask",
    "BayesOptimum",
    "DarkKeyDoor",
    "LakePlanner",
    "LakeSplit",
    "MazeRunner",
    "MetaFrozenLake",
    "TMaze",
    "bayes_optimal_success",
    "draw_lake",
    "enumerate_lakes",
    "in_split",
    "is_crossable",
    "random_lakes",
]
