"""Pictures of one trial, episode by episode.

The trial transform resets the task within the step that ends an episode, so the picture that matters
most, the episode's end, is gone when `env.step` returns. A camera placed under the transforms takes
it before.
"""

from __future__ import annotations

from collections.abc import Callable

import gymnasium as gym
import numpy as np
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import Compose, EnvBase, GymWrapper, Transform, TransformedEnv

from torchrl_amago.evaluation.evaluate import rollout_mode


class _Camera(Transform):
    """Keeps the picture of one row after each step of the environment beneath it."""

    def __init__(self, row: int):
        super().__init__()
        self.row = row
        self.picture: np.ndarray | None = None

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        self.picture = _draw(self.parent.base_env, self.row)
        return next_tensordict


def _draw(env: EnvBase, row: int) -> np.ndarray:
    if not isinstance(env, GymWrapper):
        return env.render(row)
    pictures = env._env.render()
    return pictures[row] if isinstance(env._env, gym.vector.VectorEnv) else pictures


def rollout_pictures(
    policy: Callable[[TensorDictBase], TensorDictBase],
    env: EnvBase,
    *,
    row: int = 0,
    greedy: bool = True,
    seed: int = 0,
    max_steps: int = 10_000,
    soft_reset_key: NestedKey = "soft_reset",
    done_key: NestedKey = "done",
) -> list[list[np.ndarray]]:
    """Play one trial and take a picture at every step.

    Args:
        policy: as for :func:`evaluate`, and as carefully left alone.
        env: transforms over an environment with `render(row) -> uint8 [H, W, 3]`, or over a
            Gymnasium environment made with ``render_mode="rgb_array"``. It is seeded and reset; all
            its rows play, one is looked at.
        row: which one.
        greedy: act by the distribution's mode instead of sampling.
        seed: of environment and sampling.
        max_steps: a trial longer than this raises.
        soft_reset_key: in `next`: True where the step ended an episode and the trial goes on.
        done_key: in `next`: True where the step ended the trial.

    Returns:
        One list of pictures per episode, from its first state to the one that ended it.

    Raises:
        TypeError: where the environment cannot be drawn.
        IndexError: where there is no such row.
        RuntimeError: where the trial doesn't end.

    Example:
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=3)
        >>> episodes = rollout_pictures(env.rand_action, env, row=1, greedy=False)
        >>> len(episodes), episodes[0][0].shape[-1]
        (3, 3)
    """
    filmed, camera = _with_camera(env, row)
    with rollout_mode(policy, greedy=greedy, seed=seed):
        filmed.set_seed(seed)
        step = filmed.reset()
        episodes = [[_draw(filmed.base_env, row)]]
        for _ in range(max_steps):
            # Other rows may be done before this one: they begin a new trial.
            step, following = filmed.step_and_maybe_reset(policy(step))
            episodes[-1].append(camera.picture)
            if step["next", done_key].reshape(-1)[row]:
                return episodes
            if step["next", soft_reset_key].reshape(-1)[row]:
                episodes.append([_draw(filmed.base_env, row)])
            step = following
    raise RuntimeError(
        f"The trial must end within max_steps={max_steps} steps, it did not. Give the trial "
        "transform episodes= or horizon=, or raise max_steps."
    )


def _with_camera(env: EnvBase, row: int) -> tuple[TransformedEnv, _Camera]:
    base = getattr(env, "base_env", env)
    if not callable(getattr(base, "render", None)):
        raise TypeError(
            f"rollout_pictures needs an environment with render(row), and {type(base).__name__} has "
            "none. Use one of the native tasks, or give yours such a method."
        )
    rows = env.batch_size.numel()
    if not 0 <= row < rows:
        raise IndexError(f"row must be in [0, {rows}), got {row}. The environment has {rows} rows.")
    camera = _Camera(row)
    transforms = env.transform if isinstance(env, TransformedEnv) else Compose()
    layers = transforms if isinstance(transforms, Compose) else [transforms]
    # Copies of the transforms: the environment that was given keeps its own.
    return TransformedEnv(base, Compose(camera, *(layer.clone() for layer in layers))), camera
