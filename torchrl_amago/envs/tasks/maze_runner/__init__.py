"""Maze Runner: reach goals in order in an unknown maze."""

from torchrl_amago.envs.tasks.maze_runner.task import MazeRunner

__all__ = ["MazeRunner"]
