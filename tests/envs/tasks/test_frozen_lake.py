"""MetaFrozenLake: dynamics on lakes laid by hand, resets, modes, resume, pictures."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from torchrl_amago.envs.tasks.frozen_lake import MetaFrozenLake, enumerate_lakes, in_split

STAY, DOWN, UP, RIGHT, LEFT = range(5)


def lay(env: MetaFrozenLake, *rows: str) -> None:
    """Give every row of the batch the lake drawn as text; actions are not swapped."""
    holes = torch.tensor([[cell == "H" for cell in row] for row in rows]).flatten()
    state = env.state_dict()
    for name in ("_lake", "_broken_lake"):
        if name in state:
            state[name] = holes.expand_as(state[name]).clone()
    if "_table_start" in state:
        state["_table_start"] = torch.zeros_like(state["_table_start"])
    env.load_state_dict(state)


def act(env: MetaFrozenLake, *actions: int) -> TensorDict:
    """Take actions in all rows; the last step's outcome."""
    for action in actions:
        shape = env.batch_size
        td = env.step(TensorDict({"action": torch.full(shape, action)}, batch_size=shape))
    return td["next"]


def cells(tensordict: TensorDict, size: int) -> list:
    return (tensordict["observation"] * size).round().long().tolist()


def partial(env: MetaFrozenLake, *rows: int) -> TensorDict:
    mask = torch.zeros(env.batch_size.numel(), dtype=torch.bool)
    mask[list(rows)] = True
    return TensorDict({"_reset": mask.view(*env.batch_size, 1)}, batch_size=env.batch_size)


# ------------------------------------------------------------------------------------ contract


def test_specs():
    env = MetaFrozenLake(size=4, batch_size=[2, 3], seed=0)
    assert env.observation_spec["observation"].shape == (2, 3, 2)
    assert env.action_spec.shape == (2, 3)
    assert env.action_spec.n == 5
    one_hot = MetaFrozenLake(size=4, batch_size=[6], categorical_action_encoding=False)
    assert one_hot.action_spec.shape == (6, 5)
    assert env.repeats_task


def test_moves_shore_and_goal():
    env = MetaFrozenLake(size=3, batch_size=[2], seed=0)
    td = env.reset()
    assert cells(td, 3) == [[0, 0]] * 2
    lay(env, "...", "...", "...")
    walk = [(UP, [0, 0]), (LEFT, [0, 0]), (DOWN, [1, 0]), (RIGHT, [1, 1]), (STAY, [1, 1])]
    walk += [(UP, [0, 1]), (LEFT, [0, 0])]
    for action, cell in walk:
        out = act(env, action)
        assert cells(out, 3) == [cell] * 2
        assert not out["done"].any()
        assert not out["reward"].any()
    env.reset(repeat_task=True)
    out = act(env, DOWN, DOWN, RIGHT, RIGHT)
    assert cells(out, 3) == [[2, 2]] * 2
    assert (out["reward"] == 1).all()
    assert out["terminated"].all()
    assert not out["truncated"].any()


def test_rows_move_independently():
    env = MetaFrozenLake(size=3, batch_size=[2, 2], seed=0)
    env.reset()
    lay(env, ".H.", "...", "...")
    action = torch.tensor([[STAY, DOWN], [UP, RIGHT]])
    out = env.step(TensorDict({"action": action}, batch_size=[2, 2]))["next"]
    assert cells(out, 3) == [[[0, 0], [1, 0]], [[0, 0], [0, 1]]]
    assert out["terminated"].squeeze(-1).tolist() == [[False, False], [False, True]]


def test_one_hot_actions_move_as_integers_do():
    env = MetaFrozenLake(size=3, seed=0, categorical_action_encoding=False)
    env.reset()
    lay(env, "...", "...", "...")
    for action, cell in ((DOWN, [1, 0]), (RIGHT, [1, 1]), (UP, [0, 1]), (LEFT, [0, 0])):
        one_hot = torch.nn.functional.one_hot(torch.tensor(action), 5)
        out = env.step(TensorDict({"action": one_hot}))["next"]
        assert cells(out, 3) == cell


@pytest.mark.parametrize("scale", [True, 1, 1.0 - 1e-7, 1.0 + 1e-7])
def test_one_hot_actions_of_any_dtype(scale):
    """Samples with a gradient are one-hot up to rounding."""
    env = MetaFrozenLake(size=3, seed=0, categorical_action_encoding=False)
    env.reset()
    lay(env, "...", "...", "...")
    one_hot = torch.nn.functional.one_hot(torch.tensor(DOWN), 5) * torch.tensor(scale)
    if scale is True:
        one_hot = one_hot.bool()
    out = env.step(TensorDict({"action": one_hot}))["next"]
    assert cells(out, 3) == [1, 0]


def test_hole_ends_the_episode():
    env = MetaFrozenLake(size=3, seed=0)
    env.reset()
    lay(env, ".H.", "...", "...")
    out = act(env, RIGHT)
    assert out["terminated"]
    assert out["reward"] == 0
    assert cells(out, 3) == [0, 1]


def test_recover_mode_costs_and_returns():
    env = MetaFrozenLake(size=3, seed=0, recover_mode=True)
    env.reset()
    lay(env, "...", ".H.", "...")
    out = act(env, DOWN, RIGHT)
    assert cells(out, 3) == [1, 0]
    assert out["reward"].item() == pytest.approx(-0.1)
    assert not out["done"]
    out = act(env, DOWN, RIGHT, RIGHT)
    assert out["reward"] == 1
    assert out["terminated"]


@pytest.mark.parametrize(
    ("kwargs", "limit"),
    [
        ({}, 9),
        ({"hard_mode": True, "recover_mode": True}, 18),
        ({"slip_chance": 0.25}, 12),
        ({"max_episode_steps": 4}, 4),
    ],
)
def test_step_limit_truncates(kwargs, limit):
    env = MetaFrozenLake(size=3, batch_size=[2], seed=0, **kwargs)
    env.reset()
    for step in range(1, limit + 1):
        out = act(env, STAY)
        assert out["truncated"].all() == (step == limit)
        assert out["done"].all() == (step == limit)
        assert not out["terminated"].any()
    env.reset(partial(env, 0))
    assert act(env, STAY)["truncated"].squeeze(-1).tolist() == [False, True]


def test_goal_at_the_step_limit_is_terminated_only():
    env = MetaFrozenLake(size=2, seed=0, max_episode_steps=2)
    env.reset()
    lay(env, "..", "..")
    out = act(env, DOWN, RIGHT)
    assert out["terminated"]
    assert not out["truncated"]
    assert out["done"]


def test_slip_replaces_moves_at_the_given_rate():
    num = 4000
    env = MetaFrozenLake(size=3, batch_size=[num], seed=0, slip_chance=0.3)
    env.reset()
    lay(env, "...", "...", "...")
    moved = act(env, DOWN)["observation"][:, 0] > 0
    assert moved.float().mean().item() == pytest.approx(0.7, abs=4 * (0.21 / num) ** 0.5)


# ------------------------------------------------------------------------------------- resets


@pytest.mark.parametrize("hard_mode", [False, True])
@pytest.mark.parametrize("how", ["keyword", "flag", "entry"])
def test_partial_reset_repeats_renews_and_leaves_alone(hard_mode, how):
    env = MetaFrozenLake(size=5, batch_size=[6], seed=0, hard_mode=hard_mode)
    env.reset()
    before = {name: value.clone() for name, value in env.state_dict().items() if name[1] != "e"}
    holes = env.holes
    env.reset(repeat_task=True)
    td = act(env, STAY, STAY, DOWN)
    assert torch.equal(env.holes, holes)
    position = env.state_dict()["_cell"].clone()
    steps = env.state_dict()["_num_steps"].clone()
    assert (steps == 3).all()
    if how == "keyword":  # all selected rows repeat
        reset, repeats = partial(env, 0, 1, 2), [0, 1, 2]
        out = env.reset(td.exclude("reward").update(reset), repeat_task=True)
    else:
        flag = torch.tensor([True, False, False, True, False, False]).unsqueeze(-1)
        reset, repeats = td.exclude("reward").update(partial(env, 0, 1, 2)), [0]
        out = (
            env.reset(reset, repeat_task=flag)
            if how == "flag"
            else env.reset(reset.set("repeat_task", flag))
        )
    state = env.state_dict()
    same = (env.holes == holes).flatten(1).all(1).tolist()
    assert same == [row in repeats or row > 2 for row in range(6)]
    assert (state["_cell"][:3] == 0).all()
    assert (state["_num_steps"][:3] == 0).all()
    assert torch.equal(state["_cell"][3:], position[3:])
    assert torch.equal(state["_num_steps"][3:], steps[3:])
    assert torch.equal(out["observation"][3:], td["observation"][3:])
    if hard_mode:
        repeated = torch.tensor(repeats)
        assert torch.equal(state["_table_start"][repeated], before["_table_start"][repeated])
        assert torch.equal(state["_broken_lake"][:3], state["_lake"][:3])


def test_reset_flags_keep_their_rows_in_two_dimensions():
    env = MetaFrozenLake(size=5, batch_size=[2, 3], seed=0)
    env.reset()
    holes = env.holes
    env.reset(env.reset(repeat_task=True).update(partial(env, 1, 5)))
    same = (env.holes == holes).flatten(-2).all(-1)
    assert same.tolist() == [[True, False, True], [True, True, False]]


def test_repeating_before_any_task_draws_one():
    env = MetaFrozenLake(size=5, batch_size=[8], seed=0)
    env.reset(repeat_task=True)
    expected = MetaFrozenLake(size=5, batch_size=[8], seed=0)
    expected.reset()
    assert env.holes.any()
    assert torch.equal(env.holes, expected.holes)


def test_reseeding_forgets_the_task():
    env = MetaFrozenLake(size=5, batch_size=[8], seed=0)
    env.reset()
    first = env.holes
    env.set_seed(0)
    env.reset(repeat_task=True)
    assert torch.equal(env.holes, first)


def test_lakes_outlast_the_pool():
    env = MetaFrozenLake(size=3, batch_size=[300], seed=0)
    seen = []
    for _ in range(12):  # 3,600 lakes from a pool of 2,400
        env.reset()
        seen.append(env.holes)
    assert not torch.equal(seen[0], seen[8])
    fraction_of_holes = torch.stack(seen).float().mean().item()
    possible, probability = enumerate_lakes(3)
    expected = (probability * possible.double().mean((1, 2))).sum().item()
    assert fraction_of_holes == pytest.approx(expected, abs=0.006)


@pytest.mark.parametrize("layouts", ["train", "heldout"])
def test_layouts_stay_in_their_split(layouts):
    env = MetaFrozenLake(size=3, batch_size=[500], seed=0, layouts=layouts)
    env.reset()
    assert in_split(env.holes, layouts).all()


# ---------------------------------------------------------------------------------- hard mode


def test_hard_mode_noise():
    num = 8000
    env = MetaFrozenLake(size=3, batch_size=[num], seed=0, hard_mode=True)
    env.reset()
    lay(env, "...", "...", "...")
    env.load_state_dict({**env.state_dict(), "_cell": torch.full((num,), 4)})
    seen = act(env, STAY)["observation"] * 3
    exact = (seen == 1).all(-1).float().mean().item()
    # One noisy position in nine is the true one.
    assert exact == pytest.approx(0.75 + 0.25 / 9, abs=4 * (0.17 / num) ** 0.5)
    for coordinate in (0, 1):
        for value in (0, 2):
            rate = (seen[:, coordinate].round() == value).float().mean().item()
            assert rate == pytest.approx(0.25 / 3, abs=4 * (0.08 / num) ** 0.5)


def test_hard_mode_noise_stays_on_the_lake():
    env = MetaFrozenLake(size=3, batch_size=[2000], seed=0, hard_mode=True)
    seen = (env.reset()["observation"] * 3).round()
    assert set(seen.unique().tolist()) == {0.0, 1.0}


def test_hard_mode_opens_holes_behind_real_moves_only():
    num = 4000
    env = MetaFrozenLake(size=3, batch_size=[num], seed=0, hard_mode=True)
    env.reset()
    lay(env, "...", "...", "...")
    act(env, STAY, UP, LEFT)
    assert not env.state_dict()["_broken_lake"].any()
    act(env, DOWN)
    broken = env.state_dict()["_broken_lake"]
    assert broken[:, 0].float().mean().item() == pytest.approx(0.33, abs=4 * (0.22 / num) ** 0.5)
    assert not broken[:, 1:].any()
    out = act(env, UP)
    assert torch.equal(out["terminated"].squeeze(-1), broken[:, 0])
    assert not env.holes.any()
    env.reset(repeat_task=True)
    assert not env.state_dict()["_broken_lake"].any()


def test_hard_mode_swaps_two_actions_in_half_of_the_tasks():
    num = 2000
    env = MetaFrozenLake(size=3, batch_size=[num], seed=0, hard_mode=True)
    env.reset()
    swapped = env.state_dict()["_table_start"] > 0
    assert swapped.float().mean().item() == pytest.approx(0.5, abs=4 * (0.25 / num) ** 0.5)
    act(env, DOWN)
    cell = env.state_dict()["_cell"]
    assert torch.equal(cell, torch.where(swapped, 1, 3))
    env.reset(repeat_task=True)
    act(env, RIGHT)
    assert torch.equal(env.state_dict()["_cell"], torch.where(swapped, 3, 1))
    env.reset()
    assert not torch.equal(env.state_dict()["_table_start"] > 0, swapped)


def test_plain_mode_observes_exactly():
    env = MetaFrozenLake(size=3, batch_size=[200], seed=0)
    env.reset()
    lay(env, "...", "...", "...")
    assert cells(act(env, DOWN, RIGHT), 3) == [[1, 1]] * 200


# ------------------------------------------------------------------------------ resume and errors


def test_resumes_exactly_when_the_pool_is_drawn_anew(tmp_path):
    options = {"hard_mode": True, "recover_mode": True, "slip_chance": 0.1, "batch_size": [100]}
    env = MetaFrozenLake(size=3, seed=0, **options)
    td = env.rollout(37, break_when_any_done=False)[:, -1]["next"].exclude("reward")
    td["_reset"] = td["done"].clone()
    torch.save(env.state_dict(), tmp_path / "env.pt")
    resumed = MetaFrozenLake(size=3, seed=99, **options)
    resumed.load_state_dict(torch.load(tmp_path / "env.pt", weights_only=True))

    def go_on(env):
        torch.manual_seed(11)  # the random actions
        start = env.maybe_reset(td.clone())
        # 100 rows draw more lakes in 100 steps than the pool holds.
        return env.rollout(100, auto_reset=False, tensordict=start, break_when_any_done=False)

    expected, actual = go_on(env), go_on(resumed)
    assert (expected == actual).all()
    assert torch.equal(env.holes, resumed.holes)


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"size": 1}, "size must be an integer of at least 2, got 1"),
        ({"slip_chance": 1.0}, r"slip_chance must be in \[0, 1\), got 1\.0.*never move"),
        ({"slip_chance": -0.1}, r"slip_chance must be in \[0, 1\), got -0\.1"),
        ({"max_episode_steps": 0}, "max_episode_steps must be at least 1, got 0"),
        ({"layouts": "eval"}, "layouts must be one of .* got 'eval'"),
    ],
)
def test_arguments_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        MetaFrozenLake(**kwargs)


def test_actions_are_permuted_by_task():
    env = MetaFrozenLake(size=3, batch_size=[500], seed=0, randomize_actions=True)
    env.reset()
    lay(env, "...", "...", "...")
    meaning = env.state_dict()["_meaning"].clone()
    moved = act(env, 2)["observation"].sum(-1) > 0
    assert torch.equal(moved, (meaning[:, 2] == DOWN) | (meaning[:, 2] == RIGHT))
    assert moved.float().mean().item() == pytest.approx(0.4, abs=4 * (0.24 / 500) ** 0.5)


# ------------------------------------------------------------------------------------- render


def test_render_shows_holes_goal_and_agent():
    env = MetaFrozenLake(size=3, batch_size=[2], seed=0)
    env.reset()
    lay(env, "...", ".H.", "...")
    before = env.render(0)
    assert before.shape == (96, 96, 3)
    assert before.dtype.name == "uint8"
    tile = before.reshape(3, 32, 3, 32, 3).swapaxes(1, 2)
    ice = tile[0, 2]
    different = {(i, j) for i in range(3) for j in range(3) if (tile[i, j] != ice).any()}
    assert different == {(0, 0), (1, 1), (2, 2)}
    act(env, DOWN)
    after = env.render(0)
    moved = after.reshape(3, 32, 3, 32, 3).swapaxes(1, 2)
    changed = {(i, j) for i in range(3) for j in range(3) if (moved[i, j] != tile[i, j]).any()}
    assert changed == {(0, 0), (1, 0)}


def test_render_draws_opened_holes_differently():
    env = MetaFrozenLake(size=3, seed=0, hard_mode=True)
    env.reset()
    lay(env, "...", "...", "...")
    whole = env.render()
    broken = torch.zeros(1, 9, dtype=torch.bool)
    broken[0, 1] = True
    env.load_state_dict({**env.state_dict(), "_broken_lake": broken})
    opened = env.render()
    lay(env, ".H.", "...", "...")
    pictures = [picture[:32, 32:64] for picture in (whole, opened, env.render())]
    assert (pictures[0] != pictures[1]).any()
    assert (pictures[1] != pictures[2]).any()


def test_render_chooses_rows():
    env = MetaFrozenLake(size=4, batch_size=[2, 3], seed=0)
    env.reset()
    assert (env.render(5) == env.render((1, 2))).all()
    assert env.render((0, 1), cell_pixels=24).shape == (96, 96, 3)
    assert MetaFrozenLake(size=2, seed=0).render().shape == (64, 64, 3)
