"""Weights that change a few at a time, drawn in proportion to them without walking along them all."""

from __future__ import annotations

import numpy as np


class WeightBlocks:
    """Weights in about sqrt(N) blocks of sqrt(N), with the sum of each block.

    A draw looks for the block, then in the block: for a million weights, twice among a thousand. A tree
    would compare less, but takes a call for each of its levels, which costs more than the comparing.

    Args:
        size: number of weights, all 0 at first.

    Example:
        >>> weights = WeightBlocks(3)
        >>> weights.set(np.array([0, 2]), np.array([1.0, 3.0]))
        >>> weights.total, weights.find(np.array([0.5, 1.5, 3.9])).tolist()
        (4.0, [0, 2, 2])
    """

    def __init__(self, size: int) -> None:
        side = 1 << ((max(1, size - 1).bit_length() + 1) // 2)
        self.size = side * side
        self._weight = np.zeros((side, side))
        self._sum = np.zeros(side)

    @property
    def total(self) -> float:
        """Sum of all weights."""
        return float(self._sum.sum())

    def get(self, place: np.ndarray) -> np.ndarray:
        """Weights at these places."""
        return self._weight.reshape(-1)[place]

    def set(self, place: np.ndarray, weight: np.ndarray) -> None:
        """Change the weights at these places, which are all different."""
        self._weight.reshape(-1)[place] = weight
        block = np.unique(place // len(self._sum))
        self._sum[block] = self._weight[block].sum(1)

    def find(self, position_B: np.ndarray) -> np.ndarray:
        """The places at which the running sum of weights first exceeds these numbers in [0, total)."""
        stop = np.cumsum(self._sum)
        block_B = _first_above(stop[None], self._sum[None], position_B)
        # Rounding must not lead before the block: a first weight of 0 would be drawn.
        rest_B = np.maximum(position_B - (stop - self._sum)[block_B], 0.0)
        inside = self._weight[block_B]
        return block_B * len(self._sum) + _first_above(np.cumsum(inside, 1), inside, rest_B)


def _first_above(stop: np.ndarray, weight: np.ndarray, position_B: np.ndarray) -> np.ndarray:
    """In each row the first place where `stop` exceeds a position, at the latest the last weight."""
    last = weight.shape[1] - 1 - np.argmax(weight[:, ::-1] > 0, axis=1)
    # Rounding may lead beyond the last weight.
    return np.minimum((stop <= position_B[:, None]).sum(1), last)
