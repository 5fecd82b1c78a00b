"""Pictures of frozen lakes."""

from __future__ import annotations

import numpy as np

from torchrl_amago.envs.tasks._canvas import Canvas

__all__ = ["draw_lake"]

_ICE, _GRID, _START, _GOAL = (214, 234, 246), (176, 206, 226), (160, 205, 188), (250, 226, 150)
_RIM, _WATER, _DEEP = (124, 160, 190), (24, 52, 92), (12, 30, 60)


def draw_lake(
    holes: np.ndarray, opened: np.ndarray, agent: tuple[int, int], cell_pixels: int
) -> np.ndarray:
    """Draw a lake from above: start top left, goal bottom right.

    ``holes`` and ``opened`` are bool ``[S, S]``. Holes that opened during the episode are smaller.
    """
    size = len(holes)
    canvas = Canvas(size, size, cell_pixels, _ICE)
    for place in np.ndindex(size, size):
        cell = canvas.cell(*place)
        if place == (0, 0):
            cell.disc(0.5, 0.5, 0.40, _START, hole=0.31)
        if place == (size - 1, size - 1):
            cell.box(0, 1, 0, 1, _GOAL)
            cell.flag()
        if holes[place] or opened[place]:
            radius = 0.38 if holes[place] else 0.22
            cell.disc(0.5, 0.5, radius + 0.05, _RIM)
            cell.disc(0.5, 0.5, radius, _WATER)
            cell.disc(0.56, 0.53, 0.66 * radius, _DEEP)
        cell.frame(0.02, _GRID)
    canvas.cell(*agent).agent()
    return canvas.image()
