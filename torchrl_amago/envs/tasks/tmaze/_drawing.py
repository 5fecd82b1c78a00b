"""Pictures of T-mazes."""

from __future__ import annotations

import numpy as np

from torchrl_amago.envs.tasks._canvas import Canvas, draw_agent

__all__ = ["draw_tmaze"]

_WALL = (70, 74, 84)
_FLOOR = (232, 226, 212)
_JOINT = (208, 200, 182)
_POLE = (92, 66, 48)
_FLAG = (216, 60, 62)
_LAMP = (252, 214, 92)

_COLUMNS = 6  # start, four cells for the corridor, junction


def draw_tmaze(
    progress: float, side: int, goal: int, *, sees_goal: bool, cell_pixels: int = 32
) -> np.ndarray:
    """Draw a T-maze from above: start left, arms right.

    Args:
        progress: fraction of the way from the start to the junction that the agent has come.
        side: 1 in the upper arm, -1 in the lower one, else 0.
        goal: side of the right arm.
        sees_goal: whether the agent is shown the goal: a lamp lights on its side.
        cell_pixels: side of a cell, in pixels, at least 8.

    Returns:
        uint8 ``[3 * cell_pixels, 6 * cell_pixels, 3]``.

    Raises:
        ValueError: if cells are too small to draw in.

    Examples:
        >>> from torchrl_amago.envs.tasks.tmaze._drawing import draw_tmaze
        >>> draw_tmaze(0.5, 0, 1, sees_goal=False, cell_pixels=16).shape
        (48, 96, 3)
    """
    canvas = Canvas(cell_pixels, rows=3, columns=_COLUMNS, colour=_WALL)
    junction = _COLUMNS - 1
    canvas.fill(canvas.box(1.04, 1.96, 0.04, junction + 0.96), _FLOOR)
    canvas.fill(canvas.box(0.04, 2.96, junction + 0.04, junction + 0.96), _FLOOR)
    for column in range(1, junction + 1):
        canvas.fill(canvas.line((1.2, column), (1.8, column), 0.03), _JOINT)
    canvas.pennant(1 - goal, junction, _FLAG, _POLE)
    if sees_goal:
        place = progress * junction + 0.5
        canvas.fill(canvas.disc(1.5 - goal, place, 0.26), _LAMP)
        canvas.fill(canvas.line((1.5 - 0.3 * goal, place), (1.5 - 0.75 * goal, place), 0.08), _LAMP)
    draw_agent(canvas, 1.0 - side, progress * junction)
    return canvas.image()
