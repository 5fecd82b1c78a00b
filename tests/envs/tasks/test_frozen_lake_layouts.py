"""Lakes: all crossable, distributed as Gymnasium's, split without overlap."""

from __future__ import annotations

from collections import deque

import pytest
import torch
from gymnasium.envs.toy_text.frozen_lake import generate_random_map
from hypothesis import given
from hypothesis import strategies as st

from torchrl_amago.envs.tasks.frozen_lake import (
    enumerate_lakes,
    in_split,
    is_crossable,
    random_lakes,
)


def breadth_first_crossable(holes: list[list[bool]]) -> bool:
    """An independent check: plain breadth-first search over one lake."""
    size = len(holes)
    seen, queue = {(0, 0)}, deque([(0, 0)])
    while queue:
        i, j = queue.popleft()
        if (i, j) == (size - 1, size - 1):
            return True
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            inside = min(cell) >= 0 and max(cell) < size
            if inside and cell not in seen and not holes[cell[0]][cell[1]]:
                seen.add(cell)
                queue.append(cell)
    return False


def pattern_index(holes: torch.Tensor) -> torch.Tensor:
    cells = holes.flatten(1).long()
    return (cells << torch.arange(cells.shape[1])).sum(1)


@given(
    size=st.integers(2, 9),
    seed=st.integers(0, 2**31),
    p_hole=st.sampled_from([0.2, 0.35, 0.5]),
)
def test_is_crossable_agrees_with_breadth_first_search(size, seed, p_hole):
    generator = torch.Generator().manual_seed(seed)
    holes = torch.rand(40, size, size, generator=generator) < p_hole
    holes[:, 0, 0] = holes[:, -1, -1] = False
    expected = [breadth_first_crossable(lake) for lake in holes.tolist()]
    assert is_crossable(holes).tolist() == expected


def test_is_crossable_follows_a_winding_path():
    # The only path goes down, right, up, right, down: a flood that sweeps only once would miss it.
    holes = torch.zeros(5, 5, dtype=torch.bool)
    holes[:4, 1] = True
    holes[1:, 3] = True
    assert is_crossable(holes)
    holes[4, 2] = True
    assert not is_crossable(holes)


@given(size=st.integers(2, 8), seed=st.integers(0, 2**31), p_safe=st.sampled_from([0.6, 0.8, 1.0]))
def test_random_lakes_can_all_be_crossed(size, seed, p_safe):
    lakes = random_lakes(30, size, torch.Generator().manual_seed(seed), p_safe)
    assert lakes.shape == (30, size, size)
    assert all(breadth_first_crossable(lake) for lake in lakes.tolist())
    assert not lakes[:, 0, 0].any()
    assert not lakes[:, -1, -1].any()


def test_random_lakes_have_the_exact_conditional_distribution():
    num = 40_000
    lakes, probability = enumerate_lakes(3)
    drawn = random_lakes(num, 3, torch.Generator().manual_seed(0))
    count = torch.bincount(pattern_index(drawn), minlength=2**9)
    assert count.sum() == count[pattern_index(lakes)].sum()
    observed, expected = count[pattern_index(lakes)], probability * num
    chi_square = ((observed - expected) ** 2 / expected).sum().item()
    # 51 lakes: 50 degrees of freedom, of which 99.9% of samples stay below 86.7.
    assert chi_square < 86.7


def test_enumerated_probabilities_match_gymnasium():
    num = 1500
    lakes, probability = enumerate_lakes(3)
    rng_maps = [generate_random_map(3, seed=seed) for seed in range(num)]
    holes = torch.tensor([[[cell == "H" for cell in row] for row in lake] for lake in rng_maps])
    observed = holes.double().mean(0)
    expected = (probability.view(-1, 1, 1) * lakes).sum(0)
    # Four standard errors of a fraction near 0.1 to 0.2.
    assert (observed - expected).abs().max() < 4 * (0.2 * 0.8 / num) ** 0.5


def test_enumerate_lakes_of_size_two_by_hand():
    # Free cells: (0,1) and (1,0). Both safe 0.64, one hole 0.16 each, both holes cannot be crossed.
    lakes, probability = enumerate_lakes(2)
    by_holes = {int(lake.sum()): p for lake, p in zip(lakes, probability.tolist(), strict=True)}
    assert len(lakes) == 3
    assert by_holes[0] == pytest.approx(0.64 / 0.96)
    assert by_holes[1] == pytest.approx(0.16 / 0.96)


@pytest.mark.parametrize("size", [3, 4, 8])
def test_splits_share_no_lake_and_cover_all(size):
    generator = torch.Generator().manual_seed(1)
    train = random_lakes(2000, size, generator, layouts="train")
    heldout = random_lakes(2000, size, generator, layouts="heldout")
    assert not set(pattern_index(train).tolist()) & set(pattern_index(heldout).tolist())
    both = random_lakes(4000, size, generator)
    assert (in_split(both, "train") ^ in_split(both, "heldout")).all()
    if size > 3:
        assert in_split(both, "heldout").float().mean().item() == pytest.approx(0.25, abs=0.03)


def test_split_of_3x3_lakes_is_a_quarter_by_count_and_by_probability():
    lakes, probability = enumerate_lakes(3)
    heldout = in_split(lakes, "heldout")
    # Pinned: a changed hash would let old agents have trained on what is now held out.
    assert heldout.sum() == 13
    assert probability[heldout].sum().item() == pytest.approx(0.2495, abs=1e-4)
    assert not heldout[~lakes.flatten(1).any(1)]


def test_split_draws_the_conditional_distribution():
    num = 20_000
    lakes, probability = enumerate_lakes(3, layouts="heldout")
    drawn = random_lakes(num, 3, torch.Generator().manual_seed(0), layouts="heldout")
    count = torch.bincount(pattern_index(drawn), minlength=2**9)[pattern_index(lakes)]
    chi_square = ((count - probability * num) ** 2 / (probability * num)).sum().item()
    assert count.sum() == num
    assert chi_square < 32.9  # 99.9% quantile at 12 degrees of freedom


def test_same_generator_state_same_lakes():
    first = random_lakes(50, 5, torch.Generator().manual_seed(3))
    again = random_lakes(50, 5, torch.Generator().manual_seed(3))
    other = random_lakes(50, 5, torch.Generator().manual_seed(4))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"size": 1}, "size must be an integer of at least 2, got 1"),
        ({"size": 3, "p_safe": 0.0}, r"p_safe must be positive, got 0\.0.*Gymnasium's is 0\.8"),
        ({"size": 3, "p_safe": 1.5}, r"p_safe must be in \[0, 1\], got 1\.5"),
        ({"size": 3, "layouts": "test"}, "layouts must be one of 'all', 'train', 'heldout', got"),
        ({"size": 2, "layouts": "train"}, "size must be an integer of at least 3, got 2"),
    ],
)
def test_arguments_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        random_lakes(4, **kwargs)


def test_random_lakes_gives_up_when_no_lake_can_be_crossed():
    with pytest.raises(RuntimeError, match=r"no lake that can be crossed.*Use a p_safe above 0\.6"):
        random_lakes(2, 12, torch.Generator().manual_seed(0), p_safe=0.01)


def test_enumeration_of_large_lakes_is_infeasible():
    with pytest.raises(ValueError, match=r"size <= 4, got 5.*Sample them with random_lakes"):
        enumerate_lakes(5)
