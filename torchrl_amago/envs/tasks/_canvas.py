"""A small canvas for pictures of tasks: cells with simple shapes, without a plotting library."""

from __future__ import annotations

import numpy as np

Colour = tuple[int, int, int]

# The ground of a cell with the flag, and the ring around the start.
PLATE, _START = (250, 226, 150), (160, 205, 188)
_AGENT, _OUTLINE, _WHITE = (244, 148, 40), (72, 42, 24), (255, 255, 255)
_CLOTH, _POLE = (216, 60, 62), (92, 66, 48)

# Shapes are drawn this many times larger and averaged down, which smooths their edges.
_SUPERSAMPLING = 3


class Canvas:
    """A grid of cells, ``cell_pixels`` wide and high, of one colour, with lines of another."""

    def __init__(
        self, rows: int, columns: int, cell_pixels: int, colour: Colour, lines: Colour | None = None
    ) -> None:
        self._side = cell_pixels * _SUPERSAMPLING
        self._rgb = np.full((rows * self._side, columns * self._side, 3), colour, dtype=np.float32)
        for place in np.ndindex(rows, columns) if lines else ():
            self.cell(*place).frame(lines)

    def cell(self, down: float, right: float, scale: float = 1.0) -> Cell:
        """Return the square with this top left corner, in cells, as a place to draw in."""
        top, left, side = (round(at * self._side) for at in (down, right, scale))
        return Cell(self._rgb[top : top + side, left : left + side], side)

    def image(self) -> np.ndarray:
        """Return the picture, uint8 ``[rows * cell_pixels, columns * cell_pixels, 3]``."""
        rows = sum(self._rgb[i::_SUPERSAMPLING] for i in range(_SUPERSAMPLING))
        blocks = sum(rows[:, i::_SUPERSAMPLING] for i in range(_SUPERSAMPLING))
        return (blocks / _SUPERSAMPLING**2).round().astype(np.uint8)


class Cell:
    """One cell of a canvas; coordinates run from 0 to 1; what lies beyond the canvas is cut off."""

    def __init__(self, rgb: np.ndarray, side: int) -> None:
        self._rgb = rgb
        height, width = rgb.shape[:2]
        self._down = (np.arange(height)[:, None] + 0.5) / side
        self._right = (np.arange(width) + 0.5) / side

    def box(self, top: float, bottom: float, left: float, right: float, colour: Colour) -> None:
        rows = (self._down >= top) & (self._down < bottom)
        self._rgb[rows & (self._right >= left) & (self._right < right)] = colour

    def fill(self, colour: Colour) -> None:
        self._rgb[:] = colour

    def frame(self, colour: Colour) -> None:
        is_inner = (abs(self._down - 0.5) < 0.48) & (abs(self._right - 0.5) < 0.48)
        self._rgb[~is_inner] = colour

    def disc(
        self, down: float, right: float, radius: float, colour: Colour, hole: float = 0.0
    ) -> None:
        distance = np.hypot(self._down - down, self._right - right)
        self._rgb[(distance < radius) & (distance >= hole)] = colour

    def start(self) -> None:
        self.disc(0.5, 0.5, 0.40, _START, hole=0.31)

    def agent(self) -> None:
        self.disc(0.52, 0.5, 0.30, _OUTLINE)
        self.disc(0.52, 0.5, 0.255, _AGENT)
        for eye in (0.40, 0.60):
            self.disc(0.46, eye, 0.075, _WHITE)
            self.disc(0.47, eye, 0.038, _OUTLINE)

    def flag(self) -> None:
        self.box(0.14, 0.86, 0.32, 0.39, _POLE)
        half_height = 0.19 * (0.86 - self._right) / 0.47  # a triangle that points to the right
        is_cloth = (np.abs(self._down - 0.34) < half_height) & (self._right >= 0.39)
        self._rgb[is_cloth] = _CLOTH
