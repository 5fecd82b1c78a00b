"""Environments of functions in JAX: trials, masks, seeds, saving, compilations, memory that is shared."""

from __future__ import annotations

import builtins
import sys

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Unbounded
from torchrl.envs.utils import check_env_specs

from torchrl_amago._state_file import load_state, save_state
from torchrl_amago.envs import make_trial_env
from torchrl_amago.envs.libs import JaxEnv


def test_without_jax_the_extra_is_named(monkeypatch):
    monkeypatch.delitem(sys.modules, "jax", raising=False)
    importing = builtins.__import__

    def without_jax(name, *args, **kwargs):
        if name.partition(".")[0] == "jax":
            raise ImportError("No module named 'jax'", name="jax")
        return importing(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_jax)
    monkeypatch.setattr("importlib.import_module", without_jax)
    with pytest.raises(ImportError, match=r'jax must be .*pip install "torchrl-amago\[jax\]"'):
        JaxEnv(None, None, action_spec=Categorical(2), num_envs=1)


@pytest.fixture(scope="module")
def jax():
    return pytest.importorskip("jax", reason='pip install "torchrl-amago[jax]"')


def make_env(jax, num_envs: int = 12, limit: int = 3, **options) -> JaxEnv:
    """A task of two numbers; an episode shows them, a number of its own, and the steps so far.

    The state's step counter begins as a Python number, of a weak type in JAX.
    """
    jnp = jax.numpy

    def observe(state):
        task, own, steps = state
        return {"task": task, "own": own[None], "steps": jnp.uint8(steps)[None]}

    def reset(key, task):
        state = (task, jax.random.uniform(key), 0)
        return observe(state), state

    def step(key, state, action, task):
        state = (state[0], state[1], state[2] + 1)
        reward = action + jax.random.uniform(key)
        return observe(state), state, reward, (action == 1) & (state[2] == 2), state[2] >= limit

    options.setdefault("action_spec", Categorical(2))
    return JaxEnv(
        reset,
        step,
        draw_task=lambda key: jax.random.uniform(key, (2,)),
        render=lambda state, task: np.full((4, 4, 3), 255 * np.asarray(task[0]), np.uint8),
        num_envs=num_envs,
        **{"seed": 0, **options},
    )


@pytest.fixture(scope="module", params=[None, 5], ids=["all at once", "in fives"])
def compiled(request, jax):
    return make_env(jax, rows_per_reset=request.param)


@pytest.fixture
def env(compiled):
    compiled.set_seed(0)
    return compiled


def rollout(env, steps: int = 20) -> TensorDict:
    torch.manual_seed(7)  # the random actions
    return env.rollout(steps, break_when_any_done=False)


def test_specs(env):
    check_env_specs(env, break_when_any_done="both")
    assert env.observation_spec["task"] == Unbounded((12, 2))
    assert env.observation_spec["steps"].dtype == torch.uint8
    check_env_specs(make_trial_env(env, episodes=2))


def test_steps_and_flags(env):
    td = env.reset()
    for step in range(1, 4):
        action = torch.arange(12) % 2
        td = env.step(td.set("action", action))["next"]
        assert td["steps"].tolist() == [[step]] * 12
        assert (td["reward"] - action[:, None]).frac().equal(td["reward"] - action[:, None])
        assert td["terminated"].tolist() == [[False], [step == 2]] * 6
        assert td["truncated"].tolist() == [[step == 3]] * 12
        assert torch.equal(td["done"], td["terminated"] | td["truncated"])


def test_trials_repeat_the_task_and_not_the_luck(env):
    trials = make_trial_env(env, episodes=3)
    steps = rollout(trials, 25)
    index = steps["episode_idx"].squeeze(-1)
    starts = steps["is_init"].squeeze(-1)
    assert starts.sum() > 24
    assert index.max() == 2
    within = ~starts[:, 1:]
    same = (steps["task"][:, 1:] == steps["task"][:, :-1]).all(-1)
    assert same[within].all()
    assert not same[~within].any()
    new_episode = steps["soft_reset"].squeeze(-1)[:, 1:]
    assert (steps["own"][:, 1:] != steps["own"][:, :-1]).squeeze(-1)[new_episode].all()
    assert (steps["steps"].squeeze(-1)[:, 1:] == 0).eq(new_episode).all()
    # Rows are of their own.
    assert len(steps["task"][:, 0].unique(dim=0)) == 12


def test_partial_reset_repeats_renews_and_leaves_alone(env):
    td = env.rollout(1)[:, -1]["next"]
    before = td.clone()
    reset, repeat = torch.zeros(2, 12, 1, dtype=torch.bool)
    reset[:8] = True
    repeat[:4] = True
    out = env.reset(td.exclude("reward").set("_reset", reset), repeat_task=repeat)
    same = (out["task"] == before["task"]).all(-1)
    assert same.tolist() == [True] * 4 + [False] * 4 + [True] * 4
    assert (out["own"] == before["own"]).squeeze(-1).tolist() == [False] * 8 + [True] * 4
    after = env.step(env.rand_action(out))["next"]
    assert after["steps"].flatten().tolist() == [1] * 8 + [2] * 4
    assert torch.equal(after["own"], out["own"])


def test_the_entry_repeat_task_is_read(env):
    td = env.reset()
    again = env._reset(TensorDict({"repeat_task": torch.ones(12, 1, dtype=torch.bool)}, [12]))
    assert torch.equal(again["task"], td["task"])


def test_masked_step_leaves_other_rows_alone(env):
    td = env.rand_action(env.reset())
    stepped = torch.arange(12) % 2 == 0
    out = env.step(td.set("_step", stepped))["next"]
    assert out["steps"].flatten().tolist() == [1, 0] * 6
    out = env.step(env.rand_action(out))["next"]
    assert out["steps"].flatten().tolist() == [2, 1] * 6


def test_the_seed_decides_everything(env, jax):
    first = rollout(make_env(jax, seed=2**40 + 3))
    rollout(env, 5)
    env.set_seed(2**40 + 3)
    assert (rollout(env) == first).all()
    env.set_seed(3)
    assert not (rollout(env)["task"] == first["task"]).any()


def test_without_a_seed_torchs_generator_decides(env):
    tasks = []
    for _ in range(2):
        torch.manual_seed(1)
        for _ in range(2):
            env._set_seed(None)
            tasks.append(env.reset()["task"])
    assert not torch.equal(tasks[0], tasks[1])
    assert torch.equal(tasks[0], tasks[2])


def test_a_saved_state_resumes_exactly(env, tmp_path):
    trials = make_trial_env(env, episodes=3)
    td = rollout(trials, 17)[:, -1]["next"].exclude("reward")
    save_state(tmp_path / "env.npz", dict(env.state_dict()))

    def go_on():
        torch.manual_seed(11)
        start = trials.maybe_reset(td.clone())
        return trials.rollout(20, auto_reset=False, tensordict=start, break_when_any_done=False)

    expected = go_on()
    env.set_seed(99)
    env.load_state_dict(load_state(tmp_path / "env.npz"))
    assert (go_on() == expected).all()


def test_nothing_compiles_twice(env):
    trials = make_trial_env(env, episodes=2)
    rollout(trials)
    sizes = env._rows.reset._cache_size(), env._rows.step._cache_size()
    trials.set_seed(5)
    rollout(trials)
    env.load_state_dict(env.state_dict())
    rollout(trials)
    env.reset(repeat_task=True)
    assert (env._rows.reset._cache_size(), env._rows.step._cache_size()) == sizes
    # The second of the steps leaves some rows out, if a test before has done that.
    assert sizes in [(1, 1), (1, 2)]


def test_writing_into_observations_leaves_the_state_alone(env):
    td = env.reset()
    task = td["task"].clone()
    td["task"].zero_()
    td = env.step(env.rand_action(td))["next"]
    assert torch.equal(td["task"], task)
    td["task"].zero_()
    td["own"].zero_()
    td = env.step(env.rand_action(td))["next"]
    assert torch.equal(td["task"], task)
    assert (td["own"] > 0).all()


def test_observations_and_actions_of_other_kinds(jax):
    """An array becomes "observation"; steps may return a wider dtype than resets; numbers as actions."""

    def step(key, state, action, task):
        state = state + action.sum()
        return state, state, state, False, False

    env = JaxEnv(
        lambda key, task: (0, 0),
        step,
        action_spec=Bounded(-2.0, 2.0, (3,)),
        num_envs=4,
        seed=0,
    )
    check_env_specs(env)
    assert env.observation_spec["observation"] == Unbounded((4,))
    td = env.step(env.reset().set("action", torch.full((4, 3), 0.5)))["next"]
    assert td["observation"].tolist() == td["reward"].flatten().tolist() == [1.5] * 4


def test_render_draws_a_row_that_exists(jax):
    env = make_env(jax, 3)
    task = env.reset()["task"]
    for row in (0, 2, -1):
        assert env.render(row)[0, 0, 0] == int(255 * task[row, 0])
    with pytest.raises(IndexError):
        env.render(3)
    env._render_row = None
    with pytest.raises(NotImplementedError, match="pictures need"):
        env.render()


@pytest.mark.parametrize("name", ["num_envs", "rows_per_reset"])
def test_counts_are_positive(jax, name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        make_env(jax, **{name: 0})


@pytest.mark.gpu
def test_on_a_gpu(jax):
    if jax.default_backend() != "gpu":
        pytest.skip("JAX has no GPU here")
    env = make_env(jax)
    assert rollout(make_trial_env(env, episodes=2))["task"].device.type == "cuda"
