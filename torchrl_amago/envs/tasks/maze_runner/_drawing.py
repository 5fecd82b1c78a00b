"""Pictures of mazes."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from torchrl_amago.envs.tasks._canvas import Canvas, draw_agent

__all__ = ["draw_maze"]

_FLOOR, _WALL, _START = (244, 240, 230), (74, 82, 98), (196, 204, 190)
_PLATE, _FLAG, _POLE = (250, 226, 150), (216, 60, 62), (92, 66, 48)
_LATER_PLATE, _PIP = (222, 228, 238), (64, 104, 176)

# Dots of a later goal, as places in the cell: one for each goal that comes before it.
_PIPS = ((0.5, 0.5), (0.3, 0.3), (0.7, 0.7), (0.3, 0.7), (0.7, 0.3), (0.5, 0.2), (0.5, 0.8))

Cell = tuple[int, int]


def draw_maze(
    walls: np.ndarray,
    agent: Cell,
    goals: Sequence[Cell],
    *,
    start: Cell | None = None,
    cell_pixels: int = 32,
) -> np.ndarray:
    """Draw a maze seen from above.

    Args:
        walls: bool ``[S, S]``, True at walls.
        agent: its (down, right) cell.
        goals: those not reached yet, in order: the next one gets the flag, each later one as many
            dots as there are goals before it (seven at most).
        start: marked with a ring, if given.
        cell_pixels: side of a cell, in pixels, at least 8.

    Returns:
        uint8 ``[S * cell_pixels, S * cell_pixels, 3]``.

    Raises:
        ValueError: if cells are too small to draw in.

    Examples:
        >>> import numpy as np
        >>> from torchrl_amago.envs.tasks.maze_runner._drawing import draw_maze
        >>> draw_maze(np.zeros((7, 7), dtype=bool), (5, 3), [(1, 1)], cell_pixels=16).shape
        (112, 112, 3)
    """
    size = len(walls)
    canvas = Canvas(cell_pixels, rows=size, columns=size, colour=_FLOOR)
    fine = len(canvas.down) // size
    canvas.fill(walls.repeat(fine, 0).repeat(fine, 1), _WALL)
    if start is not None:
        down, right = start[0] + 0.5, start[1] + 0.5
        ring = canvas.disc(down, right, 0.40) & ~canvas.disc(down, right, 0.31)
        canvas.fill(ring, _START)
    for order, (down, right) in reversed(list(enumerate(goals))):
        plate = canvas.box(down + 0.05, down + 0.95, right + 0.05, right + 0.95)
        canvas.fill(plate, _LATER_PLATE if order else _PLATE)
        if not order:
            canvas.pennant(down, right, _FLAG, _POLE)
        for pip_down, pip_right in _PIPS[:order]:
            canvas.fill(canvas.disc(down + pip_down, right + pip_right, 0.09), _PIP)
    draw_agent(canvas, *agent)
    return canvas.image()
