"""Pictures of T-mazes."""

from __future__ import annotations

import numpy as np

from torchrl_amago.envs.tasks._canvas import Canvas

__all__ = ["draw_tmaze"]

_WALL, _FLOOR, _JOINT, _LAMP = (70, 74, 84), (232, 226, 212), (208, 200, 182), (252, 214, 92)

_JUNCTION = 5  # the column after the start and four cells for the corridor


def draw_tmaze(
    progress: float, side: int, goal: int, sees_goal: bool, cell_pixels: int
) -> np.ndarray:
    """Draw a T-maze from above: start left, arms right, a lamp on the goal's side while it shows.

    ``progress`` is the fraction of the corridor that lies behind the agent; ``side`` is 1 in the
    upper arm, -1 in the lower one, else 0; ``goal`` is the side of the right arm.
    """
    canvas = Canvas(3, _JUNCTION + 1, cell_pixels, _WALL)
    for place in [(1, column) for column in range(_JUNCTION + 1)] + [
        (0, _JUNCTION),
        (2, _JUNCTION),
    ]:
        cell = canvas.cell(*place)
        cell.box(0, 1, 0, 1, _FLOOR)
        cell.frame(0.02, _JOINT)
    canvas.cell(1 - goal, _JUNCTION).flag()
    if sees_goal:
        canvas.cell(1 - goal, progress * _JUNCTION).disc(0.5, 0.5, 0.26, _LAMP)
    canvas.cell(1 - side, progress * _JUNCTION).agent()
    return canvas.image()
