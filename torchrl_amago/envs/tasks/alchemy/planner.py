"""The largest return of an episode for one who knows the chemistry, by exhaustive search.

A stone earns most at the end of a path without loops, so its choices are few: for each reward the
sets of potions that no other path to as much reward undercuts. The best return is that of the best
choice for each stone among those that share the potions and steps that are left.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import torch
from torch import Tensor

from torchrl_amago.envs.tasks.alchemy.chemistry import (
    MAX_STONES,
    NUM_GRAPHS,
    NUM_POTION_TYPES,
    NUM_STONE_TYPES,
    USED_STONE,
    outcome_table,
    stone_rewards,
)

# Rows that are searched together: each takes some hundred kilobytes.
_CHUNK = 256


def optimal_return(graph: Tensor, stones: Tensor, potions: Tensor, steps_left: Tensor) -> Tensor:
    """Compute the largest return that can still be earned, as the paper's search oracle does.

    Over the ten episodes of a trial it is 288.5 on average (`arXiv 2102.02926
    <https://arxiv.org/abs/2102.02926>`_, Table 1); an ideal observer, who has to find out the
    chemistry first, earns 284.4.

    Args:
        graph: int64 ``[rows]``.
        stones, potions: types of the items, int64 ``[rows, 3]`` and ``[rows, n]``; others than
            the eight and six are ignored, as used ones are.
        steps_left: int64 ``[rows]``.

    Returns float32 ``[rows]``.

    Examples:
        >>> import torch
        >>> from torchrl_amago.envs.tasks.alchemy import optimal_return
        >>> cube, stones, potions = torch.tensor([108]), torch.tensor([[0, 6, 7]]), torch.arange(6)
        >>> optimal_return(cube, stones, potions[None], torch.tensor([20]))
        tensor([31.])
    """
    counts = (potions[..., None] == torch.arange(NUM_POTION_TYPES, device=graph.device)).sum(1)
    limits = torch.cat([counts, steps_left[:, None]], -1)
    chunks = zip(graph.split(_CHUNK), stones.split(_CHUNK), limits.split(_CHUNK), strict=True)
    return torch.cat([_best(*chunk) for chunk in chunks])


def _best(graph: Tensor, stones: Tensor, limits: Tensor) -> Tensor:
    rewards, costs = (table.to(graph.device) for table in _choices())
    # R rows, K choices of each stone: the axes K are those of the three stones.
    value_RKKK = used_RKKK7 = 0
    for place in range(MAX_STONES):
        shape = [len(graph), 1, 1, 1]
        shape[1 + place] = -1
        value_RKKK = value_RKKK + rewards[graph, stones[:, place]].view(shape)
        used_RKKK7 = used_RKKK7 + costs[graph, stones[:, place]].view(*shape, limits.shape[-1])
    fits_RKKK = (used_RKKK7 <= limits[:, None, None, None]).all(-1)
    return value_RKKK.masked_fill(~fits_RKKK, 0.0).flatten(1).amax(-1)


@lru_cache
def _choices() -> tuple[Tensor, Tensor]:
    """Tabulate the choices of each stone, padded by ones that earn and cost nothing.

    Returns rewards float32 ``[109, 9 stones, K]`` and costs int64 ``[109, 9 stones, K, 7]``, the
    potions of each type and the steps.
    """
    moves, rewards = outcome_table().tolist(), stone_rewards().tolist()
    table = [
        [_undercut(_walks(moves[graph], rewards, stone)) for stone in range(NUM_STONE_TYPES)]
        for graph in range(NUM_GRAPHS)
    ]
    most = max(len(choices) for row in table for choices in row)
    values = torch.zeros(NUM_GRAPHS, USED_STONE + 1, most + 1)
    costs = torch.zeros(*values.shape, NUM_POTION_TYPES + 1, dtype=torch.int64)
    for graph, row in enumerate(table):
        for stone, choices in enumerate(row):
            for k, (reward, *cost) in enumerate(choices):
                values[graph, stone, k] = reward
                costs[graph, stone, k] = torch.tensor(cost)
    return values, costs


def _walks(
    moves: list[list[int]],
    rewards: list[float],
    stone: int,
    visited: tuple[int, ...] = (),
    potions: tuple[int, ...] = (0,) * NUM_POTION_TYPES,
) -> Iterator[tuple[float, ...]]:
    """Yield reward and cost of all paths without loops to a stone that earns something."""
    visited = (*visited, stone)
    if rewards[stone] > 0:
        yield (rewards[stone], *potions, len(visited))
    for potion in range(NUM_POTION_TYPES):
        if moves[potion][stone] not in visited:
            spent = tuple(n + (kind == potion) for kind, n in enumerate(potions))
            yield from _walks(moves, rewards, moves[potion][stone], visited, spent)


def _undercut(choices: Iterator[tuple[float, ...]]) -> list[tuple[float, ...]]:
    """Drop the choices that cost no less than another one of at least their reward."""
    kept: list[tuple[float, ...]] = []
    for reward, *cost in sorted(set(choices), key=lambda choice: (-choice[0], choice[-1])):
        if not any(all(a <= b for a, b in zip(other[1:], cost, strict=True)) for other in kept):
            kept.append((reward, *cost))
    return kept
