"""Weights that change one at a time, drawn in proportion to them: both in logarithmic time."""

from __future__ import annotations

import numpy as np


class SumTree:
    """A binary tree whose nodes hold the sum of the leaves below them.

    Args:
        size: number of leaves.

    Example:
        >>> tree = SumTree(3)
        >>> tree.set(np.array([0, 2]), np.array([1.0, 3.0]))
        >>> tree.total, tree.find(np.array([0.5, 1.5, 3.9])).tolist()
        (4.0, [0, 2, 2])
    """

    def __init__(self, size: int) -> None:
        self.depth = max(1, size - 1).bit_length()
        self.num_leaves = 1 << self.depth
        # Node 1 is the root, 2n and 2n + 1 are below n, the leaves come last.
        self._sum = np.zeros(2 * self.num_leaves)

    @property
    def total(self) -> float:
        """Sum of all leaves."""
        return float(self._sum[1])

    def get(self, leaf: np.ndarray) -> np.ndarray:
        """Weights of leaves."""
        return self._sum[leaf + self.num_leaves]

    def set(self, leaf: np.ndarray, weight: np.ndarray) -> None:
        """Change weights of leaves, which are all different."""
        node = leaf + self.num_leaves
        self._sum[node] = weight
        for _ in range(self.depth):
            node = np.unique(node >> 1)
            self._sum[node] = self._sum[2 * node] + self._sum[2 * node + 1]

    def find(self, position: np.ndarray) -> np.ndarray:
        """The leaves at which the running sum of weights first exceeds these, in [0, total)."""
        node, rest = np.ones(len(position), np.int64), position.astype(np.float64)
        for _ in range(self.depth):
            node = 2 * node
            left = self._sum[node]
            # Where rounding leads beyond the last weight, an empty branch is never taken.
            goes_right = (rest >= left) & (self._sum[node + 1] > 0)
            rest = np.where(goes_right, rest - left, rest)
            node = node + goes_right
        return node - self.num_leaves
