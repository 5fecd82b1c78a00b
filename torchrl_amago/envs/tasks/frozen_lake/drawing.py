"""Pictures of frozen lakes."""

from __future__ import annotations

import numpy as np

from torchrl_amago.envs.tasks._canvas import Canvas, draw_agent

__all__ = ["draw_lake"]

_ICE = (214, 234, 246)
_SHINE = (236, 246, 252)
_GRID = (176, 206, 226)
_START = (160, 205, 188)
_RIM = (124, 160, 190)
_WATER = (24, 52, 92)
_DEEP = (12, 30, 60)
_CRACK = (88, 122, 156)
_POLE = (92, 66, 48)
_FLAG = (216, 60, 62)
_GOAL = (250, 226, 150)


def draw_lake(
    holes: np.ndarray,
    agent: tuple[int, int] | None = None,
    *,
    opened: np.ndarray | None = None,
    cell_pixels: int = 32,
) -> np.ndarray:
    """Draw a lake seen from above: start top left, goal bottom right.

    Args:
        holes: bool ``[S, S]``, True where the ice is missing.
        agent: the agent's (down, right) cell, or None to leave it out.
        opened: bool ``[S, S]``, holes that opened during the episode, drawn cracked.
        cell_pixels: side of a cell, in pixels, at least 8.

    Returns:
        uint8 ``[S * cell_pixels, S * cell_pixels, 3]``.

    Raises:
        ValueError: if cells are too small to draw in.

    Examples:
        >>> import numpy as np
        >>> from torchrl_amago.envs.tasks.frozen_lake.drawing import draw_lake
        >>> draw_lake(np.zeros((3, 3), dtype=bool), (0, 0), cell_pixels=24).shape
        (72, 72, 3)
    """
    size = holes.shape[0]
    opened = np.zeros_like(holes) if opened is None else opened
    picture = np.empty((size * cell_pixels, size * cell_pixels, 3), dtype=np.uint8)
    for down in range(size):
        for right in range(size):
            tile = Canvas(cell_pixels, colour=_ICE)
            _draw_ground(
                tile,
                is_start=(down, right) == (0, 0),
                is_goal=(down, right) == (size - 1, size - 1),
                is_hole=bool(holes[down, right]),
                is_opened=bool(opened[down, right]),
            )
            if agent == (down, right):
                draw_agent(tile)
            rows = slice(down * cell_pixels, (down + 1) * cell_pixels)
            picture[rows, right * cell_pixels : (right + 1) * cell_pixels] = tile.image()
    return picture


def _draw_ground(
    tile: Canvas, *, is_start: bool, is_goal: bool, is_hole: bool, is_opened: bool
) -> None:
    tile.fill(tile.line((0.42, 0.12), (0.16, 0.38), 0.05), _SHINE)
    tile.fill(tile.line((0.86, 0.62), (0.60, 0.88), 0.05), _SHINE)
    if is_start:
        tile.fill(tile.disc(0.5, 0.5, 0.40) & ~tile.disc(0.5, 0.5, 0.31), _START)
    if is_goal:
        _draw_goal(tile)
    if is_opened:
        for end in ((0.06, 0.20), (0.16, 0.92), (0.90, 0.08), (0.94, 0.80), (0.52, 0.97)):
            tile.fill(tile.line((0.5, 0.5), end, 0.05), _CRACK)
    if is_hole or is_opened:
        radius = 0.38 if is_hole else 0.26
        tile.fill(tile.disc(0.5, 0.5, radius + 0.05), _RIM)
        tile.fill(tile.disc(0.5, 0.5, radius), _WATER)
        tile.fill(tile.disc(0.56, 0.53, radius * 0.66), _DEEP)
    border = ~tile.box(0.02, 0.98, 0.02, 0.98)
    tile.fill(border, _GRID)


def _draw_goal(tile: Canvas) -> None:
    tile.fill(tile.box(0.0, 1.0, 0.0, 1.0), _GOAL)
    tile.fill(tile.disc(0.86, 0.36, 0.20, flatness=0.3), _RIM)
    tile.pennant(0.0, 0.0, _FLAG, _POLE)
