"""XLand-MiniGrid: grid worlds whose rules and goals are the task, in JAX."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import numpy as np
import torch
from torchrl.data import Categorical, OneHot

from torchrl_amago._validation import check_choice
from torchrl_amago.envs.libs._extras import import_extra
from torchrl_amago.envs.libs._jax_rows import Tree
from torchrl_amago.envs.libs.jax_env import JaxEnv

# Of xminigrid.core.goals: the agent holds an object, is beside it, or puts two side by side.
_GOALS = {"hold": 1, "near": 3, "together": 4}


def xland_env(
    num_envs: int,
    env_id: str = "XLand-MiniGrid-R1-9x9",
    *,
    benchmark: Any = "trivial",
    show_goal: bool = False,
    params: Mapping[str, Any] | None = None,
    rows_per_reset: int = 8,
    **options: Any,
) -> JaxEnv:
    """Make rows of XLand-MiniGrid (arXiv 2312.12044) with a task drawn from a benchmark of rules.

    A task is a ruleset: goal, rules and objects. Episodes of a trial keep it, and each draws new
    places for agent and objects. Environments of the package without rulesets ("MiniGrid-...")
    repeat the places instead. Reaching the goal ends the episode with ``1 - 0.9 steps / limit``.

    Observed are the 5 x 5 cells in front of the agent, ``"observation"`` uint8 ``[5, 5, 2]`` of
    kinds of object and colours below 13, its ``"direction"`` one-hot ``[4]``, and, if
    ``show_goal``, ``"goal"`` uint8 ``[5]`` below 32, the package's code of it.

    Args:
        num_envs: number of rows.
        env_id: one of ``xminigrid.registered_environments()``.
        benchmark: ``"trivial"``, goals without rules (:func:`trivial_ruleset`), which needs no
            data; the name of a published benchmark, such as "trivial-21k" or "small-1m", which the
            package downloads; a file of one, which is unpickled, so it must come from a source you
            trust; a ``Benchmark``, such as the training part of a split; or a function that draws
            a ruleset from a key.
        show_goal: whether the agent sees its goal.
        params: changes of the package's own parameters, ``height``, ``width``, ``view_size`` and
            ``max_steps`` of an episode, by default three for each cell of the unchanged room.
        rows_per_reset, options: arguments of :class:`JaxEnv`. A reset costs several steps, hence
            few rows at once.

    Raises:
        ImportError: if XLand-MiniGrid isn't installed.
        ValueError: for an unknown id, or a benchmark that is neither a name nor a file.
        OSError: if the benchmark can't be downloaded.

    Example:
        >>> from torchrl_amago.envs import make_trial_env
        >>> env = xland_env(64)  # doctest: +SKIP
        >>> make_trial_env(env, episodes=5).rollout(10)["observation"].shape  # doctest: +SKIP
        torch.Size([64, 10, 5, 5, 2])
    """
    xminigrid, jax = import_extra("xminigrid"), import_extra("jax")
    env, env_params = xminigrid.make(env_id, **(params or {}))
    has_rules = hasattr(env_params, "ruleset")
    draw_task = _ruleset_sampler(benchmark) if has_rules else lambda key: key

    def observe(timestep: Tree) -> dict[str, Tree]:
        direction = jax.nn.one_hot(timestep.state.agent.direction, 4, dtype="uint8")
        seen = {"observation": timestep.observation, "direction": direction}
        return {**seen, "goal": timestep.state.goal_encoding} if show_goal else seen

    def reset(key: Tree, task: Tree) -> tuple[Tree, Tree]:
        if has_rules:
            timestep = env.reset(env_params.replace(ruleset=task), key)
        else:
            timestep = env.reset(env_params, task)
        return observe(timestep), timestep

    def step(key: Tree, timestep: Tree, action: Tree, task: Tree) -> tuple:
        timestep = env.step(env_params, timestep, action)
        terminated = timestep.discount == 0
        return observe(timestep), timestep, timestep.reward, terminated, timestep.last()

    view = (env_params.view_size, env_params.view_size, 2)
    specs = {
        "observation": Categorical(13, view, dtype=torch.uint8),
        "direction": OneHot(4, dtype=torch.uint8),
    }
    if show_goal:
        specs["goal"] = Categorical(32, (5,), dtype=torch.uint8)
    rows = JaxEnv(
        reset,
        step,
        action_spec=Categorical(env.num_actions(env_params)),
        observation_spec=specs,
        draw_task=draw_task,
        render=lambda timestep, task: np.asarray(env.render(env_params, timestep)),
        num_envs=num_envs,
        rows_per_reset=min(rows_per_reset, num_envs),
        **options,
    )
    rows.max_episode_steps = env_params.max_steps
    return rows


def trivial_ruleset(key: Tree, num_objects: int = 4) -> Tree:
    """Draw a task without rules, as those of the published trivial benchmarks are.

    The room has different objects, each of one of 6 kinds and 10 colours. The goal is to pick up
    the first one, to stand beside it, or to put the first two side by side.

    Args:
        key: JAX's random key.
        num_objects: objects in the room.

    Returns:
        ``xminigrid.types.RuleSet``.
    """
    jax, jnp = import_extra("jax"), import_extra("jax.numpy")
    constants = import_extra("xminigrid.core.constants")
    rules, types = import_extra("xminigrid.core.rules"), import_extra("xminigrid.types")
    object_key, goal_key = jax.random.split(key)
    # Colours 1 to 10: those of the agent's own picture are left out.
    chosen = jax.random.choice(
        object_key, len(constants.PICKABLE) * 10, (num_objects,), replace=False
    )
    kinds, colours = constants.PICKABLE[chosen // 10], 1 + chosen % 10
    objects = jnp.stack([kinds, colours], -1).astype(jnp.uint8)
    goal = jax.random.choice(goal_key, jnp.array(list(_GOALS.values()), jnp.uint8))
    second = jnp.where(goal == _GOALS["together"], objects[1], 0)
    return types.RuleSet(
        goal=jnp.concatenate([goal[None], objects[0], second]).astype(jnp.uint8),
        rules=rules.EmptyRule().encode()[None],
        init_tiles=objects,
    )


def _ruleset_sampler(benchmark: Any) -> Callable[[Tree], Tree]:
    """Return the function that draws a ruleset; see :func:`xland_env` for the argument."""
    if benchmark == "trivial":
        return trivial_ruleset
    if not isinstance(benchmark, str | Path):
        return getattr(benchmark, "sample_ruleset", benchmark)
    benchmarks = import_extra("xminigrid.benchmarks")
    if Path(benchmark).is_file():
        return benchmarks.load_benchmark_from_path(str(benchmark)).sample_ruleset
    names = ("trivial", *benchmarks.registered_benchmarks())
    check_choice("benchmark", benchmark, names, "Or pass a file of rulesets that exists.")
    try:
        return benchmarks.load_benchmark(benchmark).sample_ruleset
    except URLError as error:
        raise OSError(
            f"benchmark {benchmark!r} must be downloaded once, which failed: {error}. Fetch it on "
            "another machine, and pass the file; benchmark='trivial' needs none."
        ) from error
