"""Drawing trials in proportion to weights, while old trials leave and new ones come.

Legend: B trials drawn, N trials that are there.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from torchrl_amago.data.trial_table import TrialTable
from torchrl_amago.data.weight_blocks import WeightBlocks

# What a priority of 0 counts as: a trial must stay reachable.
_SMALLEST_PRIORITY = 1e-6


class Shares:
    """Weights that are a function of a trial's length, as a running sum that grows at its end.

    Args:
        share_of: weights ``[N]`` of trials of these lengths ``[N]``.

    Example:
        >>> table = TrialTable(capacity=100, max_rows=302)
        >>> table.extend([0, 11], [10, 30])
        >>> Shares(lambda length: length).draw(table, np.array([0.0, 0.24, 0.26, 0.99])).tolist()
        [0, 0, 1, 1]
    """

    def __init__(self, share_of: Callable[[np.ndarray], np.ndarray]) -> None:
        self._share_of = share_of
        self._base = self._end = self._restarts = 0
        self._sum = np.zeros(16)  # place i: of the trials from number base to base + i

    def draw(self, table: TrialTable, uniform_B: np.ndarray) -> np.ndarray:
        """Positions in the table, ``[B]``, for numbers in [0, 1)."""
        self._follow(table)
        running = self._sum[table.begin - self._base : table.end - self._base + 1]
        position_B = running[0] + uniform_B * (running[-1] - running[0])
        found_B = np.searchsorted(running, position_B, side="right") - 1
        return np.minimum(found_B, len(table) - 1)

    def _follow(self, table: TrialTable) -> None:
        same = self._restarts == table.restarts
        if not (same and self._base <= table.begin <= self._end <= table.end):
            self._base, self._end, self._restarts = table.begin, table.begin, table.restarts
            self._sum[0] = 0.0
        new = table.end - self._end
        if self._end - self._base + new >= len(self._sum):
            known = self._sum[table.begin - self._base : self._end - self._base + 1]
            self._sum = np.empty(2 * (len(known) + new))
            self._sum[: len(known)] = known - known[0]
            self._base = table.begin
        last = self._end - self._base
        share = self._share_of(table.steps[len(table) - new :])
        self._sum[last + 1 : last + 1 + new] = self._sum[last] + np.cumsum(share)
        self._end = table.end


class Priorities:
    """Weights that are set one by one, drawn in proportion to a power of them (arXiv 1511.05952).

    A trial that was never set has the largest priority so far.

    Args:
        alpha: exponent of priorities; 0 draws uniformly.
        beta: exponent of importance weights.

    Example:
        >>> table = TrialTable(capacity=100, max_rows=302)
        >>> table.extend([0, 11], [10, 30])
        >>> priorities = Priorities(alpha=1.0, beta=1.0)
        >>> priorities.update(table, np.array([0, 1]), np.array([1.0, 3.0]))
        >>> index_B, weight_B = priorities.draw(table, np.array([0.2, 0.3]))
        >>> index_B.tolist(), weight_B.tolist()
        ([0, 1], [1.0, 0.3333333432674408])
    """

    def __init__(self, alpha: float, beta: float) -> None:
        self.alpha, self.beta = alpha, beta
        self.clear()

    def clear(self) -> None:
        """Forget all of them."""
        self._weights = WeightBlocks(16)  # trial n is at place n modulo their size
        self._begin = self._end = 0
        self._largest = 1.0

    def draw(self, table: TrialTable, uniform_B: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Positions in the table and importance weights ``(N P)^-beta`` over their largest, ``[B]``."""
        self._follow(table)
        weights = self._weights
        place_B = weights.find(uniform_B * weights.total)
        weight_B = (len(table) * weights.get(place_B) / weights.total) ** -self.beta
        index_B = (place_B - table.begin) % weights.size
        return index_B, (weight_B / weight_B.max()).astype(np.float32)

    def update(self, table: TrialTable, number_B: np.ndarray, priority_B: np.ndarray) -> None:
        """Set priorities; of those for one trial the largest counts, those of lost trials don't."""
        if not (priority_B >= 0).all() or np.isinf(priority_B).any():
            raise ValueError(
                f"priorities must be finite and not negative, got {priority_B}. Give absolute errors."
            )
        self._follow(table)
        is_here_B = (number_B >= table.begin) & (number_B < table.end)
        number, place = np.unique(number_B[is_here_B], return_inverse=True)
        largest = np.full(len(number), _SMALLEST_PRIORITY)
        np.maximum.at(largest, place, priority_B[is_here_B])
        self._largest = max(self._largest, float(largest.max(initial=0.0)))
        self._set(number, largest**self.alpha)

    def _set(self, number: np.ndarray, weight: np.ndarray) -> None:
        if len(number):
            self._weights.set(number % self._weights.size, weight)

    def _follow(self, table: TrialTable) -> None:
        if not self._begin <= table.begin <= self._end <= table.end:
            self._weights = WeightBlocks(self._weights.size)
            self._begin = self._end = table.begin
        gone = np.arange(self._begin, table.begin)
        self._set(gone, np.zeros(len(gone)))
        self._begin = table.begin
        if len(table) > self._weights.size:
            known = np.arange(self._begin, self._end)
            weight = self._weights.get(known % self._weights.size)
            self._weights = WeightBlocks(2 * len(table))
            self._set(known, weight)
        new = np.arange(self._end, table.end)
        self._set(new, np.full(len(new), self._largest**self.alpha))
        self._end = table.end

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers and lists."""
        numbers = np.arange(self._begin, self._end)
        return {
            "begin": self._begin,
            "largest": self._largest,
            "size": self._weights.size,
            "weights": self._weights.get(numbers % self._weights.size).tolist(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """The inverse of :meth:`state_dict`."""
        weights = np.array(state["weights"])
        self._begin, self._end = state["begin"], state["begin"] + len(weights)
        self._largest = state["largest"]
        self._weights = WeightBlocks(state["size"])
        self._set(np.arange(self._begin, self._end), weights)
