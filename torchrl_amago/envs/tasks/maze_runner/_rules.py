"""The rules of MazeRunner as functions of tensors: where moves lead, how far one can see.

A cell is one number, ``size * first coordinate + second coordinate``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_amago.envs.tasks.frozen_lake._rules import MOVES

__all__ = ["depth_table", "move_steps"]


def move_steps(size: int) -> Tensor:
    """What each action adds to the cell's number, int64 ``[5]``: stay, down, up, right, left.

    Examples:
        >>> from torchrl_amago.envs.tasks.maze_runner._rules import move_steps
        >>> move_steps(7).tolist()
        [0, 7, -7, 1, -1]
    """
    return torch.tensor(MOVES) @ torch.tensor([size, 1])


def depth_table(walls: Tensor) -> Tensor:
    """How many free cells lie between each cell and the next wall in four directions.

    Args:
        walls: bool ``[N, S, S]``, True at walls; the outermost cells are walls.

    Returns:
        float32 ``[N, S * S, 4]``, divided by S: west (left), north (up), east, south. What it says
        of cells that are walls themselves means nothing.

    Examples:
        >>> import torch
        >>> from torchrl_amago.envs.tasks.maze_runner._rules import depth_table
        >>> walls = torch.tensor([[[1, 1, 1, 1], [1, 0, 0, 1], [1, 1, 1, 1], [1, 1, 1, 1]]]).bool()
        >>> (4 * depth_table(walls))[0, 5].tolist()  # in cell (1, 1) one free cell lies to the east
        [0.0, 0.0, 1.0, 0.0]
    """
    size = walls.shape[-1]
    depths = [
        _free_before(walls, -1),
        _free_before(walls, -2),
        _free_before(walls.flip(-1), -1).flip(-1),
        _free_before(walls.flip(-2), -2).flip(-2),
    ]
    return torch.stack(depths, -1).flatten(1, 2) / size


def _free_before(walls: Tensor, dim: int) -> Tensor:
    """Free cells between each cell and the last wall before it along a dimension."""
    shape = [1, 1, 1]
    shape[dim] = walls.shape[dim]
    place = torch.arange(walls.shape[dim], device=walls.device).view(shape)
    last_wall = torch.where(walls, place, 0).cummax(dim).values
    return place - 1 - last_wall
