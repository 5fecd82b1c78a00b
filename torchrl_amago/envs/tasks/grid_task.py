"""The base of tasks on a square grid: five moves, look-up tables, permuted actions.

A cell is one number, ``size * first coordinate + second coordinate``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from torchrl_amago.envs.tasks.batched_task import BatchedTask

# Stay, then one cell up or down each of the two axes.
MOVES = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
NUM_ACTIONS = len(MOVES)


class GridTask(BatchedTask):
    """Base of tasks in which an agent moves on a grid, one cell a step.

    ``action``: 0 stays; 1 and 2 raise and lower the first coordinate (down and up in pictures), 3
    and 4 the second one (right and left). Observed coordinates are divided by ``size``.

    Args:
        size: cells per side, at least 2.
        observation_size: entries of the observation, all in [0, 1].
        randomize_actions: each task permutes the five actions.
        shared: other arguments: see :class:`BatchedTask`.
    """

    action_meaning = "0 stays, 1 to 4 move; sample from env.action_spec to see them."

    def __init__(
        self, size: int, observation_size: int, *, randomize_actions: bool = False, **shared: Any
    ) -> None:
        super().__init__([(0.0, 1.0)] * observation_size, num_actions=NUM_ACTIONS, **shared)
        self.size, self.randomize_actions = size, randomize_actions
        # The first entry of each row in a table of all rows' cells.
        self._constant("_first_cell", size**2 * torch.arange(self.num_rows))
        self._constant("_positions", position_table(size))
        self._state("_cell", torch.zeros(self.num_rows, dtype=torch.int64))
        if randomize_actions:
            self._state("_meaning", torch.arange(NUM_ACTIONS).repeat(self.num_rows, 1))

    def _draw_meanings(self, rows: Tensor) -> None:
        if self.randomize_actions:
            order = self._random(len(rows), NUM_ACTIONS).argsort(-1)
            self._meaning.index_copy_(0, rows, order)

    def _meant(self, action: Tensor) -> Tensor:
        """Return the moves that actions mean, int64 ``[rows]``."""
        if not self.randomize_actions:
            return action
        return self._meaning.gather(1, action.unsqueeze(-1)).squeeze(-1)

    def _position(self) -> Tensor:
        """Look up the agent's coordinates, float32 ``[rows, 2]``."""
        return self._positions.index_select(0, self._cell)

    def _coordinates(self, cell: Tensor) -> Tensor:
        """Turn cells ``[rows, *]`` into their two coordinates, int64 ``[*B, *, 2]``."""
        cell = cell.view(*self.batch_size, *cell.shape[1:])
        return torch.stack([cell // self.size, cell % self.size], -1)


def move_table(size: int) -> Tensor:
    """Tabulate where each action leads from each cell, int64 ``[5, size * size]``."""
    return torch.stack([_shifted(size, move) @ torch.tensor([size, 1]) for move in MOVES])


def position_table(size: int, offsets: Sequence[tuple[int, int]] = ((0, 0),)) -> Tensor:
    """Tabulate each cell's coordinates after each offset, kept on the grid and divided by size.

    Returns float32 ``[size * size * len(offsets), 2]``.
    """
    return torch.stack([_shifted(size, offset) for offset in offsets], 1).view(-1, 2) / size


def _shifted(size: int, offset: tuple[int, int]) -> Tensor:
    cell = torch.arange(size * size)
    position = torch.stack([cell // size, cell % size], -1)
    return (position + torch.tensor(offset)).clamp(0, size - 1)


def check_size(size: int, smallest: int = 2, *, odd: bool = False) -> None:
    """Raise ValueError unless a number of cells per side is an integer in its range."""
    if not isinstance(size, int) or size < smallest or (odd and size % 2 == 0):
        raise ValueError(
            f"size must be an {'odd ' if odd else ''}integer of at least {smallest}, got {size!r}. "
            "It is the number of cells per side."
        )
