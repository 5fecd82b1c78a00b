"""Random lakes in batches: all crossable, and split into those for training and held-out ones.

The distribution is Gymnasium's ``generate_random_map``: every cell but the start and the goal is
safe with probability 0.8, and a lake that cannot be crossed is drawn anew.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Literal, get_args

import torch
from torch import Tensor

from torchrl_amago._validation import check_choice, check_fractions, check_positive
from torchrl_amago.envs.tasks.grid_task import check_size

LakeSplit = Literal["all", "train", "heldout"]

# Gymnasium's default fraction of frozen cells in `generate_random_map`.
P_SAFE = 0.8

# With this salt the held-out 3x3 and 4x4 lakes are a quarter by count and by probability, and the
# likeliest lake (no holes) is in "train".
_SPLIT_SALT = 2417

# At 0.8 more than half of the lakes are crossable at every size: needing this many rounds means
# that the arguments leave nothing to draw.
_MAX_ROUNDS = 1_000

# 4x4 has 2**14 layouts; 5x5 would have 2**23 and take gigabytes.
_MAX_ENUMERABLE_SIZE = 4


def is_crossable(holes: Tensor) -> Tensor:
    """Test if a path of 4-neighbour moves over safe cells joins the two opposite corners.

    ``holes`` is bool ``[*L, S, S]``, the result bool ``[*L]``.

    Examples:
        >>> is_crossable(torch.tensor([[[0, 1], [0, 0]], [[0, 1], [1, 0]]]).bool())
        tensor([ True, False])
    """
    size = holes.shape[-1]
    # A flood in sweeps down, right, up and left until a round wets nothing new: one round for every
    # two turns of a path. Lakes last: a line of cells is then one contiguous block of memory.
    safe = ~holes.reshape(-1, size, size).permute(1, 2, 0).contiguous()
    wet = torch.zeros_like(safe)
    wet[0, 0] = safe[0, 0]
    # Unbound once: indexing anew costs more than the arithmetic on a line.
    lines = [list(zip(wet.unbind(dim), safe.unbind(dim), strict=True)) for dim in (0, 1)]
    sweeps = lines + [line[::-1] for line in lines]
    before = torch.zeros_like(wet)
    while not torch.equal(wet, before):
        before.copy_(wet)
        for sweep in sweeps:
            for (wet_from, _), (wet_to, safe_to) in pairwise(sweep):
                wet_to.bitwise_or_(wet_from & safe_to)
    return wet[-1, -1].reshape(holes.shape[:-2])


def in_split(holes: Tensor, layouts: LakeSplit) -> Tensor:
    """Test which lakes belong to a split. The result depends on the layout alone, never on a seed.

    A fixed 64-bit hash puts about one layout in four in ``"heldout"``, the rest in ``"train"``.
    ``holes`` is bool ``[*L, S, S]``, the result bool ``[*L]``.

    Examples:
        >>> holes, _ = enumerate_lakes(3)
        >>> len(holes), in_split(holes, "train").sum(), in_split(holes, "heldout").sum()
        (51, tensor(38), tensor(13))
    """
    check_choice("layouts", layouts, get_args(LakeSplit))
    if layouts == "all":
        return torch.ones(holes.shape[:-2], dtype=torch.bool, device=holes.device)
    size = holes.shape[-1]
    weights = [_splitmix64(_SPLIT_SALT + (size << 16) + cell) for cell in range(size * size)]
    code = (holes.flatten(-2) * torch.tensor(weights, device=holes.device)).sum(-1)
    code = code + _splitmix64(_SPLIT_SALT + size)
    # Integer sums wrap around on every device alike; the shift and the odd factor mix the bits.
    code = (code ^ (code >> 31)) * _splitmix64(_SPLIT_SALT)
    heldout = ((code >> 40) & 3) == 0
    return heldout if layouts == "heldout" else ~heldout


def random_lakes(
    num: int,
    size: int,
    generator: torch.Generator | None = None,
    p_safe: float = P_SAFE,
    *,
    layouts: LakeSplit = "all",
) -> Tensor:
    """Draw lakes that can all be crossed, from Gymnasium's distribution, on the generator's device.

    Returns bool ``[num, size, size]``, True at holes. ``p_safe`` is the probability that a cell is
    safe before the lake is checked; ``layouts`` names the split to draw from.

    Raises ValueError for arguments out of range, RuntimeError if lakes to cross are too rare.

    Examples:
        >>> random_lakes(1000, 4, torch.Generator().manual_seed(0)).shape
        torch.Size([1000, 4, 4])
    """
    check_lakes(size, layouts, p_safe)
    device = None if generator is None else generator.device
    lakes = torch.zeros(num, size, size, dtype=torch.bool, device=device)
    missing = torch.arange(num, device=device)
    for _ in range(_MAX_ROUNDS):
        if not len(missing):
            return lakes
        drawn = torch.rand(len(missing), size, size, generator=generator, device=device) >= p_safe
        drawn[:, 0, 0] = drawn[:, -1, -1] = False
        lakes[missing] = drawn
        missing = missing[~_accepted(drawn, layouts)]
    raise RuntimeError(
        f"no lake that can be crossed was found in {_MAX_ROUNDS} rounds of drawing (size={size}, "
        f"p_safe={p_safe}, layouts={layouts!r}; {len(missing)} of {num} missing). Use a p_safe "
        "above 0.6: below it large lakes almost never can be crossed."
    )


def enumerate_lakes(
    size: int, p_safe: float = P_SAFE, *, layouts: LakeSplit = "all"
) -> tuple[Tensor, Tensor]:
    """Enumerate the lakes that :func:`random_lakes` can draw, with their exact probabilities.

    Returns bool ``[M, size, size]`` and float64 ``[M]``, which sums to 1. Raises ValueError if size
    is outside 2 to 4, or another argument is out of its range.

    Examples:
        >>> holes, probability = enumerate_lakes(2)
        >>> holes.shape, [round(p, 4) for p in probability.tolist()]
        (torch.Size([3, 2, 2]), [0.6667, 0.1667, 0.1667])
    """
    check_lakes(size, layouts, p_safe)
    if size > _MAX_ENUMERABLE_SIZE:
        raise ValueError(
            f"enumerating lakes is feasible for size <= {_MAX_ENUMERABLE_SIZE}, got {size}, which "
            f"has 2**{size * size - 2} layouts. Sample them with random_lakes instead."
        )
    free = size * size - 2
    bits = torch.arange(2**free).unsqueeze(-1) >> torch.arange(free)
    holes = torch.zeros(2**free, size * size, dtype=torch.bool)
    holes[:, 1:-1] = (bits & 1).bool()
    holes = holes.view(-1, size, size)
    holes = holes[_accepted(holes, layouts)]
    num_holes = holes.sum((-2, -1)).double()
    weight = p_safe ** (free - num_holes) * (1.0 - p_safe) ** num_holes
    return holes, weight / weight.sum()


def _accepted(holes: Tensor, layouts: LakeSplit) -> Tensor:
    crossable = is_crossable(holes)
    return crossable if layouts == "all" else crossable & in_split(holes, layouts)


def check_lakes(size: int, layouts: str, p_safe: float = P_SAFE) -> None:
    """Raise ValueError unless there are lakes to draw from the split."""
    check_choice("layouts", layouts, get_args(LakeSplit))
    check_size(size, 2 if layouts == "all" else 3)
    for check in (check_fractions, check_positive):
        check(f"Gymnasium's is {P_SAFE}.", p_safe=p_safe)


def _splitmix64(index: int) -> int:
    """Compute the index-th output of SplitMix64 (Steele et al. 2014), odd, as a signed integer."""
    mask = (1 << 64) - 1
    word = (index + 1) * 0x9E3779B97F4A7C15 & mask
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9 & mask
    word = (word ^ (word >> 27)) * 0x94D049BB133111EB & mask
    word = (word ^ (word >> 31)) | 1
    return word - (1 << 64) if word >> 63 else word
