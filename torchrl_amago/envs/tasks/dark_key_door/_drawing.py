"""Pictures of rooms with a key and a door."""

from __future__ import annotations

import numpy as np

from torchrl_amago.envs.tasks._canvas import Canvas, Cell

__all__ = ["draw_room"]

_DARK, _LIGHT = (92, 96, 112), (238, 232, 218)
_DARK_GRID, _LIGHT_GRID = (72, 76, 92), (206, 198, 180)
_KEY, _DOOR, _OPENING = (246, 206, 74), (122, 78, 46), (46, 34, 28)

Place = tuple[int, int]


def draw_room(
    size: int, agent: Place, key: Place, door: Place, has_key: bool, dark: bool, cell_pixels: int
) -> np.ndarray:
    """Draw a room from above; once the agent has the key, it carries it and the door is open."""
    canvas = Canvas(size, size, cell_pixels, _DARK if dark else _LIGHT)
    for place in np.ndindex(size, size):
        canvas.cell(*place).frame(0.02, _DARK_GRID if dark else _LIGHT_GRID)
    cell = canvas.cell(*door)
    cell.box(0.08, 0.94, 0.18, 0.82, _DOOR)
    if has_key:
        cell.box(0.15, 0.94, 0.26, 0.74, _OPENING)
    else:
        cell.disc(0.54, 0.70, 0.05, _KEY)
        _draw_key(canvas.cell(*key))
    canvas.cell(*agent).agent()
    if has_key:
        _draw_key(canvas.cell(agent[0] + 0.54, agent[1] + 0.3, scale=0.6))
    return canvas.image()


def _draw_key(cell: Cell) -> None:
    cell.disc(0.5, 0.3, 0.16, _KEY, hole=0.07)
    cell.box(0.46, 0.54, 0.42, 0.83, _KEY)
    cell.box(0.5, 0.66, 0.64, 0.71, _KEY)
    cell.box(0.5, 0.66, 0.76, 0.83, _KEY)
