"""Pictures of frozen lakes: simple shapes on an RGB array, drawn without any plotting library."""

from __future__ import annotations

import numpy as np

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
_AGENT = (244, 148, 40)
_OUTLINE = (72, 42, 24)
_WHITE = (255, 255, 255)

# Shapes are drawn this many times larger and averaged down: smooth edges without a library.
_SUPERSAMPLING = 3


class _Tile:
    """One cell's canvas; coordinates run from 0 to 1, down and to the right."""

    def __init__(self, pixels: int) -> None:
        side = pixels * _SUPERSAMPLING
        centre = (np.arange(side) + 0.5) / side
        self.down, self.right = np.meshgrid(centre, centre, indexing="ij")
        self.rgb = np.full((side, side, 3), _ICE, dtype=np.float32)

    def fill(self, mask: np.ndarray, colour: tuple[int, int, int]) -> None:
        self.rgb[mask] = colour

    def disc(self, down: float, right: float, radius: float, flatness: float = 1.0) -> np.ndarray:
        return ((self.down - down) / flatness) ** 2 + (self.right - right) ** 2 < radius**2

    def box(self, top: float, bottom: float, left: float, right: float) -> np.ndarray:
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

    def image(self) -> np.ndarray:
        side = self.rgb.shape[0] // _SUPERSAMPLING
        blocks = self.rgb.reshape(side, _SUPERSAMPLING, side, _SUPERSAMPLING, 3)
        return blocks.mean((1, 3)).round().astype(np.uint8)


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
        opened: bool ``[S, S]``, holes that opened during the attempt, drawn cracked.
        cell_pixels: side of a cell, in pixels, at least 8.

    Returns:
        uint8 ``[S * cell_pixels, S * cell_pixels, 3]``.

    Raises:
        ValueError: if cells are too small to draw in.

    Examples:
        >>> import numpy as np
        >>> from torchrl_amago.envs.tasks.frozen_lake_drawing import draw_lake
        >>> draw_lake(np.zeros((3, 3), dtype=bool), (0, 0), cell_pixels=24).shape
        (72, 72, 3)
    """
    if cell_pixels < 8:
        raise ValueError(
            f"cell_pixels must be at least 8, got {cell_pixels}. Shapes cannot be told apart in "
            "smaller cells; draw larger and scale down."
        )
    size = holes.shape[0]
    opened = np.zeros_like(holes) if opened is None else opened
    picture = np.empty((size * cell_pixels, size * cell_pixels, 3), dtype=np.uint8)
    for down in range(size):
        for right in range(size):
            tile = _Tile(cell_pixels)
            _draw_ground(
                tile,
                is_start=(down, right) == (0, 0),
                is_goal=(down, right) == (size - 1, size - 1),
                is_hole=bool(holes[down, right]),
                is_opened=bool(opened[down, right]),
            )
            if agent == (down, right):
                _draw_agent(tile)
            rows = slice(down * cell_pixels, (down + 1) * cell_pixels)
            picture[rows, right * cell_pixels : (right + 1) * cell_pixels] = tile.image()
    return picture


def _draw_ground(
    tile: _Tile, *, is_start: bool, is_goal: bool, is_hole: bool, is_opened: bool
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


def _draw_goal(tile: _Tile) -> None:
    tile.fill(tile.box(0.0, 1.0, 0.0, 1.0), _GOAL)
    tile.fill(tile.disc(0.86, 0.36, 0.20, flatness=0.3), _RIM)
    tile.fill(tile.box(0.14, 0.86, 0.32, 0.39), _POLE)
    # A pennant: its height shrinks linearly to nothing at its right end.
    in_flag = (tile.right >= 0.39) & (tile.right < 0.86)
    half_height = 0.19 * (0.86 - tile.right) / 0.47
    tile.fill(in_flag & (np.abs(tile.down - 0.34) < half_height), _FLAG)


def _draw_agent(tile: _Tile) -> None:
    tile.fill(tile.disc(0.52, 0.5, 0.30), _OUTLINE)
    tile.fill(tile.disc(0.52, 0.5, 0.255), _AGENT)
    for right in (0.40, 0.60):
        tile.fill(tile.disc(0.46, right, 0.075), _WHITE)
        tile.fill(tile.disc(0.47, right, 0.038), _OUTLINE)
