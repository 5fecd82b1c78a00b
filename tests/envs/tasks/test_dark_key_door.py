"""DarkKeyDoor: episodes by hand, the rules as properties against a plain loop, pictures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from torchrl_amago.envs import make_trial_env
from torchrl_amago.envs.tasks import DarkKeyDoor

STAY, DOWN, UP, RIGHT, LEFT = range(5)


def furnish(env: DarkKeyDoor, start: tuple, key: tuple, door: tuple) -> TensorDict:
    """Place start, key and door of all rows; begin a new episode."""
    env.reset()
    places = {"_start": start, "_key": key, "_door": door}
    state = env.state_dict()
    for name, (down, right) in places.items():
        state[name] = torch.full_like(state[name], down * env.size + right)
    env.load_state_dict(state)
    return env.reset(repeat_task=True)


def act(env: DarkKeyDoor, *actions: int) -> TensorDict:
    """Take actions in all rows: what follows each, stacked along the last dimension."""
    shape = env.batch_size
    out = [
        env.step(TensorDict({"action": torch.full(shape, action)}, batch_size=shape))["next"]
        for action in actions
    ]
    return torch.stack(out, -1)


def rewards(out: TensorDict) -> list[float]:
    return out["reward"].flatten().tolist()


def test_key_then_door():
    env = DarkKeyDoor(4)
    td = furnish(env, start=(1, 1), key=(1, 3), door=(2, 3))
    assert td["observation"].tolist() == [0.25, 0.25]
    out = act(env, RIGHT, RIGHT, STAY, DOWN)
    assert rewards(out) == [0, 1, 0, 1]  # the key counts once
    assert out["observation"].tolist() == [[0.25, 0.5], [0.25, 0.75], [0.25, 0.75], [0.5, 0.75]]
    assert out["terminated"].flatten().tolist() == [False, False, False, True]
    assert not out["truncated"].any()


def test_the_door_does_nothing_without_the_key():
    env = DarkKeyDoor(4)
    furnish(env, start=(0, 0), key=(0, 2), door=(0, 1))
    out = act(env, RIGHT, RIGHT, LEFT)
    assert rewards(out) == [0, 1, 1]
    assert out["terminated"].flatten().tolist() == [False, False, True]


def test_a_shared_cell_takes_two_steps():
    env = DarkKeyDoor(4)
    furnish(env, start=(0, 0), key=(1, 0), door=(1, 0))
    out = act(env, DOWN, STAY)
    assert rewards(out) == [1, 1]
    assert out["terminated"].flatten().tolist() == [False, True]
    furnish(env, start=(2, 2), key=(2, 2), door=(2, 3))
    assert rewards(act(env, STAY, RIGHT)) == [1, 1]  # a key at the start is found by a step


def test_the_step_limit_truncates_and_the_next_episode_begins_without_the_key():
    env = DarkKeyDoor(4, max_episode_steps=3)
    furnish(env, start=(0, 0), key=(0, 1), door=(3, 3))
    out = act(env, RIGHT, STAY, STAY)
    assert out["truncated"].flatten().tolist() == [False, False, True]
    assert not out["terminated"].any()
    env.reset(repeat_task=True)
    assert rewards(act(env, RIGHT)) == [1]


def test_the_door_at_the_step_limit_is_terminated_only():
    env = DarkKeyDoor(4, max_episode_steps=2)
    furnish(env, start=(0, 0), key=(0, 1), door=(0, 2))
    out = act(env, RIGHT, RIGHT)[..., -1]
    assert out["terminated"]
    assert out["done"]
    assert not out["truncated"]


def test_walls_stay():
    env = DarkKeyDoor(2)
    furnish(env, start=(0, 0), key=(1, 1), door=(1, 1))
    out = act(env, UP, LEFT, DOWN, DOWN)
    assert (out["observation"] * 2).tolist() == [[0, 0], [0, 0], [1, 0], [1, 0]]


def test_a_light_room_shows_everything():
    env = DarkKeyDoor(4, dark=False)
    td = furnish(env, start=(0, 0), key=(0, 1), door=(3, 2))
    assert td["observation"].tolist() == [0, 0, 0, 0, 0.25, 0.75, 0.5]
    out = act(env, RIGHT)
    assert out["observation"].flatten().tolist() == [0, 0.25, 1, 0, 0.25, 0.75, 0.5]


def test_a_dark_room_shows_the_position_alone():
    """Two rooms that differ in key and door look the same until one of them pays."""
    views = []
    for key, door in (((3, 3), (3, 2)), ((2, 2), (1, 3))):
        env = DarkKeyDoor(4)
        td = furnish(env, start=(0, 0), key=key, door=door)
        views.append(
            [td["observation"].tolist(), act(env, DOWN, RIGHT, UP)["observation"].tolist()]
        )
    assert views[0] == views[1]


def test_rooms_are_uniform_and_independent():
    rows = 4000
    env = DarkKeyDoor(3, batch_size=[rows], seed=0)
    env.reset()
    for place in (env.start, env.key, env.door):
        assert place.shape == (rows, 2)
        cell = place @ torch.tensor([3, 1])
        fraction = torch.bincount(cell, minlength=9) / rows
        assert fraction.tolist() == pytest.approx([1 / 9] * 9, abs=4 * (8 / 81 / rows) ** 0.5)
    for one, other in ((env.start, env.key), (env.key, env.door), (env.start, env.door)):
        meet = (one == other).all(-1).float().mean().item()
        assert meet == pytest.approx(1 / 9, abs=4 * (8 / 81 / rows) ** 0.5)


def test_actions_are_permuted_by_task():
    rows = 2000
    env = DarkKeyDoor(5, batch_size=[rows], randomize_actions=True, seed=0)
    furnish(env, start=(2, 2), key=(0, 0), door=(0, 0))
    moves = []
    for action in range(5):
        env.reset(repeat_task=True)
        out = act(env, action)["observation"].squeeze(1)
        moves.append((out * 5).round().long() - 2)
    moves = torch.stack(moves, 1)
    # Each row's five actions do the five things, in an order of the row's own.
    code = (moves @ torch.tensor([10, 1])).sort(-1).values
    assert (code == torch.tensor([-10, -1, 0, 1, 10])).all()
    stays = (moves == 0).all(-1).float().mean(0)
    assert stays.tolist() == pytest.approx([0.2] * 5, abs=4 * (0.16 / rows) ** 0.5)
    first = env.state_dict()["_meaning"].clone()
    env.reset()
    assert not torch.equal(env.state_dict()["_meaning"], first)


def episode_by_the_book(size: int, start, key, door, actions, limit) -> list[tuple]:
    """The rules, one step after the other: (cell, reward, terminated, truncated)."""
    moves = {STAY: (0, 0), DOWN: (1, 0), UP: (-1, 0), RIGHT: (0, 1), LEFT: (0, -1)}
    cell, has_key, out = start, False, []
    for step, action in enumerate(actions, 1):
        cell = tuple(
            min(max(at + by, 0), size - 1) for at, by in zip(cell, moves[action], strict=True)
        )
        reward, terminated = 0.0, False
        if has_key and cell == door:
            reward, terminated = 1.0, True
        elif not has_key and cell == key:
            reward, has_key = 1.0, True
        out.append((cell, reward, terminated, step >= limit and not terminated))
        if terminated or step >= limit:
            break
    return out


@given(st.data())
def test_episodes_follow_the_rules(data):
    size = data.draw(st.integers(2, 4))
    cell = st.tuples(st.integers(0, size - 1), st.integers(0, size - 1))
    start, key, door = (data.draw(cell) for _ in range(3))
    limit = data.draw(st.integers(1, 25))
    actions = data.draw(st.lists(st.integers(0, 4), min_size=1, max_size=30))
    env = DarkKeyDoor(size, max_episode_steps=limit)
    furnish(env, start, key, door)
    expected = episode_by_the_book(size, start, key, door, actions, limit)
    out = act(env, *actions[: len(expected)])
    cells = (out["observation"] * size).round().long().tolist()
    assert [tuple(at) for at in cells] == [cell for cell, *_ in expected]
    assert rewards(out) == [reward for _, reward, *_ in expected]
    assert out["terminated"].flatten().tolist() == [step[2] for step in expected]
    assert out["truncated"].flatten().tolist() == [step[3] for step in expected]


def test_a_trial_of_fixed_length_soft_resets():
    env = make_trial_env(DarkKeyDoor(4, max_episode_steps=5, batch_size=[2], seed=0), horizon=12)
    furnish(env.base_env, start=(0, 0), key=(0, 1), door=(0, 2))
    td = env.reset()
    furnish(env.base_env, start=(0, 0), key=(0, 1), door=(0, 2))
    paid, episodes = [], []
    for step in range(12):
        # Row 0 walks right and through the door, again and again; row 1 stays.
        td["action"] = torch.tensor([RIGHT, STAY])
        step, td = env.step_and_maybe_reset(td)
        paid.append(step["next", "reward"].flatten().tolist())
        episodes.append(step["next", "episode_idx"].flatten().tolist())
    assert [reward for reward, _ in paid] == [1] * 12
    assert [episode for episode, _ in episodes] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 5, 5, 5]
    assert [reward for _, reward in paid] == [0] * 12
    assert [episode for _, episode in episodes] == [0] * 4 + [1] * 5 + [2] * 3
    assert step["next", "done"].all()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"size": 1}, "size must be an integer of at least 2, got 1"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1, got 0. It limits"),
    ],
)
def test_arguments_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        DarkKeyDoor(**kwargs)


def test_render_shows_agent_key_and_door():
    env = DarkKeyDoor(3)
    furnish(env, start=(0, 0), key=(0, 1), door=(2, 2))

    def tiles():
        return env.render(cell_pixels=24).reshape(3, 24, 3, 24, 3).swapaxes(1, 2)

    before = tiles()
    empty = before[1, 1]
    special = {(i, j) for i in range(3) for j in range(3) if (before[i, j] != empty).any()}
    assert {(0, 0), (0, 1), (2, 2)} <= special
    act(env, RIGHT)
    after = tiles()
    changed = {(i, j) for i in range(3) for j in range(3) if (after[i, j] != before[i, j]).any()}
    assert changed == {(0, 0), (0, 1), (2, 2)}  # the agent took the key, and the door opened
    light = DarkKeyDoor(3, dark=False)
    furnish(light, start=(0, 0), key=(0, 1), door=(2, 2))
    assert light.render().mean() > env.render().mean()


def test_a_carried_key_is_drawn_in_every_cell():
    env = DarkKeyDoor(3, seed=0)
    for cell in range(9):
        furnish(env, divmod(cell, 3), divmod(cell, 3), divmod(8 - cell, 3))
        without = env.render()
        env._has_key.fill_(True)
        picture = env.render()
        assert picture.shape == without.shape
        down, right = (32 * place for place in divmod(cell, 3))
        area = picture[down : down + 32, right : right + 32]
        assert (area != without[down : down + 32, right : right + 32]).any()
