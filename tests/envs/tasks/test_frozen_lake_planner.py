"""The exact planner: hand-computed cases, an independent solver, and its policy simulated."""

from __future__ import annotations

from collections import deque
from functools import cache

import pytest
import torch

from torchrl_amago.envs.tasks.frozen_lake import (
    LakePlanner,
    MetaFrozenLake,
    bayes_optimal_success,
    enumerate_lakes,
)


def optimal_return_by_primitive_actions(size: int, episodes: int, steps: int) -> float:
    """Solve by expectimax over single moves and sets of lakes: no shared code or ideas."""
    lakes, probability = enumerate_lakes(size)
    holes = lakes.flatten(1).tolist()
    weight = probability.tolist()
    goal = size * size - 1

    def moved(cell: int, move: tuple[int, int]) -> int:
        row, column = divmod(cell, size)
        row = min(max(row + move[0], 0), size - 1)
        column = min(max(column + move[1], 0), size - 1)
        return row * size + column

    @cache
    def value(possible: frozenset[int], cell: int, steps_left: int, episodes_left: int) -> float:
        """Expected return, not normalised by the probability of `possible`."""
        if episodes_left == 0:
            return 0.0
        if steps_left == 0:
            return value(possible, 0, steps, episodes_left - 1)
        best = 0.0
        for move in ((0, 0), (1, 0), (-1, 0), (0, 1), (0, -1)):
            target = moved(cell, move)
            if target == goal:
                mass = sum(weight[lake] for lake in possible)
                total = mass + value(possible, 0, steps, episodes_left - 1)
            else:
                fall = frozenset(lake for lake in possible if holes[lake][target])
                stand = possible - fall
                total = value(fall, 0, steps, episodes_left - 1) if fall else 0.0
                total += value(stand, target, steps_left - 1, episodes_left) if stand else 0.0
            best = max(best, total)
        return best

    return value(frozenset(range(len(holes))), 0, steps, episodes)


def route(size: int, safe: int, cell: int, target: int) -> list[int]:
    """Return a shortest way over known-safe cells from a cell, excluded, to a target."""
    ways = deque([[cell]])
    while ways[0][-1] != target:
        way = ways.popleft()
        row, column = divmod(way[-1], size)
        for down, right in ((0, 1), (1, 0), (0, -1), (-1, 0)):
            if 0 <= row + down < size and 0 <= column + right < size:
                near = (row + down) * size + column + right
                if near == target or (safe >> near & 1 and near not in way):
                    ways.append([*way, near])
    return ways[0][1:]


def play(planner: LakePlanner, holes: list[bool]) -> list[bool]:
    """Follow the optimal policy through one trial on one lake, by single steps."""
    goal = planner.size**2 - 1
    belief, success = planner.start_belief, []
    for episode in range(planner.episodes):
        cell, steps_left, solved = 0, planner.max_episode_steps, False
        while steps_left and not solved:
            episodes_left = planner.episodes - episode
            target = planner.target(belief, cell, steps_left, episodes_left)
            if target is None:
                break
            way = route(planner.size, belief.safe, cell, target)
            assert all(belief.safe >> step & 1 for step in way[:-1])
            steps_left -= len(way)
            if holes[target]:
                belief = belief.with_hole(target)
                break
            cell, belief, solved = target, belief.with_safe(target), target == goal
        assert steps_left >= 0
        success.append(solved)
    return success


def test_standard_task():
    optimum = bayes_optimal_success(size=3, episodes=5, max_episode_steps=9)
    assert optimum.expected_return == pytest.approx(4.496316758748, abs=1e-10)
    assert optimum.success_by_episode == pytest.approx(
        (0.5755064457, 0.9208103131, 1.0, 1.0, 1.0), abs=1e-9
    )


def test_size_two_by_hand():
    # Of both paths, each one-cell, a given one is safe with (0.64 + 0.16) / 0.96 = 5/6, and if the
    # first is a hole the other one must be safe.
    assert bayes_optimal_success(2, 1).success_by_episode == pytest.approx((5 / 6,))
    optimum = bayes_optimal_success(2, 3)
    assert optimum.success_by_episode == pytest.approx((5 / 6, 1.0, 1.0))
    assert optimum.expected_return == pytest.approx(5 / 6 + 2)


def test_step_limits_by_hand():
    # One step reaches no goal but still teaches; two steps just reach it.
    assert bayes_optimal_success(2, 4, 1).expected_return == 0.0
    assert bayes_optimal_success(2, 2, 2).expected_return == pytest.approx(11 / 6)
    assert bayes_optimal_success(3, 3, 3).expected_return == 0.0


def test_without_holes_every_episode_succeeds():
    optimum = bayes_optimal_success(3, 2, p_safe=1.0)
    assert optimum.success_by_episode == (1.0, 1.0)


def test_later_episodes_do_not_change_the_first_of_one():
    assert bayes_optimal_success(3, 1).expected_return == pytest.approx(0.5755064457, abs=1e-9)


@pytest.mark.parametrize(
    ("size", "episodes", "steps"), [(2, 2, 4), (3, 1, 4), (3, 1, 9), (3, 2, 6), (3, 3, 4)]
)
def test_value_equals_expectimax_over_primitive_actions(size, episodes, steps):
    expected = optimal_return_by_primitive_actions(size, episodes, steps)
    optimum = bayes_optimal_success(size, episodes, steps)
    assert optimum.expected_return == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("layouts", ["all", "train", "heldout"])
@pytest.mark.parametrize(("episodes", "steps"), [(5, 9), (3, 5), (2, 4)])
def test_policy_simulated_on_every_lake_gives_the_same_success(episodes, steps, layouts):
    planner = LakePlanner(3, episodes, steps, layouts=layouts)
    lakes, probability = enumerate_lakes(3, layouts=layouts)
    success = torch.tensor([play(planner, lake) for lake in lakes.flatten(1).tolist()])
    simulated = (success * probability.unsqueeze(-1)).sum(0)
    assert simulated.tolist() == pytest.approx(planner.optimum().success_by_episode, abs=1e-12)


def test_policy_in_the_environment_gives_the_same_success():
    """Every 3x3 lake in one batch, played in MetaFrozenLake itself."""
    lakes, probability = enumerate_lakes(3)
    num, episodes = len(lakes), 5
    planner = LakePlanner(3, episodes)
    env = MetaFrozenLake(size=3, batch_size=[num], seed=0)
    tensordict = env.reset()
    env.load_state_dict({**env.state_dict(), "_lake": lakes.flatten(1)})
    beliefs = [planner.start_belief] * num
    action_of_move = {0: 0, 3: 1, -3: 2, 1: 3, -1: 4}
    success = torch.zeros(num, episodes)
    for episode in range(episodes):
        tensordict = env.reset(repeat_task=True)
        active = torch.ones(num, dtype=torch.bool)
        for steps_left in range(planner.max_episode_steps, 0, -1):
            cell = (tensordict["observation"] * 3).round().long() @ torch.tensor([3, 1])
            move = [0] * num
            for row in active.nonzero().squeeze(-1).tolist():
                at = int(cell[row])
                target = planner.target(beliefs[row], at, steps_left, episodes - episode)
                if target is not None:
                    move[row] = route(3, beliefs[row].safe, at, target)[0] - at
            action = torch.tensor([action_of_move[step] for step in move])
            out = env.step(tensordict.set("action", action))["next"]
            now = (out["observation"] * 3).round().long() @ torch.tensor([3, 1])
            for row in active.nonzero().squeeze(-1).tolist():
                fell = bool(out["terminated"][row]) and not out["reward"][row]
                learn = beliefs[row].with_hole if fell else beliefs[row].with_safe
                beliefs[row] = learn(int(now[row]))
            success[:, episode] += out["reward"].squeeze(-1) * active
            active &= ~out["done"].squeeze(-1)
            tensordict = out.exclude("reward")
    simulated = (success.double() * probability.unsqueeze(-1)).sum(0)
    expected = planner.optimum().success_by_episode
    assert simulated.tolist() == pytest.approx(expected, abs=1e-9)


def test_a_known_split_can_only_help():
    # Knowing which split a lake is from is information: the average over splits is no lower.
    _, probability = enumerate_lakes(3)
    lakes = {name: enumerate_lakes(3, layouts=name)[0] for name in ("train", "heldout")}
    value = {name: bayes_optimal_success(3, 5, layouts=name).expected_return for name in lakes}
    p_heldout = 0.2495395948  # held-out probability, pinned in the layout tests
    assert len(lakes["train"]) + len(lakes["heldout"]) == len(probability)
    informed = p_heldout * value["heldout"] + (1 - p_heldout) * value["train"]
    assert informed > bayes_optimal_success(3, 5).expected_return


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"size": 5}, "feasible for size <= 4, got 5"),
        ({"size": 1}, "size must be an integer of at least 2, got 1"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1, got 0"),
    ],
)
def test_arguments_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        bayes_optimal_success(**kwargs)
