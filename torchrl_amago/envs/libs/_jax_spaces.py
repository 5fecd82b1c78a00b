"""Specs of the spaces that gymnax and Craftax declare, which are alike but of different classes."""

from __future__ import annotations

import numpy as np
import torch
from torchrl.data import Bounded, Categorical, Composite, TensorSpec, Unbounded

from torchrl_amago.envs.libs._jax_rows import Tree
from torchrl_amago.envs.libs.jax_env import torch_dtype


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
