"""Pictures of one trial, episode by episode.

The trial transform resets the task within the step that ends an episode, so the picture of its end
is gone when `env.step` returns. A camera beneath the transform takes it before.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import numpy as np
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import Compose, EnvBase, GymWrapper, Transform, TransformedEnv

from torchrl_amago.evaluation.evaluate import acting, rollout_mode


class _Camera(Transform):
    """Transform that keeps the latest picture of one environment of the batch beneath it."""

    def __init__(self, env_index: int):
        super().__init__()
        self.env_index = env_index
        self.picture: np.ndarray | None = None

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self.picture = _render(self.parent.base_env, self.env_index)
        return next_tensordict


def _render(env: EnvBase, env_index: int) -> np.ndarray:
    if not isinstance(env, GymWrapper):
        return env.render(env_index)
    pictures = env._env.render()
    return pictures[env_index] if isinstance(env._env, gym.vector.VectorEnv) else pictures


def rollout_pictures(
    policy: Callable[[TensorDictBase], TensorDictBase],
    env: EnvBase,
    *,
    env_index: int = 0,
    greedy: bool = True,
    seed: int = 0,
    max_steps: int = 10_000,
    soft_reset_key: NestedKey = "soft_reset",
    done_key: NestedKey = "done",
) -> list[list[np.ndarray]]:
    """Play one trial; return a list of pictures per episode, from its first state to its last.

    Other arguments, and what stays undisturbed: see :func:`evaluate`.

    Args:
        env: transforms over an environment with `render(index) -> uint8 [H, W, 3]`, or over a
            Gymnasium environment made with ``render_mode="rgb_array"``. It is seeded and reset.
        env_index: environment of the batch to look at; all of them play.
        max_steps: longest trial allowed; RuntimeError for a longer one.

    Example:
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=3)
        >>> episodes = rollout_pictures(env.rand_action, env, env_index=1, greedy=False)
        >>> len(episodes), episodes[0][0].shape[-1]
        (3, 3)
    """
    camera = _Camera(env_index)
    # A copy of the transforms: the environment that was given keeps its own.
    layers = [env.transform.clone()] if isinstance(env, TransformedEnv) else []
    base = getattr(env, "base_env", env)
    filmed = TransformedEnv(base, Compose(camera, *layers))
    with rollout_mode(policy, greedy=greedy, seed=seed):
        filmed.set_seed(seed)
        step, act = filmed.reset(), acting(policy, base)
        episodes = [[_render(base, env_index)]]
        for _ in range(max_steps):
            # Other environments may be done before this one and start a new trial.
            step, following = filmed.step_and_maybe_reset(act(step))
            episodes[-1].append(camera.picture)
            if step["next", done_key].reshape(-1)[env_index]:
                return episodes
            if step["next", soft_reset_key].reshape(-1)[env_index]:
                episodes.append([_render(base, env_index)])
            step = following
    raise RuntimeError(
        f"the trial must end within max_steps={max_steps} steps, it did not. Give the trial "
        "transform episodes= or horizon=, or raise max_steps."
    )
