"""Environments of gymnax, XLand-MiniGrid and Craftax: specs, tasks that are repeated, pictures, errors."""

from __future__ import annotations

import bz2
import pickle
import re
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs.utils import check_env_specs

from torchrl_amago.envs import make_trial_env
from torchrl_amago.envs.libs import craftax_env, gymnax_env, xland_env
from torchrl_amago.envs.libs._jax_spaces import action_spec, observation_spec
from torchrl_amago.envs.libs.gymnax import draw_observation
from torchrl_amago.envs.libs.xland import _ruleset_sampler, trivial_ruleset

NEEDS = {"reason": 'pip install "torchrl-amago[jax]"'}


def test_spaces():
    box = SimpleNamespace(low=np.float32(-1), high=np.array([2.0, 3.0], np.float32), shape=(2,))
    discrete = SimpleNamespace(n=4)
    assert action_spec(discrete) == Categorical(4, ())
    assert action_spec(box) == Bounded(torch.tensor([-1.0, -1.0]), torch.tensor([2.0, 3.0]))
    examples = {"a": SimpleNamespace(shape=(2,), dtype=np.int32), "b": np.zeros((), np.int32)}
    assert observation_spec(SimpleNamespace(spaces={"a": box, "b": discrete}), examples) == (
        Composite(a=Unbounded(2, dtype=torch.int32), b=Categorical(4, (), dtype=torch.int32))
    )


def test_pictures_of_observations():
    channels = np.zeros((2, 2, 3))
    channels[0, 1, 0] = channels[0, 1, 2] = channels[1, 0, 0] = 1
    picture = draw_observation(channels, 2)
    assert picture.shape == (4, 4, 3)
    assert picture.dtype == np.uint8
    colours = [tuple(picture[i, j]) for i, j in ((0, 0), (0, 2), (2, 0), (2, 2))]
    assert colours[0] == colours[3] == (0, 0, 0)
    assert len(set(colours)) == 3  # the last channel is on top
    numbers = draw_observation(np.array([-5.0, 0.0, 0.2, 5.0]), 1)
    assert numbers.shape == (1, 4, 3)
    assert numbers[0, [0, 1, 3]].tolist() == [[0, 0, 255], [255, 255, 255], [255, 0, 0]]
    assert 0 < numbers[0, 2, 1] < 255


@pytest.fixture(scope="module")
def gymnax():
    return pytest.importorskip("gymnax", **NEEDS)


def test_the_pages_example_runs(gymnax):
    text = (Path(__file__).parents[3] / "docs/jax.md").read_text("utf-8")
    (block,) = re.findall(r"^```py\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    namespace = {}
    exec(block.replace("num_envs=512", "num_envs=4"), namespace)
    trials = namespace["env"]
    trials.rollout(50, break_when_any_done=False)
    assert ((trials.base_env._carry.task > 5) & (trials.base_env._carry.task < 30)).all()


@pytest.mark.parametrize("env_id", ["CartPole-v1", "FrozenLake-misc", "PointRobot-misc"])
def test_gymnax(gymnax, env_id):
    env = gymnax_env(env_id, 6, params={"max_steps_in_episode": 7}, seed=0)
    assert env.max_episode_steps == 7
    check_env_specs(env)
    trials = make_trial_env(env, episodes=2)
    steps = trials.rollout(40, break_when_any_done=False)
    first = steps["soft_reset"].squeeze(-1)
    again = first & ~steps["is_init"].squeeze(-1)
    assert again.any()
    for row in range(6):
        starts = steps["observation"][row][first[row]].double()
        same = (starts[1:] == starts[:-1]).reshape(len(starts) - 1, -1).all(-1)
        repeats = again[row][first[row]][1:]
        assert same[repeats].all()
        if env_id != "FrozenLake-misc":  # it has one place to start at
            assert not same[~repeats].any()
    assert env.render(2).dtype == np.uint8
    assert env._rows.step._cache_size() == env._rows.reset._cache_size() == 1


def test_every_environment_of_gymnax_has_specs(gymnax):
    jax = pytest.importorskip("jax")
    for env_id in set(gymnax.registered_envs) - {"MNISTBandit-bsuite"}:
        env = gymnax_env(env_id, 2, seed=0)
        seen = env._rows.observation
        assert env.observation_spec["observation"].shape == (2, *seen.shape), env_id
        assert str(env.observation_spec["observation"].dtype).endswith(str(seen.dtype))
        assert env.action_spec.shape[0] == 2
        assert jax.tree.leaves(env._carry)


def test_the_bit_of_a_memory_chain_is_the_task(gymnax):
    env = gymnax_env("MemoryChain-bsuite", 32, params={"memory_length": 3}, seed=0)
    td = env.reset()
    bit = td["observation"][:, 2]
    assert set(bit.tolist()) == {-1.0, 1.0}
    assert torch.equal(env.reset(td.clone(), repeat_task=True)["observation"][:, 2], bit)
    td = env.reset()
    bit = td["observation"][:, 2]
    for step in range(4):
        td = env.step(td.set("action", (bit > 0).long()))["next"]
        assert td["reward"].unique().tolist() == [float(step == 3)]
        assert td["terminated"].all() == (step == 3)


def test_errors_of_gymnax(gymnax, monkeypatch):
    with pytest.raises(ValueError, match=r"env_id must be one of 'CartPole-v1', .*'CartPole-v7'"):
        gymnax_env("CartPole-v7", 2)
    with pytest.raises(ValueError, match="params must be one of .*'gravity'.*'gravitation'"):
        gymnax_env("CartPole-v1", 2, params={"gravitation": 1.0})

    def offline(*_):
        raise URLError("no network")

    monkeypatch.setattr("gymnax.utils.load_mnist.urlretrieve", offline)
    monkeypatch.setattr("gymnax.utils.load_mnist.path.isfile", lambda _: False)
    with pytest.raises(OSError, match="MNISTBandit-bsuite must download its data"):
        gymnax_env("MNISTBandit-bsuite", 2)


@pytest.fixture(scope="module")
def xminigrid():
    return pytest.importorskip("xminigrid", **NEEDS)


@pytest.mark.slow
def test_xland(xminigrid):
    env = xland_env(6, show_goal=True, params={"max_steps": 9}, seed=0)
    assert env.max_episode_steps == 9
    check_env_specs(env)
    assert env.observation_spec["observation"].space.n == 13
    assert isinstance(env.observation_spec["direction"], OneHot)
    steps = make_trial_env(env, episodes=2).rollout(36, break_when_any_done=False)
    goal, first = steps["goal"], steps["is_init"].squeeze(-1)
    assert first.sum() >= 12
    same = (goal[:, 1:] == goal[:, :-1]).all(-1)
    assert torch.equal(same, ~first[:, 1:])
    assert set(goal[..., 0].unique().tolist()) <= {1, 3, 4}
    # Places are new in the second episode.
    second = steps["soft_reset"].squeeze(-1) & ~first
    starts = steps["observation"].flatten(-3)
    assert (starts[first][:6] != starts[second][:6]).any(-1).any()
    assert env.render(1).shape == (288, 288, 3)
    assert env._rows.step._cache_size() == env._rows.reset._cache_size() == 1


def test_trivial_rulesets(xminigrid):
    jax = pytest.importorskip("jax")
    rulesets = jax.vmap(trivial_ruleset)(jax.random.split(jax.random.PRNGKey(0), 200))
    objects, goals = np.asarray(rulesets.init_tiles), np.asarray(rulesets.goal)
    assert objects.shape == (200, 4, 2)
    for some, goal in zip(objects, goals, strict=True):
        assert len({tuple(one) for one in some}) == 4
        assert goal[1:3].tolist() == some[0].tolist()
        assert goal[3:].tolist() == (some[1].tolist() if goal[0] == 4 else [0, 0])
    assert set(objects[..., 1].ravel()) == set(range(1, 11))
    assert len(set(objects[..., 0].ravel())) == 6
    assert not np.asarray(rulesets.rules).any()


def test_benchmarks_of_xland(xminigrid, tmp_path, monkeypatch):
    jax = pytest.importorskip("jax")
    rulesets = jax.vmap(trivial_ruleset)(jax.random.split(jax.random.PRNGKey(0), 3))
    saved = {"goals": rulesets.goal, "rules": rulesets.rules, "init_tiles": rulesets.init_tiles}
    with bz2.open(tmp_path / "three", "wb") as file:
        pickle.dump({**saved, "num_rules": np.zeros(3)}, file)
    xland_env(16, benchmark=tmp_path / "three", seed=0)
    draws = jax.vmap(_ruleset_sampler(tmp_path / "three"))(
        jax.random.split(jax.random.PRNGKey(1), 32)
    )
    assert {tuple(goal) for goal in draws.goal.tolist()} == {
        tuple(goal) for goal in rulesets.goal.tolist()
    }
    with pytest.raises(ValueError, match="benchmark must be one of 'trivial', 'trivial-21k'"):
        xland_env(2, benchmark=str(tmp_path / "four"))
    with pytest.raises(ValueError, match="Unregistered environment"):
        xland_env(2, "XLand-MiniGrid-R3-9x9")

    def offline(_):
        raise URLError("no network")

    monkeypatch.setattr("xminigrid.benchmarks.load_benchmark", offline)
    with pytest.raises(OSError, match="'small-1m' must be downloaded once.*no network"):
        xland_env(2, benchmark="small-1m")


def test_unknown_games_of_craftax():
    pytest.importorskip("craftax", **NEEDS)
    with pytest.raises(ValueError, match="env_id must be one of 'Craftax-Classic-Symbolic-v1'"):
        craftax_env(2, "Craftax-v0")
