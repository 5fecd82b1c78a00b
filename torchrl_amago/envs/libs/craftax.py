"""Craftax: the rules of Crafter and of NetHack-like dungeons, in JAX."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torchrl_amago.envs.libs._jax_rows import Tree
from torchrl_amago.envs.libs.gymnax import gymnax_rows
from torchrl_amago.envs.libs.jax_env import JaxEnv, import_extra


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

    Args:
        num_envs: number of rows.
        env_id: "Craftax-Classic-Symbolic-v1", "Craftax-Symbolic-v1" (minutes to compile), or
            "...-Pixels-v1".
        params: changes of Craftax's own parameters, such as ``{"max_timesteps": 500}``.
        rows_per_reset, options: arguments of :class:`JaxEnv`.

    Raises:
        ImportError: if Craftax isn't installed.
        ValueError: for an unknown id.

    Example:
        >>> from torchrl_amago.envs import make_trial_env
        >>> env = craftax_env(64)  # doctest: +SKIP
        >>> make_trial_env(env, episodes=2).rollout(10)["observation"].shape  # doctest: +SKIP
        torch.Size([64, 10, 1345])
    """
    craftax = import_extra("craftax.craftax_env")
    env = craftax.make_craftax_env_from_name(env_id, auto_reset=False)
    env_params = env.default_params.replace(**(params or {}))

    def step(key: Tree, state: Tree, action: Tree, task: Tree) -> tuple:
        seen, state, reward, is_over, _ = env.step_env(key, state, action, env_params)
        truncated = state.timestep >= env_params.max_timesteps
        return seen, state, reward, is_over & ~truncated, truncated

    options |= {"num_envs": num_envs, "rows_per_reset": min(rows_per_reset, num_envs)}
    return gymnax_rows(env, env_params, step, env_params.max_timesteps, **options)
