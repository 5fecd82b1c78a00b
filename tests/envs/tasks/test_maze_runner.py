"""MazeRunner: mazes against a plain generator, episodes by hand and against a plain loop."""

from __future__ import annotations

import random
from collections import Counter, deque

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from torchrl_amago import make_policy
from torchrl_amago.envs import make_trial_env
from torchrl_amago.envs.tasks import MazeRunner
from torchrl_amago.envs.tasks.maze_runner._layouts import (
    depth_table,
    random_mazes,
    start_cell,
)

STAY, DOWN, UP, RIGHT, LEFT = range(5)

# Mazes of this size differ in two cells of the second row only.
OPEN_7 = ["#######", "#     #", "#     #", "# # # #", "# # # #", "# # # #", "#######"]


def walls_of(rows: list[str]) -> torch.Tensor:
    return torch.tensor([[cell == "#" for cell in row] for row in rows])


def furnish(env: MazeRunner, goals: list[tuple[int, int]], rows: list[str] = OPEN_7) -> TensorDict:
    """Place walls and goals of all rows; begin a new episode."""
    env.reset()
    state = env.state_dict()
    walls = walls_of(rows)
    state["_walls"] = walls.flatten().expand_as(state["_walls"]).clone()
    state["_depth"] = depth_table(walls.unsqueeze(0)).expand_as(state["_depth"]).clone()
    cells = torch.tensor([down * env.size + right for down, right in goals])
    state["_goals"] = cells.expand_as(state["_goals"]).clone()
    env.load_state_dict(state)
    return env.reset(repeat_task=True)


def act(env: MazeRunner, *actions: int) -> TensorDict:
    """Take actions in all rows: what follows each, stacked along the last dimension."""
    shape = env.batch_size
    out = [
        env.step(TensorDict({"action": torch.full(shape, action)}, batch_size=shape))["next"]
        for action in actions
    ]
    return torch.stack(out, -1)


# ------------------------------------------------------------------ mazes


def reachable(maze: list[list[bool]], start: tuple[int, int]) -> set[tuple[int, int]]:
    """Plain breadth-first search."""
    seen, queue = {start}, deque([start])
    while queue:
        i, j = queue.popleft()
        for cell in ((i + 1, j), (i - 1, j), (i, j + 1), (i, j - 1)):
            if cell not in seen and not maze[cell[0]][cell[1]]:
                seen.add(cell)
                queue.append(cell)
    return seen


@given(size=st.sampled_from([7, 9, 11, 15, 21]), seed=st.integers(0, 2**31))
def test_every_free_cell_can_be_reached_from_the_start(size, seed):
    mazes = random_mazes(20, size, torch.Generator().manual_seed(seed))
    assert mazes.shape == (20, size, size)
    start = divmod(start_cell(size), size)
    for maze in mazes.tolist():
        assert all(maze[0])
        assert all(maze[-1])
        assert all(row[0] and row[-1] for row in maze)
        free = {(i, j) for i in range(size) for j in range(size) if not maze[i][j]}
        assert reachable(maze, start) == free


def maze_by_the_book(size: int, rng: random.Random) -> tuple[bool, ...]:
    """A random maze, one wall after the other and one try after the other; then the lobby."""
    wall = [[i in (0, size - 1) or j in (0, size - 1) for j in range(size)] for i in range(size)]
    half = size // 2
    for _ in range(int(0.75 * half * half)):
        i, j = 2 * rng.randrange(half + 1), 2 * rng.randrange(half + 1)
        wall[i][j] = True
        for _ in range(int(0.75 * 10 * size)):
            around = [(i + di, j + dj) for di, dj in ((0, -2), (0, 2), (-2, 0), (2, 0))]
            inside = [(a, b) for a, b in around if 0 <= a < size and 0 <= b < size]
            a, b = rng.choice(inside)
            if not wall[a][b]:
                wall[a][b] = wall[(a + i) // 2][(b + j) // 2] = True
                i, j = a, b
    for i in range(size - 5, size - 1):
        for j in range(1, size - 1):
            wall[i][j] = i > size - 5 and j in (half - 1, half + 1)
    return tuple(cell for row in wall for cell in row)


def test_mazes_are_distributed_as_by_the_book():
    """Two samples of 9x9 mazes, compared by chi-square over the commonest layouts and the rest."""
    num, rng = 1200, random.Random(0)
    slow = Counter(maze_by_the_book(9, rng) for _ in range(num))
    drawn = random_mazes(num, 9, torch.Generator().manual_seed(0)).flatten(1).tolist()
    quick = Counter(map(tuple, drawn))
    common = [layout for layout, _ in (slow + quick).most_common(60)]
    pairs = [(slow[layout], quick[layout]) for layout in common]
    pairs.append((num - sum(s for s, _ in pairs), num - sum(q for _, q in pairs)))
    chi_square = sum((s - q) ** 2 / (s + q) for s, q in pairs)
    assert chi_square < 99.6  # 99.9% of samples of 60 degrees of freedom
    rates = [torch.tensor(mazes).double().mean(0) for mazes in (drawn, list(slow.elements()))]
    assert (rates[0] - rates[1]).abs().max() < 4.5 * (2 * 0.25 / num) ** 0.5


def test_mazes_differ_and_follow_the_seed():
    def draw(seed):
        return random_mazes(16, 15, torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))
    assert len({tuple(maze) for maze in draw(1).flatten(1).tolist()}) == 16


# ------------------------------------------------------------------ the rules


def test_one_goal_then_the_other():
    env = MazeRunner(7, num_goals=2, max_episode_steps=20)
    td = furnish(env, [(3, 3), (2, 2)])
    assert td["achieved"].tolist() == [[pytest.approx(5 / 7), pytest.approx(3 / 7)]]
    assert (td["goals"] * 7).round().tolist() == [[3, 3], [2, 2]]
    out = act(env, UP, UP, UP, LEFT)
    assert out["reward"].flatten().tolist() == [0, 1, 0, 1]
    assert (out["achieved"][:, 0] * 7).round().tolist() == [[4, 3], [3, 3], [2, 3], [2, 2]]
    assert out["terminated"].flatten().tolist() == [False, False, False, True]
    assert not out["truncated"].any()
    assert (out["goals"] * 7).round().tolist() == [
        [[3, 3], [2, 2]],
        [[-7, -7], [2, 2]],
        [[-7, -7], [2, 2]],
        [[-7, -7], [-7, -7]],
    ]
    assert out["goals"][-1].tolist() == [[-1, -1], [-1, -1]]


def test_goals_count_in_their_order_only():
    env = MazeRunner(7, num_goals=2)
    furnish(env, [(2, 3), (4, 3)])
    out = act(env, UP, UP, UP, DOWN, DOWN)
    assert out["reward"].flatten().tolist() == [0, 0, 1, 0, 1]


def test_a_goal_under_the_agent_is_met_by_a_step():
    env = MazeRunner(7, num_goals=1)
    furnish(env, [(5, 3)])
    out = act(env, STAY)
    assert out["reward"].item() == 1
    assert out["terminated"].item()


def test_walls_stay_and_depths_are_seen():
    env = MazeRunner(7, num_goals=1, max_episode_steps=10)
    td = furnish(env, [(1, 1)])
    seen = (td["observation"][:6] * 7).round().tolist()
    assert seen == [5, 3, 0, 4, 0, 0]  # at (5, 3): walls left, right and below, four cells above
    out = act(env, LEFT, DOWN, UP, UP, UP, RIGHT)["observation"]
    assert (out[:, :6] * 7).round().tolist() == [
        [5, 3, 0, 4, 0, 0],
        [5, 3, 0, 4, 0, 0],
        [4, 3, 0, 3, 0, 1],
        [3, 3, 0, 2, 0, 2],
        [2, 3, 2, 1, 2, 3],
        [2, 4, 3, 1, 1, 0],
    ]
    assert out[:, 6].tolist() == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6])


def test_the_step_limit_truncates_and_the_last_goal_at_it_terminates():
    env = MazeRunner(7, num_goals=1, max_episode_steps=2)
    furnish(env, [(1, 1)])
    out = act(env, UP, UP)
    assert out["truncated"].flatten().tolist() == [False, True]
    assert not out["terminated"].any()
    furnish(env, [(3, 3)])
    out = act(env, UP, UP)[..., -1]
    assert out["terminated"]
    assert not out["truncated"]


def test_goals_are_uniform_over_free_cells_and_differ():
    rows = 8000
    env = MazeRunner(7, num_goals=2, batch_size=[rows], seed=0)
    env.reset()
    goals, walls = env.goals, env.walls
    assert goals.shape == (rows, 2, 2)
    row = torch.arange(rows).unsqueeze(-1)
    assert not walls[row, goals[..., 0], goals[..., 1]].any()
    cell = goals @ torch.tensor([7, 1])
    assert (cell[:, 0] != cell[:, 1]).all()
    assert (cell != start_cell(7)).all()
    for which in range(2):
        # Among mazes of the same walls each free cell but the start is as likely.
        layouts, kind = walls.flatten(1).unique(dim=0, return_inverse=True)
        for number, layout in enumerate(layouts):
            layout[start_cell(7)] = True
            count = torch.bincount(cell[kind == number, which], minlength=49)
            free = ~layout
            expected = count.sum() / free.sum()
            chi_square = ((count[free] - expected) ** 2 / expected).sum()
            # 99.9% of samples of 17 degrees of freedom stay below 40.8; eight are looked at.
            assert chi_square < 46


def test_actions_are_permuted_by_task():
    rows = 2000
    env = MazeRunner(7, num_goals=1, batch_size=[rows], randomize_actions=True, seed=0)
    cross = ["#######", "#     #", "#     #", "#     #", "#     #", "#     #", "#######"]
    moves = []
    for action in range(5):
        furnish(env, [(1, 1)], cross) if action == 0 else env.reset(repeat_task=True)
        place = act(env, action)["achieved"].squeeze(1)[:, 0]
        moves.append((place * 7).round().long() - torch.tensor([5, 3]))
    code = torch.stack(moves, 1) @ torch.tensor([10, 1])
    # From the start one cannot go down: two of the five actions stay.
    assert (code.sort(-1).values == torch.tensor([-10, -1, 0, 0, 1])).all()
    up = (code == -10).float().mean(0)
    assert up.tolist() == pytest.approx([0.2] * 5, abs=4 * (0.16 / rows) ** 0.5)


def episode_by_the_book(maze, goals, actions, limit) -> list[tuple]:
    """The rules, one step after the other: (cell, goals reached, reward, terminated, truncated)."""
    moves = {STAY: (0, 0), DOWN: (1, 0), UP: (-1, 0), RIGHT: (0, 1), LEFT: (0, -1)}
    cell, reached, out = divmod(start_cell(len(maze)), len(maze)), 0, []
    for step, action in enumerate(actions, 1):
        ahead = (cell[0] + moves[action][0], cell[1] + moves[action][1])
        if not maze[ahead[0]][ahead[1]]:
            cell = ahead
        reward = float(list(cell) == goals[reached])
        reached += int(reward)
        terminated = reached == len(goals)
        out.append((cell, reached, reward, terminated, step >= limit and not terminated))
        if terminated or step >= limit:
            break
    return out


def depths_by_the_book(maze, cell) -> list[int]:
    """West, north, east, south."""
    depths = []
    for down, right in ((0, -1), (-1, 0), (0, 1), (1, 0)):
        i, j, free = cell[0] + down, cell[1] + right, 0
        while not maze[i][j]:
            i, j, free = i + down, j + right, free + 1
        depths.append(free)
    return depths


@given(st.data())
def test_episodes_follow_the_rules(data):
    size, num_goals = data.draw(st.sampled_from([7, 9, 11])), data.draw(st.integers(1, 3))
    seed, limit = data.draw(st.integers(0, 2**31)), data.draw(st.integers(1, 40))
    rows = 8
    env = MazeRunner(
        size, num_goals=num_goals, max_episode_steps=limit, batch_size=[rows], seed=seed
    )
    env.reset()
    mazes, goals = env.walls.tolist(), env.goals.tolist()
    # Mostly upwards, out of the alley.
    weights = torch.tensor([0.5, 1.0, 2.0, 1.0, 1.0])
    generator = torch.Generator().manual_seed(seed)
    actions = weights.multinomial(rows * limit, replacement=True, generator=generator)
    actions = actions.view(limit, rows)
    steps = [env.step(TensorDict({"action": action}, [rows]))["next"] for action in actions]
    for row in range(rows):
        expected = episode_by_the_book(mazes[row], goals[row], actions[:, row].tolist(), limit)
        for t, (cell, reached, reward, terminated, truncated) in enumerate(expected):
            out = steps[t][row]
            assert (out["achieved"][0] * size).round().tolist() == list(cell)
            assert out["reward"].item() == reward
            assert out["terminated"].item() == terminated
            assert out["truncated"].item() == truncated
            shown = [[-size, -size]] * reached + goals[row][reached:]
            assert (out["goals"] * size).round().tolist() == shown
            seen = (out["observation"] * size).tolist()
            assert seen[:6] == pytest.approx([*cell, *depths_by_the_book(mazes[row], cell)])
            assert seen[6] == pytest.approx(size * (t + 1) / limit)


def test_a_new_stock_of_mazes_is_drawn_when_one_is_used_up():
    env = MazeRunner(15, num_goals=1, max_episode_steps=1, seed=0)
    mazes = []
    for _ in range(200):
        env.reset()
        mazes.append(tuple(env.walls.flatten().tolist()))
    # Mazes of this size hardly ever repeat.
    assert len(set(mazes)) > 190
    env.set_seed(0)
    for maze in mazes[:100]:
        env.reset()
        assert tuple(env.walls.flatten().tolist()) == maze


def test_the_policy_need_not_see_what_was_achieved():
    env = make_trial_env(MazeRunner(7, num_goals=2, batch_size=[3], seed=0), episodes=1)
    policy = make_policy(env, context_length=10, obs_keys=["observation", "goals"])
    td = env.reset()
    state = policy.encoder(td.clone())["state"]
    other = policy.encoder(td.clone().set("achieved", torch.full((3, 1, 2), 5.0)))["state"]
    assert torch.equal(state, other)
    assert env.rollout(4, policy)["action"].shape == (3, 4)


# ------------------------------------------------------------------ the rest


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        (dict(size=8), "size must be an odd integer of at least 7, got 8"),
        (dict(num_goals=0), r"num_goals must be an integer in \[1, \d+\] for size=11, got 0"),
        (dict(size=7, num_goals=14), r"in \[1, 13\] for size=7, got 14"),
    ],
)
def test_arguments_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        MazeRunner(**kwargs)


def test_render_shows_walls_agent_and_goals():
    env = MazeRunner(7, num_goals=2)
    furnish(env, [(4, 3), (1, 1)])

    def tiles():
        return env.render(cell_pixels=24).reshape(7, 24, 7, 24, 3).swapaxes(1, 2)

    before = tiles()
    for i, row in enumerate(OPEN_7):
        for j, cell in enumerate(row):
            assert (before[i, j].mean() < 120) == (cell == "#")
    empty = before[2, 2]
    special = {
        (i, j)
        for i, row in enumerate(OPEN_7)
        for j, cell in enumerate(row)
        if cell == " " and (before[i, j] != empty).any()
    }
    assert special == {(5, 3), (4, 3), (1, 1)}
    act(env, UP)
    after = tiles()
    changed = {(i, j) for i in range(7) for j in range(7) if (after[i, j] != before[i, j]).any()}
    assert changed == {(5, 3), (4, 3), (1, 1)}  # the second goal is the next one now
