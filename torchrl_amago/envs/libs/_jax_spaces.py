"""Specs of JAX environments, and of the spaces of gymnax and Craftax, which are alike."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded

from torchrl_amago.envs.libs._jax_rows import Tree


def env_specs(
    num_envs: int, seen: Tree, given: TensorSpec | Mapping[str, TensorSpec] | None
) -> dict[str, TensorSpec]:
    """Return the specs of all rows' observations, rewards and flags.

    Args:
        num_envs: number of rows.
        seen: shapes and dtypes of one row's observation.
        given: spec of one row's observation; None for ``Unbounded``.
    """
    if given is None and not isinstance(seen, Mapping):
        given = Unbounded(seen.shape, dtype=torch_dtype(seen))
    elif given is None:
        given = {key: Unbounded(x.shape, dtype=torch_dtype(x)) for key, x in seen.items()}
    if not isinstance(given, Mapping | Composite):
        given = {"observation": given}
    flags = ("done", "terminated", "truncated")
    flag = Categorical(2, shape=(num_envs, 1), dtype=torch.bool)
    return {
        "observation_spec": Composite(given).expand(num_envs),
        "reward_spec": Unbounded((num_envs, 1)),
        "done_spec": Composite({key: flag.clone() for key in flags}, shape=(num_envs,)),
    }


def observation_spec(space: Tree, example: Tree) -> TensorSpec:
    """Return the spec of one row's observation: ``Categorical`` or ``Unbounded``, or ``Composite``.

    Bounds aren't taken, since environments leave those they declare (MemoryChain, GaussianBandit).

    Args:
        space: discrete space, box or dictionary of these.
        example: shapes and dtypes of what the environment returns.
    """
    if hasattr(space, "spaces"):
        return Composite({k: observation_spec(s, example[k]) for k, s in space.spaces.items()})
    if hasattr(space, "n"):
        return Categorical(int(space.n), shape=example.shape, dtype=torch_dtype(example))
    return Unbounded(example.shape, dtype=torch_dtype(example))


def action_spec(space: Tree) -> TensorSpec:
    """Return the spec of one row's action: ``Categorical`` or ``Bounded``."""
    if hasattr(space, "n"):
        return Categorical(int(space.n), shape=())
    low, high = (np.broadcast_to(np.float32(x), space.shape) for x in (space.low, space.high))
    return Bounded(torch.tensor(low), torch.tensor(high), space.shape)


def torch_dtype(array: Tree) -> torch.dtype:
    """Return torch's dtype of an array of JAX, or of the shape of one."""
    return getattr(torch, np.dtype(array.dtype).name)
