"""Pictures of mazes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchrl_amago.envs.tasks._canvas import Canvas

__all__ = ["draw_maze"]

_FLOOR, _WALL, _START = (244, 240, 230), (74, 82, 98), (196, 204, 190)
_NEXT, _LATER, _PIP = (250, 226, 150), (222, 228, 238), (64, 104, 176)

# Where a later goal has its dots: one for each goal that comes before it, seven at most.
_PIPS = ((0.5, 0.5), (0.3, 0.3), (0.7, 0.7), (0.3, 0.7), (0.7, 0.3), (0.5, 0.2), (0.5, 0.8))

Place = tuple[int, int]


def draw_maze(
    walls: np.ndarray, agent: Place, goals: Sequence[Place], start: Place, cell_pixels: int
) -> np.ndarray:
    """Draw a maze from above, with the goals that are left: a flag on the next one, dots on others.

    ``walls`` is bool ``[S, S]``; ``goals`` are in order.
    """
    canvas = Canvas(*walls.shape, cell_pixels, _FLOOR)
    for place in np.argwhere(walls):
        canvas.cell(*place).box(0, 1, 0, 1, _WALL)
    canvas.cell(*start).disc(0.5, 0.5, 0.40, _START, hole=0.31)
    for order, place in reversed(list(enumerate(goals))):
        cell = canvas.cell(*place)
        cell.box(0.05, 0.95, 0.05, 0.95, _LATER if order else _NEXT)
        if not order:
            cell.flag()
        for down, right in _PIPS[:order]:
            cell.disc(down, right, 0.09, _PIP)
    canvas.cell(*agent).agent()
    return canvas.image()
