"""The rules of Meta-FrozenLake as constants and look-up tables.

A cell is one number, ``size * first coordinate + second coordinate``. Where an action leads and what
is seen from where are then single look-ups for all rows of a batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

__all__ = ["move_table", "position_table"]

# Stay, then one cell up or down each of the two axes.
MOVES = ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1))
NUM_ACTIONS = len(MOVES)

# Constants of the reference task (AMAGO's MetaFrozenLake, hard and recover modes).
P_NOISY = 1 / 4
P_HOLE_BEHIND = 0.33
P_SWAPPED = 1 / 2
RECOVER_PENALTY = 0.1

# A noisy position is one of 9 neighbours. Drawing from 36 outcomes, of which 27 mean "exact",
# gives probability 1/4 with a single draw.
NEIGHBOURS = 9
NOISE_OUTCOMES = round(NEIGHBOURS / P_NOISY)


def move_table(size: int) -> Tensor:
    """Where each action leads from each cell; moves into the shore stay.

    Returns:
        int64 ``[2, 5, size * size]``: plain actions, then with actions 1 and 3 swapped.

    Examples:
        >>> from torchrl_amago.envs.tasks.frozen_lake._rules import move_table
        >>> move_table(2)[0, 1].tolist()  # action 1 adds 1 to the first coordinate
        [2, 3, 2, 3]
    """
    moves = torch.stack([_shifted(size, move) @ torch.tensor([size, 1]) for move in MOVES])
    return torch.stack([moves, moves[[0, 3, 2, 1, 4]]])


def position_table(size: int, *, noisy: bool) -> Tensor:
    """What is observed in each cell: its two coordinates over size.

    Returns:
        float32 ``[size * size, 2]``; if noisy ``[size * size * 10, 2]``, each cell's nine noisy
        positions (off by at most one, kept on the lake), then its exact one.

    Examples:
        >>> from torchrl_amago.envs.tasks.frozen_lake._rules import position_table
        >>> position_table(2, noisy=False).tolist()
        [[0.0, 0.0], [0.0, 0.5], [0.5, 0.0], [0.5, 0.5]]
    """
    offsets = [(x, y) for x in (-1, 0, 1) for y in (-1, 0, 1)] if noisy else []
    seen = torch.stack([_shifted(size, offset) for offset in [*offsets, (0, 0)]], 1)
    return (seen / size).view(-1, 2)


def _shifted(size: int, offset: tuple[int, int]) -> Tensor:
    """Every cell's coordinates after an offset, kept on the lake, int64 ``[size * size, 2]``."""
    cell = torch.arange(size * size)
    position = torch.stack([cell // size, cell % size], -1)
    return (position + torch.tensor(offset)).clamp(0, size - 1)
