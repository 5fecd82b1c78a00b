"""Tasks that need memory, as natively batched TorchRL environments, and bases for one's own."""

from torchrl_amago.envs.tasks.alchemy import SymbolicAlchemy
from torchrl_amago.envs.tasks.batched_task import BatchedTask
from torchrl_amago.envs.tasks.dark_key_door import DarkKeyDoor
from torchrl_amago.envs.tasks.frozen_lake import MetaFrozenLake, bayes_optimal_success
from torchrl_amago.envs.tasks.grid_task import GridTask
from torchrl_amago.envs.tasks.maze_runner import MazeRunner
from torchrl_amago.envs.tasks.tmaze import TMaze

__all__ = [
    "BatchedTask", "DarkKeyDoor", "GridTask", "MazeRunner", "MetaFrozenLake", "SymbolicAlchemy",
    "TMaze", "bayes_optimal_success",
]  # fmt: skip
