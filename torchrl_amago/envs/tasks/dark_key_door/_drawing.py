"""Pictures of rooms with a key and a door."""

from __future__ import annotations

import numpy as np

from torchrl_amago.envs.tasks._canvas import Canvas, draw_agent

__all__ = ["draw_room"]

_DARK, _DARK_GRID = (92, 96, 112), (72, 76, 92)
_LIGHT, _LIGHT_GRID = (238, 232, 218), (206, 198, 180)
_KEY = (246, 206, 74)
_DOOR, _OPENING, _KNOB = (122, 78, 46), (46, 34, 28), (246, 206, 74)

Cell = tuple[int, int]


def draw_room(
    size: int,
    agent: Cell,
    key: Cell,
    door: Cell,
    *,
    has_key: bool,
    dark: bool = True,
    cell_pixels: int = 32,
) -> np.ndarray:
    """Draw a room seen from above.

    Args:
        size: cells per side.
        agent: its (down, right) cell; likewise key and door.
        key: drawn small beside the agent once it has it.
        door: drawn open once the agent has the key.
        has_key: whether it has.
        dark: draw the floor dark.
        cell_pixels: side of a cell, in pixels, at least 8.

    Returns:
        uint8 ``[size * cell_pixels, size * cell_pixels, 3]``.

    Raises:
        ValueError: if cells are too small to draw in.

    Examples:
        >>> from torchrl_amago.envs.tasks.dark_key_door._drawing import draw_room
        >>> draw_room(5, (0, 0), (1, 2), (4, 4), has_key=False, cell_pixels=16).shape
        (80, 80, 3)
    """
    floor, grid = (_DARK, _DARK_GRID) if dark else (_LIGHT, _LIGHT_GRID)
    canvas = Canvas(cell_pixels, rows=size, columns=size, colour=floor)
    for line in range(size + 1):
        canvas.fill(canvas.box(line - 0.02, line + 0.02, 0, size), grid)
        canvas.fill(canvas.box(0, size, line - 0.02, line + 0.02), grid)
    _draw_door(canvas, *door, is_open=has_key)
    if not has_key:
        _draw_key(canvas, key[0] + 0.5, key[1] + 0.5, scale=1.0)
    draw_agent(canvas, *agent)
    if has_key:
        _draw_key(canvas, agent[0] + 0.84, agent[1] + 0.6, scale=0.6)
    return canvas.image()


def _draw_door(canvas: Canvas, down: float, right: float, *, is_open: bool) -> None:
    canvas.fill(canvas.box(down + 0.08, down + 0.94, right + 0.18, right + 0.82), _DOOR)
    if is_open:
        canvas.fill(canvas.box(down + 0.15, down + 0.94, right + 0.26, right + 0.74), _OPENING)
    else:
        canvas.fill(canvas.disc(down + 0.54, right + 0.70, 0.05), _KNOB)


def _draw_key(canvas: Canvas, down: float, right: float, *, scale: float) -> None:
    bow = canvas.disc(down, right - 0.2 * scale, 0.16 * scale)
    hole = canvas.disc(down, right - 0.2 * scale, 0.07 * scale)
    shaft = canvas.line((down, right - 0.05 * scale), (down, right + 0.3 * scale), 0.08 * scale)
    bits = [
        canvas.line((down, right + bit * scale), (down + 0.13 * scale, right + bit * scale), 0.07 * scale)
        for bit in (0.18, 0.29)
    ]  # fmt: skip
    canvas.fill((bow & ~hole) | shaft | bits[0] | bits[1], _KEY)
