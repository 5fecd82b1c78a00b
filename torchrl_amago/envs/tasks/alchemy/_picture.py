"""The picture of an episode of Alchemy: stones, potions, and the chemistry beside them."""

from __future__ import annotations

import numpy as np
from torch import Tensor

from torchrl_amago.envs.tasks._canvas import PLATE, Canvas, Cell, Colour
from torchrl_amago.envs.tasks.alchemy.chemistry import (
    MAX_STONES,
    NUM_AXES,
    NUM_STONE_TYPES,
    USED_POTION,
)

_TABLE, _LINES, _SHADE, _DOT = (240, 236, 228), (220, 214, 202), (206, 200, 188), (52, 46, 60)
# Colours 2 k and 2 k + 1 are opposites in every chemistry.
_COLOURS = (
    (214, 64, 60), (60, 150, 84), (238, 150, 44), (70, 196, 204), (240, 208, 68), (156, 84, 190),
)  # fmt: skip
_STONE_COLOURS = {-1: (112, 128, 214), 0: (150, 116, 190), 1: (196, 104, 160)}
_COLUMNS = 6


def draw_table(
    stones: Tensor,
    potions: Tensor,
    colour_of: Tensor,
    moves: Tensor,
    cell_pixels: int,
) -> np.ndarray:
    """Draw the stones, the three axes of the chemistry, and two lines of potions.

    An axis shows the colours that raise and lower its coordinate, with four dots between them for
    its edges, hollow where there is none.

    Args:
        stones: features, ``[3, 5]``.
        potions: latent potions, ``[12]``.
        colour_of: colour of each latent potion, from 1, ``[6]`` or more.
        moves: stone after each potion, of one graph, ``[6, 8]`` or more.
        cell_pixels: side of a cell.
    """
    canvas = Canvas(3, _COLUMNS, cell_pixels, _TABLE, _LINES)
    for place, stone in enumerate(stones.tolist()):
        _draw_stone(canvas.cell(0, place), stone)
    for axis in range(NUM_AXES):
        cell = canvas.cell(0, MAX_STONES + axis)
        cell.fill(_SHADE)
        for up, top in ((1, 0.05), (0, 0.70)):
            cell.box(top, top + 0.25, 0.1, 0.9, _COLOURS[colour_of[2 * axis + up] - 1])
        low = [stone for stone in range(NUM_STONE_TYPES) if not stone >> axis & 1]
        for dot, stone in enumerate(low):
            missing = moves[2 * axis + 1][stone] == stone
            cell.disc(0.5, 0.17 + 0.22 * dot, 0.09, _DOT, hole=0.06 if missing else 0.0)
    for place, potion in enumerate(potions.tolist()):
        cell = canvas.cell(1 + place // _COLUMNS, place % _COLUMNS)
        if potion == USED_POTION:
            cell.disc(0.5, 0.5, 0.3, _LINES, hole=0.25)
        else:
            colour = _COLOURS[colour_of[potion] - 1]
            cell.disc(0.56, 0.5, 0.3, colour)
            cell.box(0.12, 0.3, 0.42, 0.58, colour)
    return canvas.image()


def _draw_stone(cell: Cell, features: list[float]) -> None:
    """Draw colour, size and roundness, and as many dots as the value is above its lowest."""
    *coordinates, value, used = features
    if used:
        return
    hue, size, roundness = (round(coordinate) for coordinate in coordinates)
    if value == 1:
        cell.fill(PLATE)
    half = 0.32 + 0.06 * size
    colour: Colour = _STONE_COLOURS[hue]
    if roundness < 1:
        inner = half * (0.88 if roundness < 0 else 0.76)
        cell.box(0.5 - inner, 0.5 + inner, 0.5 - inner, 0.5 + inner, colour)
    if roundness > -1:
        cell.disc(0.5, 0.5, half, colour)
    for dot in range(round((value + 1) * 3 / 2)):
        cell.disc(0.5, 0.35 + 0.15 * dot, 0.055, _DOT)
