"""SymbolicAlchemy: episodes recorded from dm_alchemy, rules by hand, distributions, options."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from torchrl_amago.envs.tasks import SymbolicAlchemy
from torchrl_amago.envs.tasks.alchemy import chemistry
from torchrl_amago.envs.tasks.alchemy.chemistry import USED_POTION, USED_STONE

# Recorded from dm_alchemy 1.0 (github.com/google-deepmind/dm_alchemy) on random actions: numbers of
# chemistries and items, actions (-1 after the end), rewards, and observations times 3.
RECORDED = dict(np.load(Path(__file__).with_name("dm_alchemy_episodes.npz")))
CUBE = 108  # the graph without missing edges
IDENTITY = [CUBE, 7, 7, 0]


def at(env: SymbolicAlchemy, task, stones, potions) -> TensorDict:
    """Begin an episode of each row with these items, numbers as in dm_alchemy."""
    td = env.reset()
    state = env.state_dict()
    places = [torch.as_tensor(items, dtype=torch.int64) for items in (task, stones, potions)]
    state["_chemistry"] = places[0].expand(env.num_rows, 4).clone()
    state["_stones"][:, : places[1].shape[-1]] = places[1]
    state["_potions"][:, 1 : 1 + places[2].shape[-1]] = places[2]
    env.load_state_dict(state)
    return td.set("observation", env._observe().view_as(td["observation"]))


def play(env: SymbolicAlchemy, *actions: int) -> list[float]:
    """Take actions in an environment without a batch; returns the rewards."""
    steps = [env.step(TensorDict({"action": torch.tensor(action)}))["next"] for action in actions]
    return [step["reward"].item() for step in steps]


def potions_left(env: SymbolicAlchemy) -> list[int]:
    return [int(potion) for potion in env._potions[0, 1:-1] if potion != USED_POTION]


@pytest.mark.parametrize("end_action", [False, True])
def test_episodes_of_dm_alchemy_repeat_exactly(end_action):
    chosen = RECORDED["end_action"] == end_action
    episodes = {name: torch.from_numpy(value[chosen]).long() for name, value in RECORDED.items()}
    rows = len(episodes["task"])
    env = SymbolicAlchemy(batch_size=[rows], end_action=end_action, show_chemistry=True, seed=0)
    td = at(env, episodes["task"], episodes["stones"], episodes["potions"])
    seen = episodes["observations"].double() / 3
    assert torch.equal(td["observation"], seen[:, 0].float())
    running = torch.ones(rows, dtype=torch.bool)
    for t in range(20):
        action = episodes["actions"][:, t]
        running &= action >= 0
        td = env.step(td.set("action", action.clamp(min=0)))["next"]
        assert torch.equal(td["observation"][running], seen[running, t + 1].float())
        assert torch.equal(td["reward"][running, 0], episodes["rewards"][running, t].float())
        ends = torch.full_like(running, t == 19) | (end_action & (action == 0))
        assert torch.equal(td["terminated"][running, 0], ends[running])


def test_a_stone_is_worth_its_coordinates_and_a_bonus():
    rewards = []
    for stone in range(8):
        env = SymbolicAlchemy()
        at(env, IDENTITY, [0, stone, 0], [])
        rewards += play(env, 1 + 13)
        assert play(env, 1 + 13) == [0]
    assert rewards == [-3, -1, -1, 1, -1, 1, 1, 15]


def test_potions_move_stones_and_are_used_up():
    env = SymbolicAlchemy(num_potions=4)
    at(env, IDENTITY, [0, 0, 7], [1, 3, 5, 5])  # three potions that raise an axis each
    assert play(env, 2, 3, 4, 1) == [0, 0, 0, 15]
    assert potions_left(env) == [5]
    play(env, 5)  # the stone is used: nothing happens
    assert potions_left(env) == [5]
    play(env, 5 + 26)  # no effect, since this stone is at the end of its axis
    assert potions_left(env) == []
    play(env, 2 + 13)  # a used potion
    assert env._stones.tolist() == [[USED_STONE, 0, 7]]


def test_shaping_pays_potions_for_what_they_add():
    env = SymbolicAlchemy(num_potions=5, shaping=True)
    at(env, IDENTITY, [0, 0, 7], [1, 3, 5, 5, 4])
    assert play(env, 2, 3, 4, 1) == [2, 2, 14, 15]
    assert play(env, 5, 5 + 26, 6 + 26, 6 + 26) == [0, 0, -14, 0]


def test_missing_edges_hold_stones_back_both_ways():
    graph = chemistry.graph_requirements().index(((-1, 1), (0, 0), (0, 0)))
    env = SymbolicAlchemy(bottleneck="1", num_potions=4)
    at(env, [graph, 7, 7, 0], [0b000, 0b001, 0b100], [1, 0, 1, 0])
    play(env, 2, 3 + 13, 4 + 26)
    assert env._stones.tolist() == [[0b000, 0b001, 0b101]]
    play(env, 5 + 26)
    assert env._stones.tolist() == [[0b000, 0b001, 0b100]]


def test_end_action_and_step_limit_terminate():
    env = SymbolicAlchemy(end_action=True, max_episode_steps=3)
    for actions, ends in (([1, 1, 1], [0, 0, 1]), ([1, 0], [0, 1])):
        env.reset()
        steps = [env.step(TensorDict({"action": torch.tensor(action)})) for action in actions]
        assert [bool(step["next", "terminated"]) for step in steps] == ends
        assert not any(step["next", "truncated"] for step in steps)


def test_an_action_names_a_colour_of_a_potion_that_is_left():
    env = SymbolicAlchemy(colour_actions=True, end_action=True, num_potions=4, seed=0)
    assert env.action_spec.n == 2 + 3 * 7
    at(env, [CUBE, 3 * 8 + 7, 7, 0], [0, 0, 7], [4, 3, 5, 3])
    # Axes 0, 1, 2 of colours are the latent axes 1, 2, 0, in the same direction.
    colour_one, colour_three = 3 + 1, 3 + 3
    play(env, colour_one)
    assert potions_left(env) == [4, 5, 3]
    play(env, colour_three + 7)
    assert potions_left(env) == [4, 3]
    play(env, colour_one, colour_one, 1)
    assert potions_left(env) == [4]
    assert env._stones.tolist() == [[0b010, 0b100, 7]]
    assert play(env, 2 + 14, 2) == [15, -1]


def test_there_are_167_424_chemistries_with_the_published_probabilities():
    graphs = chemistry.graph_requirements()
    number = [sum(value != 0 for axis in graph for value in axis) for graph in graphs]
    assert Counter(number) == {0: 1, 1: 12, 2: 48, 3: 48}
    assert len(chemistry.graph_edges().flatten(1).unique(dim=0)) == len(graphs) == 109
    assert 109 * 48 * 8 * 4 == 167_424
    expected = [1 / 4 / Counter(number)[n] for n in number]
    assert chemistry.graph_probabilities().tolist() == pytest.approx(expected)
    env = SymbolicAlchemy(batch_size=[4000], seed=0)
    env.reset()
    drawn = torch.tensor(number)[env.task["graph"]].bincount(minlength=4) / 4000
    assert drawn.tolist() == pytest.approx([0.25] * 4, abs=0.03)
    for name, types in (("potion_map", 48), ("stone_map", 8), ("rotation", 4)):
        counts = env.task[name].bincount(minlength=types)
        assert counts.shape == (types,)
        assert (counts - 4000 / types).abs().max() < 5 * (4000 / types) ** 0.5
    for items, types in ((env._stones, 8), (env._potions[:, 1:13], 6)):
        fraction = items.flatten().bincount(minlength=types) / items.numel()
        assert fraction.tolist() == pytest.approx([1 / types] * types, abs=0.02)


def test_a_repeated_task_draws_other_items():
    env = SymbolicAlchemy(batch_size=[50], seed=0)
    env.reset()
    task, stones = env.task, env._stones.clone()
    env.reset(repeat_task=True)
    assert (env.task == task).all()
    assert (env._stones != stones).any(-1).float().mean() > 0.9


def test_options_fix_parts_of_the_task():
    env = SymbolicAlchemy(
        bottleneck="none", random_maps=False, rotation=False, num_stones=1, num_potions=2,
        batch_size=[20], seed=0,
    )  # fmt: skip
    td = env.reset()
    assert torch.equal(torch.stack(list(env.task.values()), -1), torch.tensor([IDENTITY] * 20))
    used = [4, 9, 14, *range(16, 39, 2)]
    assert td["observation"][:, used].sum(0).tolist() == [0, 20, 20, 0, 0, *[20] * 10]
    assert len(SymbolicAlchemy(bottleneck="3", batch_size=[50]).reset()) == 50


def test_random_actions_return_what_they_do_in_dm_alchemy():
    # dm_alchemy's: 18.7 +- 1.6 and 16.3 +- 1.8 in two samples.
    env = SymbolicAlchemy(batch_size=[2000], seed=0)
    torch.manual_seed(0)
    mean = env.rollout(20)["next", "reward"].sum(1).mean() * 10
    assert mean.item() == pytest.approx(17.6, abs=3.5)


def test_the_picture_changes_with_what_is_left():
    env = SymbolicAlchemy(seed=0)
    at(env, IDENTITY, [0, 3, 7], [0, 1])
    pictures = [env.render(cell_pixels=16)]
    for action in (3, 1):
        play(env, action)
        pictures.append(env.render(cell_pixels=16))
    changed = [
        (before != after).any(-1).reshape(3, 16, 6, 16).any((1, 3)).nonzero()
        for before, after in itertools.pairwise(pictures)
    ]
    cells = [sorted(zip(*map(list, index), strict=True)) for index in changed]
    assert cells == [[(0, 0), (1, 1)], [(0, 0)]]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bottleneck": "4"}, "bottleneck must be one of"),
        ({"num_stones": 4}, "num_stones must be one of 1, 2, 3, got 4"),
        ({"num_potions": 13}, "num_potions must be one of"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        SymbolicAlchemy(**options)
