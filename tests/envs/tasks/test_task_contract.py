"""The contract of every native task: specs, resets, seeds, masks, saving, pictures, workers."""

from __future__ import annotations

import copy
import pickle
from functools import partial

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.envs import SerialEnv
from torchrl.envs.utils import check_env_specs

from tests.envs.workers import forked
from torchrl_amago.envs import make_trial_env
from torchrl_amago.envs.tasks import DarkKeyDoor, MazeRunner, MetaFrozenLake, SymbolicAlchemy, TMaze

# Each with the buffers that make up its task.
TASKS = {
    "lake": (lambda **kw: MetaFrozenLake(4, **kw), ["_lake"]),
    "lake, hard": (
        lambda **kw: MetaFrozenLake(
            4, hard_mode=True, recover_mode=True, slip_chance=0.1, max_episode_steps=9, **kw
        ),
        ["_lake", "_table_start"],
    ),
    "lake, one-hot": (
        lambda **kw: MetaFrozenLake(4, categorical_action_encoding=False, **kw),
        ["_lake"],
    ),
    "maze": (lambda **kw: TMaze(4, **kw), ["_goal"]),
    "maze, all shown": (
        lambda **kw: TMaze(4, max_episode_steps=7, show_time=True, oracle=True, **kw),
        ["_goal"],
    ),
    "maze, ambiguous": (lambda **kw: TMaze(4, ambiguous_position=True, **kw), ["_goal"]),
    "maze, one-hot": (lambda **kw: TMaze(4, categorical_action_encoding=False, **kw), ["_goal"]),
    "dark": (lambda **kw: DarkKeyDoor(4, max_episode_steps=7, **kw), ["_key", "_door", "_start"]),
    "light, shuffled": (
        lambda **kw: DarkKeyDoor(4, dark=False, randomize_actions=True, max_episode_steps=7, **kw),
        ["_key", "_door", "_start", "_meaning"],
    ),
    "dark, one-hot": (
        lambda **kw: DarkKeyDoor(4, categorical_action_encoding=False, **kw),
        ["_key", "_door", "_start"],
    ),
    "runner": (
        lambda **kw: MazeRunner(7, num_goals=2, max_episode_steps=7, **kw),
        ["_walls", "_goals"],
    ),
    "runner, shuffled, one-hot": (
        lambda **kw: MazeRunner(
            9,
            max_episode_steps=7,
            randomize_actions=True,
            categorical_action_encoding=False,
            **kw,
        ),
        ["_walls", "_goals", "_meaning"],
    ),
    "alchemy": (SymbolicAlchemy, ["_chemistry"]),
    "alchemy, shown, by colour": (
        lambda **kw: SymbolicAlchemy(
            show_chemistry=True, colour_actions=True, end_action=True, max_episode_steps=7, **kw
        ),
        ["_chemistry"],
    ),
    "alchemy, one-hot": (
        lambda **kw: SymbolicAlchemy(
            categorical_action_encoding=False, num_stones=1, max_episode_steps=7, **kw
        ),
        ["_chemistry"],
    ),
}


@pytest.fixture(params=TASKS)
def task(request):
    return TASKS[request.param]


def tasks_of(env, names: list[str]) -> torch.Tensor:
    """All that makes up each row's task, ``[rows, n]``."""
    state = env.state_dict()
    return torch.cat([state[name].flatten(1).float() if state[name].ndim > 1
                      else state[name].float().unsqueeze(-1) for name in names], -1)  # fmt: skip


def rollout(env, steps: int = 60) -> TensorDict:
    torch.manual_seed(7)  # the random actions
    return env.rollout(steps, break_when_any_done=False)


@pytest.mark.parametrize("batch_size", [(), (1,), (2, 3)])
def test_check_env_specs(task, batch_size):
    check_env_specs(task[0](batch_size=batch_size, seed=0), break_when_any_done="both")


def test_trials(task):
    env = make_trial_env(task[0](batch_size=[3], seed=0), horizon=20)
    check_env_specs(env)
    names = task[1]
    env.set_seed(0)
    td = env.reset()
    first = tasks_of(env.base_env, names)
    for _ in range(19):
        _, td = env.step_and_maybe_reset(env.rand_action(td))
        assert torch.equal(tasks_of(env.base_env, names), first)
    step, _ = env.step_and_maybe_reset(env.rand_action(td))
    assert step["next", "done"].all()


def test_partial_reset_repeats_renews_and_leaves_alone(task):
    make, names = task
    env = make(batch_size=[64], seed=0)
    td = env.rollout(2)[:, -1]["next"]
    before = {name: value.clone() for name, value in env.named_buffers()}
    first = tasks_of(env, names)
    reset, repeat = torch.zeros(2, 64, 1, dtype=torch.bool)
    reset[:48] = True
    repeat[:16] = True
    out = env.reset(td.exclude("reward").set("_reset", reset), repeat_task=repeat)
    same = (tasks_of(env, names) == first).all(-1)
    assert same[:16].all()
    assert not same[16:48].all()
    after = dict(env.named_buffers())
    for name in ("_num_steps", *env.episode_buffers):
        assert torch.equal(after[name][48:], before[name][48:])
    assert not after["_num_steps"][:48].any()
    assert torch.equal(out["observation"][48:], td["observation"][48:])
    assert not out["done"][:48].any()


def test_masked_step_leaves_other_rows_alone(task):
    env = task[0](batch_size=[32], seed=0)
    td = env.rand_action(env.reset())
    before = {name: value.clone() for name, value in env.named_buffers()}
    stepped = torch.arange(32) % 2 == 0
    out = env.step(td.set("_step", stepped))["next"]
    for name, value in env.named_buffers():
        if value.shape[:1] == (32,):
            assert torch.equal(value[~stepped], before[name][~stepped])
    assert torch.equal(out["observation"][~stepped], td["observation"][~stepped])
    assert env.state_dict()["_num_steps"].tolist() == [1, 0] * 16


def test_same_seed_same_rollout(task):
    make = task[0]
    first = rollout(make(batch_size=[5], seed=3))
    assert (first == rollout(make(batch_size=[5], seed=3))).all()
    env = make(batch_size=[5], seed=0)
    rollout(env, 5)
    env.set_seed(3)
    assert (rollout(env) == first).all()
    assert not (rollout(make(batch_size=[5], seed=4)) == first).all()


def test_the_global_generator_is_left_alone_but_for_a_missing_seed(task):
    make, names = task
    torch.manual_seed(1)
    one, other = make(batch_size=[64]), make(batch_size=[64])
    torch.manual_seed(1)
    again = make(batch_size=[64])
    state = torch.get_rng_state()
    for env in (one, other, again):
        env.reset()
        env.step(TensorDict({"action": env.full_action_spec["action"].zero()}, [64]))
    assert not torch.equal(tasks_of(one, names), tasks_of(other, names))
    assert torch.equal(tasks_of(one, names), tasks_of(again, names))
    assert torch.equal(torch.get_rng_state(), state)


def test_state_dict_resumes_exactly(task, tmp_path):
    make = task[0]
    env = make(batch_size=[6], seed=0)
    td = rollout(env, 17)[:, -1]["next"].exclude("reward")
    td["_reset"] = td["done"].clone()
    torch.save(env.state_dict(), tmp_path / "env.pt")
    resumed = make(batch_size=[6], seed=99)
    resumed.load_state_dict(torch.load(tmp_path / "env.pt", weights_only=True))

    def go_on(env):
        torch.manual_seed(11)
        start = env.maybe_reset(td.clone())
        return env.rollout(40, auto_reset=False, tensordict=start, break_when_any_done=False)

    assert (go_on(env) == go_on(resumed)).all()


@pytest.mark.parametrize("clone", [copy.deepcopy, lambda env: pickle.loads(pickle.dumps(env))])  # noqa: S301
def test_copies_go_on_alike_and_apart(task, clone):
    env = task[0](batch_size=[3], seed=0)
    rollout(env, 5)
    other = clone(env)
    assert (rollout(env, 20) == rollout(other, 20)).all()


def test_actions_out_of_range_change_nothing(task):
    env = task[0](batch_size=[2], seed=0)
    if env.action_spec.shape != (2,):
        pytest.skip("one-hot actions are in range by their shape")
    env.reset()
    before = {name: value.clone() for name, value in env.named_buffers()}
    for action in ([0, env.num_actions], [-1, 0]):
        with pytest.raises(ValueError, match=r"action must be in \[0, \d+\], got values from "):
            env.step(TensorDict({"action": torch.tensor(action)}, [2]))
    assert all(torch.equal(value, before[name]) for name, value in env.named_buffers())


def test_render_draws_a_row_that_exists(task):
    env = task[0](batch_size=[2, 2], seed=0)
    env.reset()
    picture = env.render((1, 0), cell_pixels=16)
    assert picture.dtype == np.uint8
    assert np.array_equal(picture, env.render(2, cell_pixels=16))
    assert np.array_equal(env.render(), env.render(0))
    with pytest.raises(IndexError, match="index 4 is out of bounds"):
        env.render(4)


@pytest.mark.parametrize("batched", [SerialEnv, forked], ids=["serial", "parallel"])
@pytest.mark.parametrize(
    ("make", "names"),
    [
        (partial(TMaze, 3, batch_size=[8], seed=0), ["_goal"]),
        (partial(DarkKeyDoor, 5, batch_size=[8], seed=0), ["_key", "_door"]),
        (partial(MazeRunner, 7, num_goals=2, batch_size=[8], seed=0), ["_goals"]),
        (partial(SymbolicAlchemy, batch_size=[8], seed=0), ["_chemistry"]),
    ],
    ids=["maze", "room", "runner", "alchemy"],
)
def test_workers_keep_the_specs_and_repeat_tasks(batched, make, names):
    env = batched(2, make)

    def tasks() -> torch.Tensor:
        states = env.state_dict().values()
        return torch.stack([state[name].float() for state in states for name in names])

    try:
        check_env_specs(env)
        env.set_seed(0)
        td = env.reset()
        first = tasks()
        assert not torch.equal(*first.chunk(2))
        env.reset(td.clone(), repeat_task=True)
        assert torch.equal(tasks(), first)
        env.reset(td.clone())
        assert not torch.equal(tasks(), first)
    finally:
        env.close()


@pytest.mark.gpu
def test_on_a_gpu(task):
    env = task[0](batch_size=[16], seed=0, device="cuda")
    check_env_specs(env)
    assert rollout(env)["observation"].device.type == "cuda"
    moved = task[0](batch_size=[16], seed=0).to("cuda")
    assert rollout(moved)["observation"].device.type == "cuda"
