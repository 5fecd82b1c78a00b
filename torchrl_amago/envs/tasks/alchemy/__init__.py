"""Symbolic Alchemy, its chemistries, and the best return for one who knows them."""

from torchrl_amago.envs.tasks.alchemy.planner import optimal_return
from torchrl_amago.envs.tasks.alchemy.task import SymbolicAlchemy

__all__ = ["SymbolicAlchemy", "optimal_return"]
