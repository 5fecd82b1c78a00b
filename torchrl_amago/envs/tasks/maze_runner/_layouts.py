"""Random mazes and goals, drawn for a whole batch at once, and the tables of a maze's views.

Walls grow as in mazelab's random mazes, which AMAGO's MazeRunner uses: from random nodes of a grid
(every second cell) to random neighbours where nothing stands yet. So they enclose nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

# mazelab's density: walls for each cell between the nodes.
_DENSITY = 0.75

# The grid is worked on with this many cells of wall around it: a step from its edge ends in them.
_RIM = 2

# The lobby: an alley, a room on either side, and four walls between and around them.
SMALLEST_SIZE = 7


def random_mazes(num: int, size: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw mazes whose free cells are all connected, on the generator's device.

    Returns bool ``[num, size, size]``, True at walls. ``size`` is odd and at least 7. The lower
    part is the same in all mazes, a lobby: a passage from side to side, and below it an alley
    between two rooms, where the agent starts.
    """
    wall = _grown_walls(num, size, generator)
    middle = size // 2
    wall[:, -5:-1, 1:-1] = False
    wall[:, -4:-1, [middle - 1, middle + 1]] = True
    return wall


def start_cell(size: int) -> int:
    """Return the cell at the bottom of the middle alley, ``size * first coordinate + second``."""
    return size * (size - 2) + size // 2


def random_goals(walls: Tensor, num_goals: int, generator: torch.Generator | None = None) -> Tensor:
    """Draw k goals of each maze, bool ``[N, S, S]``: different free cells, int64 ``[N, k]``."""
    score = torch.rand(walls.shape, generator=generator, device=walls.device)
    score = score.masked_fill(walls, -1.0).flatten(1)
    score[:, start_cell(walls.shape[-1])] = -1.0
    return score.topk(num_goals, dim=-1).indices


def _grown_walls(num: int, size: int, generator: torch.Generator | None) -> Tensor:
    """Draw border and random walls; in each maze, the next wall begins where one is stuck."""
    device = None if generator is None else generator.device
    width = size + 2 * _RIM
    wall = torch.ones(num, width, width, dtype=torch.bool, device=device)
    wall[:, _RIM + 1 : -_RIM - 1, _RIM + 1 : -_RIM - 1] = False
    flat = wall.view(-1)
    offset_4 = torch.tensor([-1, 1, -width, width], device=device)
    maze_N = width * width * torch.arange(num, device=device)
    remaining_N = torch.full_like(maze_N, int(_DENSITY * (size // 2) ** 2))
    # A corner of the border, where nothing can grow: the first thing that happens is a new wall.
    node_N = maze_N + _RIM * (width + 1)
    while True:
        is_free_N4 = ~flat.take(node_N.unsqueeze(-1) + 2 * offset_4)
        grows_N = is_free_N4.any(-1)
        begins_N = ~grows_N & (remaining_N > 0)
        if not (grows_N | begins_N).any():
            return wall[:, _RIM:-_RIM, _RIM:-_RIM].clone()
        uniform_N4 = torch.rand(is_free_N4.shape, generator=generator, device=device)
        step_N = offset_4.take(torch.where(is_free_N4, uniform_N4, -1.0).argmax(-1))
        node_2N = torch.randint(size // 2 + 1, (2, num), generator=generator, device=device)
        begin_N = maze_N + (_RIM + 2 * node_2N[0]) * width + _RIM + 2 * node_2N[1]
        between_N = torch.where(grows_N, node_N + step_N, node_N)
        node_N = torch.where(grows_N, node_N + 2 * step_N, torch.where(begins_N, begin_N, node_N))
        flat.index_fill_(0, between_N, True)
        flat.index_fill_(0, node_N, True)
        remaining_N -= begins_N.long()


def depth_table(walls: Tensor) -> Tensor:
    """Count the free cells between each cell and the next wall, for walls bool ``[N, S, S]``.

    Returns float32 ``[N, S * S, 4]``, divided by S: west (left), north (up), east, south. The
    outermost cells must be walls; entries of walls themselves mean nothing.
    """
    size, depths = walls.shape[-1], []
    place = torch.arange(size, device=walls.device)
    for turns in range(4):  # each turn brings the next direction to the west
        last_wall = torch.where(walls.rot90(turns, (1, 2)), place, 0).cummax(-1).values
        depths.append((place - 1 - last_wall).rot90(-turns, (1, 2)))
    return torch.stack(depths, -1).flatten(1, 2) / size
