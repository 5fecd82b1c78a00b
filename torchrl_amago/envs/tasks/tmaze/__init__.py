"""Passive T-Maze: remember one cue down a corridor."""

from torchrl_amago.envs.tasks.tmaze.task import TMaze

__all__ = ["TMaze"]
