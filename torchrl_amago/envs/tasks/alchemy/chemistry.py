"""The chemistries of Alchemy: look-up tables of effects and appearances for all of them.

Indices are those of the published code, so that its recorded chemistries can be read:

- stone: 0 to 7, bit d is set where latent coordinate d is 1 rather than -1; ``USED_STONE``;
- potion: 0 to 5, ``2 * axis + (direction is 1)``; ``USED_POTION``; ``CAULDRON``;
- chemistry: graph 0 to 108, potion map 0 to 47, stone map 0 to 7, rotation 0 to 3.

A graph is a cube of stones without some of its edges: each axis may require values of the other two
coordinates, as far as all stones stay connected.
"""

from __future__ import annotations

import itertools
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

USED_STONE, USED_POTION, CAULDRON = 8, 6, 7
NUM_AXES, NUM_STONE_TYPES, NUM_POTION_TYPES = 3, 8, 6
NUM_GRAPHS, NUM_POTION_MAPS, NUM_STONE_MAPS, NUM_ROTATIONS = 109, 48, 8, 4
MAX_STONES, MAX_POTIONS = 3, 12

Bottleneck = Literal["random", "none", "1", "2", "3"]

# Requirements of the three axes, each of the other two coordinates in their order; 0 allows both.
_FREE = (0, 0)
_BOTTLENECKS = {
    "none": (_FREE, _FREE, _FREE),
    "1": ((-1, 1), _FREE, _FREE),
    "2": ((-1, 0), _FREE, _FREE),
    "3": ((-1, 1), _FREE, (0, -1)),
}
_AXIS_ORDERS = tuple(itertools.permutations(range(NUM_AXES)))
# From perceived to latent axes: the identity, or two axes turned by 45 degrees and scaled.
_TURNS = (
    ((1, 0, 0), (0, 1, 0), (0, 0, 1)),
    ((1, 1, 0), (-1, 1, 0), (0, 0, 1)),
    ((1, 0, -1), (0, 1, 0), (1, 0, 1)),
    ((1, 0, 0), (0, 1, 1), (0, -1, 1)),
)


def stone_coordinates() -> Tensor:
    """Return the latent coordinates of the eight stones, -1 or 1, int64 ``[8, 3]``."""
    return 2 * (torch.arange(NUM_STONE_TYPES)[:, None] >> torch.arange(NUM_AXES) & 1) - 1


def stone_rewards() -> Tensor:
    """Return the rewards of stones in the cauldron, float32 ``[9]``: -3, -1, 1 or 15; 0 if used."""
    total = stone_coordinates().sum(-1)
    return torch.cat([torch.where(total == NUM_AXES, 15, total), torch.zeros(1)]).float()


@lru_cache
def graph_requirements() -> tuple[tuple[tuple[int, int], ...], ...]:
    """List the requirements of all graphs that connect all stones, in the order of their index."""
    one_axis = list(itertools.product((-1, 1, 0), repeat=2))
    everything = list(itertools.product(one_axis, repeat=NUM_AXES))
    edges = torch.stack([_edges(requirements) for requirements in everything])
    stone = torch.arange(NUM_STONE_TYPES)
    linked = torch.eye(NUM_STONE_TYPES).repeat(len(everything), 1, 1)
    for axis in range(NUM_AXES):
        linked[:, stone, stone ^ 1 << axis] = edges[:, axis].float()
    connected = (linked.matrix_power(NUM_STONE_TYPES) > 0).all(-1).all(-1)
    return tuple(itertools.compress(everything, connected.tolist()))


@lru_cache
def graph_edges() -> Tensor:
    """Tabulate the edges of all graphs, bool ``[109, 3 axes, 8 stones]``: can the stone move?"""
    return torch.stack([_edges(requirements) for requirements in graph_requirements()])


def graph_probabilities(bottleneck: Bottleneck = "random") -> Tensor:
    """Return the probability of each graph, float64 ``[109]``.

    ``"random"`` draws the number of requirements from 0 to 3 first, then a graph that has as many
    (there are 1, 12, 48 and 48 of them). The others are single graphs.
    """
    graphs = graph_requirements()
    if bottleneck != "random":
        chosen = [graph == _BOTTLENECKS[bottleneck] for graph in graphs]
        return torch.tensor(chosen, dtype=torch.float64)
    count = torch.tensor(graphs).ne(0).sum((1, 2))
    return 1 / (len(count.unique()) * count.bincount()[count]).double()


@lru_cache
def outcome_table() -> Tensor:
    """Tabulate a stone after a potion or the cauldron, int64 ``[109, 8 potions, 9 stones]``."""
    stone = torch.arange(USED_STONE + 1)
    table = stone.repeat(NUM_GRAPHS, CAULDRON + 1, 1)
    table[:, CAULDRON] = USED_STONE
    edges, stone = graph_edges(), stone[:USED_STONE]
    for potion in range(NUM_POTION_TYPES):
        axis, up = divmod(potion, 2)
        moved = stone | 1 << axis if up else stone & ~(1 << axis)
        table[:, potion, :USED_STONE] = torch.where(edges[:, axis], moved, stone)
    return table


def leftover_table() -> Tensor:
    """Tabulate a potion after a stone was put in, int64 ``[8 potions, 9 stones]``.

    Any stone uses the potion up, even without an effect; a used stone doesn't, the cauldron stays.
    """
    table = torch.arange(CAULDRON + 1)[:, None].repeat(1, USED_STONE + 1)
    table[:USED_POTION, :USED_STONE] = USED_POTION
    return table


def stone_appearances() -> Tensor:
    """Tabulate the features of stones, float32 ``[8 stone maps, 4 rotations, 9 stones, 5]``.

    They are three perceived coordinates (-1, 0 or 1), a third of the latent coordinates' sum, and 0
    for a stone that isn't used; a used stone has ``[2, 2, 2, 2, 1]``.
    """
    latent = stone_coordinates().float()
    turned_back = torch.tensor(_TURNS).float().inverse()
    table = torch.full((NUM_STONE_MAPS, NUM_ROTATIONS, USED_STONE + 1, NUM_AXES + 2), 2.0)
    aligned = latent[:, None] * latent  # a stone map is a sign for each axis
    coordinates = torch.einsum("rpa,msa->mrsp", turned_back, aligned).round()
    table[:, :, :USED_STONE, :NUM_AXES] = coordinates + 0.0  # no negative zeros
    table[:, :, :USED_STONE, NUM_AXES] = latent.sum(-1) / NUM_AXES
    table[..., -1] = 0
    table[:, :, USED_STONE, -1] = 1
    return table


def potion_colours() -> Tensor:
    """Tabulate the colours, 0 to 5, of the latent potions, int64 ``[48 potion maps, 6 potions]``.

    Colours ``2 * k`` and ``2 * k + 1`` act on the same latent axis in opposite directions.
    """
    table = torch.empty(len(_AXIS_ORDERS), NUM_STONE_TYPES, NUM_AXES, 2, dtype=torch.int64)
    positive = (stone_coordinates() + 1) // 2
    for order, axes in enumerate(_AXIS_ORDERS):
        for colour, axis in enumerate(axes):
            for up in range(2):
                same = positive[:, axis] == up
                table[order, :, axis, up] = 2 * colour + same
    return table.view(NUM_POTION_MAPS, NUM_POTION_TYPES)


def potion_appearances() -> Tensor:
    """Tabulate the features of potions, float32 ``[48 potion maps, 7 potions, 2]``.

    They are the colour, scaled to [-1, 2/3], and 0; a used potion has ``[1, 1]``.
    """
    table = torch.ones(NUM_POTION_MAPS, USED_POTION + 1, 2)
    table[:, :USED_POTION, 0] = potion_colours().double() / NUM_AXES - 1
    table[:, :USED_POTION, 1] = 0
    return table


def chemistry_appearances() -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Tabulate a chemistry as numbers in [0, 1]: of graphs, potion maps, stone maps, rotations.

    Returns float32 ``[109, 12]``, the existing edges; ``[48, 9]``, the order of the axes as one-hot
    code, then the three directions; ``[8, 3]``, the directions; ``[4, 4]``, a one-hot code.
    """
    pairs = itertools.combinations(range(NUM_STONE_TYPES), 2)
    edge = [(pair[0], axis) for pair in pairs for axis in range(NUM_AXES)
            if pair[0] ^ pair[1] == 1 << axis]  # fmt: skip
    stone, axis = torch.tensor(edge).unbind(-1)
    directions = (stone_coordinates() + 1) / 2
    orders = torch.eye(len(_AXIS_ORDERS)).repeat_interleave(NUM_STONE_TYPES, 0)
    potions = torch.cat([orders, directions.repeat(len(_AXIS_ORDERS), 1)], -1)
    return graph_edges()[:, axis, stone].float(), potions, directions, torch.eye(NUM_ROTATIONS)


def _edges(requirements: tuple[tuple[int, int], ...]) -> Tensor:
    """Compute which stones can move along which axis, bool ``[3, 8]``."""
    coordinates = stone_coordinates()
    rows = []
    for axis, required in enumerate(torch.tensor(requirements)):
        others = coordinates[:, [other for other in range(NUM_AXES) if other != axis]]
        rows.append(((required == 0) | (required == others)).all(-1))
    return torch.stack(rows)
