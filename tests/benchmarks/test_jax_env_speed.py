"""Random steps per second of JAX environments in trials, against their packages' own vector loops.

    OMP_NUM_THREADS=1 pytest tests/benchmarks/test_jax_env_speed.py

Both loops take turns of a few steps in one process, and the CPU time of the fastest turns is
compared: `extra_info` holds environment steps per second, and `ratio`, ours by theirs. Each loop
gives its steps to Python; theirs resets within the step, and writes no trial.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np
import pytest
import torch

from torchrl_amago.envs import make_trial_env
from torchrl_amago.envs.libs import craftax_env, gymnax_env, xland_env

jax = pytest.importorskip("jax", reason='pip install "torchrl-amago[jax]"')


def gymnax_loop(env_id: str, rows: int) -> tuple[Callable, int]:
    import gymnax
    from gymnax.wrappers.gym import GymnaxToVectorGymWrapper

    env = GymnaxToVectorGymWrapper(gymnax.make(env_id)[0], rows)
    env.reset(seed=0)
    return lambda action: env.step(action)[:2], env.single_action_space.n


def jitted_loop(reset: Callable, step: Callable, rows: int) -> Callable:
    """Step rows of ``reset(key) -> state`` and ``step(key, state, action) -> (seen, state)``."""
    state = jax.jit(jax.vmap(reset))(jax.random.split(jax.random.PRNGKey(0), rows))
    state = jax.tree.map(lambda x: jax.lax.convert_element_type(x, x.dtype), state)
    step = jax.jit(jax.vmap(step))
    split = jax.jit(lambda key: tuple(jax.random.split(key)))
    split_rows = jax.jit(lambda key: jax.random.split(key, rows))
    key = jax.random.PRNGKey(1)

    def run(action):
        nonlocal key, state
        key, now = split(key)
        seen, state = step(split_rows(now), state, action)
        return seen

    return run


def xland_loop(env_id: str, rows: int) -> tuple[Callable, int]:
    import xminigrid
    from xminigrid.wrappers import GymAutoResetWrapper

    env, params = xminigrid.make(env_id)
    env = GymAutoResetWrapper(env)
    run = jitted_loop(
        lambda key: env.reset(params, key),
        lambda key, state, action: (lambda new: ((new.observation, new.reward), new))(
            env.step(params, state, action)
        ),
        rows,
    )
    return run, env.num_actions(params)


def craftax_loop(env_id: str, rows: int) -> tuple[Callable, int]:
    from craftax.craftax_env import make_craftax_env_from_name

    env = make_craftax_env_from_name(env_id, auto_reset=True)
    params = env.default_params
    run = jitted_loop(
        lambda key: env.reset(key, params)[1],
        lambda key, state, action: (lambda out: ((out[0], out[2]), out[1]))(
            env.step(key, state, action, params)
        ),
        rows,
    )
    return run, env.num_actions


PACKAGES = {
    "gymnax": (gymnax_env, gymnax_loop),
    "xland": (lambda env_id, rows, **kw: xland_env(rows, env_id, **kw), xland_loop),
    "craftax": (lambda env_id, rows, **kw: craftax_env(rows, env_id, **kw), craftax_loop),
}


@pytest.mark.parametrize(
    ("package", "env_id", "rows"),
    [
        *(("gymnax", "CartPole-v1", rows) for rows in (64, 512, 4096)),
        *(("gymnax", "SpaceInvaders-MinAtar", rows) for rows in (64, 512)),
        *(("xland", "XLand-MiniGrid-R1-9x9", rows) for rows in (64, 512)),
        ("craftax", "Craftax-Classic-Symbolic-v1", 64),
    ],
)
def test_random_steps(benchmark, package, env_id, rows):
    torch.set_num_threads(1)
    make, make_loop = PACKAGES[package]
    env = make_trial_env(make(env_id, rows, seed=0), episodes=3)
    their_step, num_actions = make_loop(env_id, rows)
    actions = np.random.default_rng(0).integers(num_actions, size=(50, rows), dtype=np.int32)
    tensors = torch.from_numpy(actions).long()
    td = env.reset()

    def ours():
        nonlocal td
        for action in tensors:
            _, td = env.step_and_maybe_reset(td.set("action", action))

    def theirs():
        for action in actions:
            np.asarray(jax.tree.leaves(their_step(action))[-1])

    def cpu_seconds(loop: Callable) -> float:
        start = time.process_time()
        loop()
        return time.process_time() - start

    ours(), theirs()
    turns = [(cpu_seconds(ours), cpu_seconds(theirs)) for _ in range(8)]
    our_best, their_best = map(min, zip(*turns, strict=True))
    benchmark.extra_info["env_steps_per_s"] = round(rows * len(actions) / our_best)
    benchmark.extra_info["ratio"] = round(their_best / our_best, 2)
    benchmark.pedantic(ours, rounds=2)
