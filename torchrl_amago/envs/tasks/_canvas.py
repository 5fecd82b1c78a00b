"""A canvas for pictures of tasks: simple shapes on an RGB array, without any plotting library."""

from __future__ import annotations

import numpy as np

__all__ = ["Canvas", "draw_agent"]

Colour = tuple[int, int, int]

_AGENT = (244, 148, 40)
_OUTLINE = (72, 42, 24)
_WHITE = (255, 255, 255)

# Shapes are drawn this many times larger and averaged down: smooth edges without a library.
_SUPERSAMPLING = 3


class Canvas:
    """A grid of cells to fill shapes on; coordinates count cells, down and to the right.

    Args:
        cell_pixels: side of a cell, in pixels, at least 8.
        rows: cells downwards.
        columns: cells to the right.
        colour: of the ground, red, green and blue from 0 to 255.

    Raises:
        ValueError: if cells are too small to draw in.

    Examples:
        >>> from torchrl_amago.envs.tasks._canvas import Canvas
        >>> canvas = Canvas(8, rows=1, columns=2, colour=(0, 0, 0))
        >>> canvas.fill(canvas.box(0, 1, 1, 2), (255, 255, 255))
        >>> canvas.image()[0, :, 0].tolist() == [0] * 8 + [255] * 8
        True
    """

    def __init__(
        self, cell_pixels: int, rows: int = 1, columns: int = 1, *, colour: Colour
    ) -> None:
        if cell_pixels < 8:
            raise ValueError(
                f"cell_pixels must be at least 8, got {cell_pixels}. Shapes cannot be told apart in "
                "smaller cells; draw larger and scale down."
            )
        fine = cell_pixels * _SUPERSAMPLING
        down, right = ((np.arange(cells * fine) + 0.5) / fine for cells in (rows, columns))
        self.down, self.right = np.meshgrid(down, right, indexing="ij")
        self.rgb = np.full((*self.down.shape, 3), colour, dtype=np.float32)

    def fill(self, mask: np.ndarray, colour: Colour) -> None:
        """Colour the points of a mask."""
        self.rgb[mask] = colour

    def disc(self, down: float, right: float, radius: float, flatness: float = 1.0) -> np.ndarray:
        """Points of a disc; with a flatness below 1 it is lower than wide."""
        return ((self.down - down) / flatness) ** 2 + (self.right - right) ** 2 < radius**2

    def box(self, top: float, bottom: float, left: float, right: float) -> np.ndarray:
        """Points of a box."""
        inside_down = (self.down >= top) & (self.down < bottom)
        return inside_down & (self.right >= left) & (self.right < right)

    def line(
        self, start: tuple[float, float], end: tuple[float, float], width: float
    ) -> np.ndarray:
        """Points closer than half a width to the segment between two (down, right) points."""
        along_down, along_right = end[0] - start[0], end[1] - start[1]
        share = (self.down - start[0]) * along_down + (self.right - start[1]) * along_right
        share = np.clip(share / (along_down**2 + along_right**2), 0.0, 1.0)
        gap_down = self.down - (start[0] + share * along_down)
        gap_right = self.right - (start[1] + share * along_right)
        return np.hypot(gap_down, gap_right) < width / 2

    def pennant(self, down: float, right: float, colour: Colour, pole: Colour) -> None:
        """A flag on a pole, in the cell whose top left corner this is."""
        self.fill(self.box(down + 0.14, down + 0.86, right + 0.32, right + 0.39), pole)
        # Its height shrinks linearly to nothing at its right end.
        in_flag = (self.right >= right + 0.39) & (self.right < right + 0.86)
        half_height = 0.19 * (right + 0.86 - self.right) / 0.47
        self.fill(in_flag & (np.abs(self.down - down - 0.34) < half_height), colour)

    def image(self) -> np.ndarray:
        """The picture, uint8 ``[rows * cell_pixels, columns * cell_pixels, 3]``."""
        height, width = (side // _SUPERSAMPLING for side in self.rgb.shape[:2])
        blocks = self.rgb.reshape(height, _SUPERSAMPLING, width, _SUPERSAMPLING, 3)
        return blocks.mean((1, 3)).round().astype(np.uint8)


def draw_agent(canvas: Canvas, down: float = 0.0, right: float = 0.0) -> None:
    """Draw the agent in the cell whose top left corner this is."""
    canvas.fill(canvas.disc(down + 0.52, right + 0.5, 0.30), _OUTLINE)
    canvas.fill(canvas.disc(down + 0.52, right + 0.5, 0.255), _AGENT)
    for eye in (0.40, 0.60):
        canvas.fill(canvas.disc(down + 0.46, right + eye, 0.075), _WHITE)
        canvas.fill(canvas.disc(down + 0.47, right + eye, 0.038), _OUTLINE)
