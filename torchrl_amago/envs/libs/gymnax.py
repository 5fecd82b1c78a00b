"""Environments of gymnax by id: classic control, MinAtar, bsuite, bandits and mazes in JAX."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any
from urllib.error import URLError

import numpy as np

from torchrl_amago._validation import check_choice
from torchrl_amago.envs.libs._extras import import_extra
from torchrl_amago.envs.libs._jax_rows import Tree
from torchrl_amago.envs.libs._jax_spaces import action_spec, observation_spec
from torchrl_amago.envs.libs.jax_env import JaxEnv

# RGB of nothing and of channels 1, 2, ... of images that aren't pictures.
_HEX = "000000 e63c3c 3c78e6 3cbe5a f0c83c aa5adc 50d2dc f08c28 f082be 969696 ffffff"
_COLOURS = np.array([[*bytes.fromhex(colour)] for colour in _HEX.split()], dtype=np.uint8)


def gymnax_env(
    env_id: str,
    num_envs: int,
    *,
    params: Mapping[str, Any] | None = None,
    env_options: Mapping[str, Any] | None = None,
    **options: Any,
) -> JaxEnv:
    """Make rows of an environment of gymnax (https://github.com/RobertTLange/gymnax).

    A task is the key that an episode begins with: episodes of a trial repeat all that the
    environment draws at its reset, be it a bandit's arms, a maze's goal, the bit to remember, or
    merely CartPole's first state. The luck of its steps is new. ``env.max_episode_steps`` is the
    time limit, which truncates.

    Args:
        env_id: one of ``gymnax.registered_envs``. "MNISTBandit-bsuite" downloads its images.
        num_envs: number of rows.
        params: changes of gymnax's own parameters, such as ``{"max_steps_in_episode": 200}``.
        env_options: arguments of the environment's class, such as ``{"num_bits": 3}``.
        options: further arguments of :class:`JaxEnv`.

    Raises:
        ImportError: if gymnax isn't installed.
        ValueError: for an unknown id or unknown parameters.
        OSError: if data can't be downloaded.

    Example:
        >>> from torchrl_amago.envs import make_trial_env
        >>> env = gymnax_env("CartPole-v1", 64)  # doctest: +SKIP
        >>> make_trial_env(env, episodes=2).rollout(10)["observation"].shape  # doctest: +SKIP
        torch.Size([64, 10, 4])
    """
    gymnax = import_extra("gymnax")
    check_choice("env_id", env_id, gymnax.registered_envs)
    try:
        env, env_params = gymnax.make(env_id, **(env_options or {}))
    except URLError as error:
        raise OSError(f"{env_id} must download its data, which failed: {error}.") from error
    env_params = with_params(env_params, params)

    # Not gymnax's own step, which resets at once.
    def step(key: Tree, state: Tree, action: Tree, task: Tree) -> tuple:
        seen, state, reward, terminated, _ = env.step_env(key, state, action, env_params)
        return seen, state, reward, terminated, env.is_truncated(state, env_params)

    def render(state: Tree, task: Tree) -> np.ndarray:
        from gymnax.visualize import vis_gym

        if env.name in vis_gym.SUPPORTED_GYM_ENVS:
            return vis_gym.render_gym_frame(env.name, state, env_params)
        return draw_observation(np.asarray(env.observe(task, state, None, env_params)))

    limit = int(env_params.max_steps_in_episode)
    return gymnax_rows(env, env_params, step, limit, num_envs=num_envs, render=render, **options)


def with_params(env_params: Any, changes: Mapping[str, Any] | None) -> Any:
    """Return an environment's parameters with changes; raise ValueError for one it doesn't have."""
    known = [field.name for field in dataclasses.fields(env_params)]
    for name in changes or {}:
        check_choice("params", name, known)
    return env_params.replace(**(changes or {}))


def gymnax_rows(
    env: Any, env_params: Any, step: Callable, max_episode_steps: int, **options: Any
) -> JaxEnv:
    """Make rows of an environment with gymnax's interface, whose task is the key of its reset.

    Args:
        env, env_params: the environment and its parameters.
        step: see :class:`JaxEnv`.
        max_episode_steps: the time limit, an attribute of the rows.
        options: further arguments of :class:`JaxEnv`.
    """
    jax = import_extra("jax")

    def reset(key: Tree, task: Tree) -> tuple[Tree, Tree]:
        return env.reset_env(task, env_params)

    example = jax.eval_shape(env.reset_env, jax.random.PRNGKey(0), env_params)[0]
    rows = JaxEnv(
        reset,
        step,
        action_spec=action_spec(env.action_space(env_params)),
        observation_spec=observation_spec(env.observation_space(env_params), example),
        **options,
    )
    rows.max_episode_steps = max_episode_steps
    return rows


def draw_observation(observation: np.ndarray, cell_pixels: int = 24) -> np.ndarray:
    """Draw an observation as cells.

    Args:
        observation: ``[H, W, C]`` with a colour for each channel, the last one that is set on top;
            or of fewer dimensions, with red for positive numbers and blue for negative ones.
        cell_pixels: side of a cell.

    Example:
        >>> draw_observation(np.zeros((10, 10, 4))).shape
        (240, 240, 3)
    """
    if observation.ndim == 3:
        channels = (observation > 0) * np.arange(1, observation.shape[-1] + 1)
        colours = _COLOURS[channels.max(-1) % len(_COLOURS)]
    else:
        numbers = np.atleast_2d(observation)[..., None]
        strength = np.minimum(np.log1p(np.abs(numbers)), 1.0) * 255
        fades = np.where(numbers > 0, [0, 1, 1], [1, 1, 0])
        colours = (255 - fades * strength).astype(np.uint8)
    return colours.repeat(cell_pixels, 0).repeat(cell_pixels, 1)
