"""Craftax: the rules of Crafter and of NetHack-like dungeons, in JAX."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from torchrl_amago._validation import check_choice
from torchrl_amago.envs.libs._extras import import_extra
from torchrl_amago.envs.libs._jax_rows import Tree
from torchrl_amago.envs.libs.gymnax import gymnax_rows, with_params
from torchrl_amago.envs.libs.jax_env import JaxEnv

IDS = tuple(
    f"Craftax-{game}{view}-v1" for game in ("Classic-", "") for view in ("Symbolic", "Pixels")
)


def craftax_env(
    num_envs: int,
    env_id: str = "Craftax-Classic-Symbolic-v1",
    *,
    params: Mapping[str, Any] | None = None,
    rows_per_reset: int = 2,
    **options: Any,
) -> JaxEnv:
    """Make rows of Craftax (arXiv 2402.16801); its classic game has Crafter's rules.

    A task is the key of a world: episodes of a trial repeat the map and what the steps of the
    creatures draw from the state's own key, until actions differ. Rewards are for the achievements
    of an episode, and death or the time limit ends it. A world takes as long as hundreds of steps:
    few rows are reset at once. The first reset and step compile for 20 to 60 seconds each.
    Craftax's own pictures compile once more, and the very first one prepares its textures.

    Args:
        num_envs: number of rows.
        env_id: one of :data:`IDS`; the full game ("Craftax-Symbolic-v1") takes minutes to compile.
        params: changes of Craftax's own parameters, such as ``{"max_timesteps": 500}``.
        rows_per_reset, options: arguments of :class:`JaxEnv`.

    Raises:
        ImportError: if Craftax isn't installed.
        ValueError: for an unknown id or unknown parameters.

    Example:
        >>> from torchrl_amago.envs import make_trial_env
        >>> env = craftax_env(64)  # doctest: +SKIP
        >>> make_trial_env(env, episodes=2).rollout(10)["observation"].shape  # doctest: +SKIP
        torch.Size([64, 10, 1345])
    """
    craftax, jax = import_extra("craftax.craftax_env"), import_extra("jax")
    check_choice("env_id", env_id, IDS)
    env = craftax.make_craftax_env_from_name(env_id, auto_reset=False)
    env_params = with_params(env.default_params, params)

    def step(key: Tree, state: Tree, action: Tree, task: Tree) -> tuple:
        seen, state, reward, is_over, _ = env.step_env(key, state, action, env_params)
        truncated = state.timestep >= env_params.max_timesteps
        return seen, state, reward, is_over & ~truncated, truncated

    @functools.cache
    def make_renderer() -> Callable[[Tree], Tree]:
        package = type(env).__module__.rpartition(".envs.")[0]
        return jax.jit(import_extra(f"{package}.renderer").make_craftax_pixel_renderer(16))

    def render(state: Tree, task: Tree) -> np.ndarray:
        return np.asarray(make_renderer()(state)).clip(0, 255).astype(np.uint8)

    options |= {"num_envs": num_envs, "rows_per_reset": min(rows_per_reset, num_envs)}
    limit = env_params.max_timesteps
    return gymnax_rows(env, env_params, step, limit, render=render, **options)
