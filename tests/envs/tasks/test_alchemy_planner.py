"""The best return of Alchemy: by hand, against brute force, and against the published figures."""

from __future__ import annotations

from functools import cache

import pytest
import torch

from torchrl_amago.envs.tasks import SymbolicAlchemy
from torchrl_amago.envs.tasks.alchemy import optimal_return
from torchrl_amago.envs.tasks.alchemy.chemistry import (
    USED_POTION,
    USED_STONE,
    graph_requirements,
    outcome_table,
    stone_rewards,
)

REWARDS = stone_rewards()
CUBE = 108


def best(graph: int, stones: list[int], potions: list[int], steps: int = 20) -> float:
    rows = [torch.tensor([items]) for items in (stones, potions)]
    return optimal_return(torch.tensor([graph]), *rows, torch.tensor([steps])).item()


def test_by_hand():
    up = [1, 3, 5]
    assert best(CUBE, [0, USED_STONE, USED_STONE], up) == 15
    assert best(CUBE, [0, USED_STONE, USED_STONE], up, steps=3) == 1
    assert best(CUBE, [0, 0, 0], up) == 15  # one stone takes all three
    assert best(CUBE, [6, 5, 3], up) == 45
    assert best(CUBE, [6, 5, 3], up, steps=5) == 31
    assert best(CUBE, [6, 6, 6], up) == 15 + 1 + 1
    assert best(CUBE, [0, 1, 2], [0, 2, 4]) == 0  # nothing can be gained: leave them
    assert best(CUBE, [7, 7, 7], [USED_POTION], steps=2) == 30
    # Axis 0 can be moved along where axis 1 is low and axis 2 is high only: a detour of two.
    graph = graph_requirements().index(((-1, 1), (0, 0), (0, 0)))
    assert best(graph, [0b110, USED_STONE, USED_STONE], [1]) == 1
    assert best(graph, [0b110, USED_STONE, USED_STONE], [1, 2, 3]) == 15


def brute_force(graph: int, stones: tuple, potions: tuple, steps: int) -> float:
    """Try all actions in all orders."""
    outcomes = outcome_table()[graph].tolist()

    @cache
    def value(stones: tuple, potions: tuple, steps: int) -> float:
        found = 0.0
        for s, stone in enumerate(stones if steps else ()):
            rest = (*stones[:s], *stones[s + 1 :])
            found = max(found, REWARDS[stone].item() + value(rest, potions, steps - 1))
            for p, potion in enumerate(potions):
                left = (*potions[:p], *potions[p + 1 :])
                moved = tuple(sorted((*rest, outcomes[potion][stone])))
                found = max(found, value(moved, left, steps - 1))
        return found

    return value(tuple(sorted(stones)), tuple(sorted(potions)), steps)


@pytest.mark.parametrize("seed", range(6))
def test_no_order_of_actions_is_better(seed):
    env = SymbolicAlchemy(num_potions=6, max_episode_steps=8, batch_size=[6], seed=seed)
    torch.manual_seed(seed)
    env.rollout(2 + seed)
    expected = [
        brute_force(
            int(env.task["graph"][row]),
            tuple(stone for stone in env._stones[row].tolist() if stone != USED_STONE),
            tuple(potion for potion in env._potions[row].tolist() if potion < USED_POTION),
            8 - int(env._num_steps[row]),
        )
        for row in range(6)
    ]
    assert env.optimal_return.tolist() == expected


def test_the_search_oracle_and_the_random_heuristic_of_the_paper():
    """Compare with Table 1 of arXiv 2102.02926: 288.5 +- 1.5 and 145.7 +- 1.5 in ten episodes."""
    rows = 4096
    env = SymbolicAlchemy(batch_size=[rows], seed=0)
    td = env.reset()
    oracle = env.optimal_return
    # The heuristic: random potions for random stones that aren't best yet, while there are both;
    # then all stones of a positive value go into the cauldron.
    generator = torch.Generator().manual_seed(0)
    earned = torch.zeros(rows)
    for _ in range(20):
        value = REWARDS[env._stones]
        luck = torch.rand(rows, 15, generator=generator)
        open_stone = (env._stones < USED_STONE) & (value < 2)
        potion = env._potions[:, 1:13] < USED_POTION
        go_on = open_stone.any(1) & potion.any(1)
        mix = (luck[:, :3] * open_stone).argmax(1) * 13 + 2 + (luck[:, 3:] * potion).argmax(1)
        collect = torch.where((value > 0).any(1), 1 + 13 * value.argmax(1), 0)
        td = env.step(td.set("action", torch.where(go_on, mix, collect)))["next"]
        earned += td["reward"].squeeze(-1)
    for figure, published in ((oracle, 288.5), (earned, 145.7)):
        error = 10 * (figure.var() / rows).sqrt().item()
        assert 10 * figure.mean().item() == pytest.approx(
            published, abs=3 * (1.5**2 + error**2) ** 0.5
        )
