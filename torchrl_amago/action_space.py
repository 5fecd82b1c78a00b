"""Actions as the environment stores them, and as the float vectors that networks see."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
    Unbounded,
)

ActionKind = Literal["discrete", "multi_discrete", "multi_binary", "continuous"]

# Scaling to [-1, 1] and back rounds: stored continuous actions may be this far outside.
BOUND_TOLERANCE = 1e-6


@dataclass(frozen=True)
class ActionSpace:
    """An action as the environment stores it ``[*B, *shape]`` and as a vector ``[*B, A]``, float32.

    ================== =================================== =======================================
    kind               stored                              vector
    ================== =================================== =======================================
    ``discrete``       index, or one-hot                   one-hot
    ``multi_discrete`` indices, or concatenated one-hots   concatenated one-hots
    ``multi_binary``   bits                                0 and 1
    ``continuous``     numbers in [-1, 1]                  the same numbers
    ================== =================================== =======================================

    Args:
        shape: of one stored action, without batch dimensions.
        dtype: of a stored action.
        sizes: number of categories of each part; empty for bits and numbers.
        one_hot: categories are stored one-hot, not as indices.

    Example:
        >>> space = ActionSpace.from_spec(MultiCategorical([2, 3]))
        >>> vector = space.to_vector(torch.tensor([1, 0]))
        >>> vector, space.from_vector(vector)
        (tensor([0., 1., 1., 0., 0.]), tensor([1, 0]))
    """

    kind: ActionKind
    shape: tuple[int, ...]
    dtype: torch.dtype
    sizes: tuple[int, ...] = ()
    one_hot: bool = False

    @classmethod
    def from_spec(cls, spec: TensorSpec, *, check_bounds: bool = True) -> ActionSpace:
        """Read an action space off the spec of one action; raise ValueError if none fits.

        Args:
            spec: without batch dimensions: ``env.full_action_spec_unbatched[env.action_key]``.
            check_bounds: raise for continuous actions with bounds other than -1 and 1.
        """
        shape = tuple(spec.shape)
        # The order matters: OneHot and Categorical have subclasses for several parts at once.
        if isinstance(spec, MultiOneHot):
            return _categories(spec, tuple(spec.nvec) * math.prod(shape[:-1]), one_hot=True)
        if isinstance(spec, OneHot):
            return _categories(spec, (shape[-1],) * math.prod(shape[:-1]), one_hot=True)
        if isinstance(spec, Binary):
            return cls("multi_binary", shape, spec.dtype)
        if isinstance(spec, MultiCategorical):
            return _categories(spec, tuple(spec.nvec.expand(shape).flatten().tolist()))
        if isinstance(spec, Categorical) and spec.n > 0:
            return _categories(spec, (int(spec.n),) * math.prod(shape))
        if isinstance(spec, Bounded | Unbounded) and spec.dtype.is_floating_point:
            if check_bounds:
                _check_bounds(spec)
            return cls("continuous", shape, spec.dtype)
        raise ValueError(
            "ActionSpace supports Categorical, OneHot, MultiCategorical, MultiOneHot, Binary and "
            f"floating-point Bounded actions, got {type(spec).__name__} of dtype "
            f"{getattr(spec, 'dtype', None)}. Change the action space with a transform of the "
            "environment, or name another action with action_key=."
        )

    @property
    def size(self) -> int:
        """A, length of the vector."""
        return sum(self.sizes) if self.sizes else math.prod(self.shape)

    def to_vector(self, action: Tensor) -> Tensor:
        """Turn stored actions ``[*B, *shape]`` into vectors ``[*B, A]``, float32."""
        flat = self._flat(action)
        if not self.sizes or self.one_hot:
            return flat.to(torch.float32, copy=True)
        return one_hot_parts(flat.long(), self.sizes)

    def from_vector(self, vector: Tensor) -> Tensor:
        """Turn vectors ``[*B, A]`` into stored actions ``[*B, *shape]``, bits rounded."""
        if self.sizes and not self.one_hot:
            flat = torch.stack([part.argmax(-1) for part in split_parts(vector, self.sizes)], -1)
        else:
            flat = vector if self.kind == "continuous" else vector.round()
        return flat.to(self.dtype).reshape((*vector.shape[:-1], *self.shape))

    def contains(self, action: Tensor) -> Tensor:
        """Return a bool ``[*B]``, True for each possible action of ``[*B, *shape]``."""
        flat = self._flat(action)
        if self.kind == "continuous":
            return (flat.abs() <= 1 + BOUND_TOLERANCE).all(-1)
        if self.sizes and not self.one_hot:
            sizes = torch.tensor(self.sizes, device=flat.device)
            whole = flat if not flat.is_floating_point() else flat.floor()
            return ((flat >= 0) & (flat < sizes) & (flat == whole)).all(-1)
        is_bits = ((flat == 0) | (flat == 1)).all(-1)
        if not self.sizes:
            return is_bits
        chosen = [(part == 1).sum(-1) == 1 for part in split_parts(flat, self.sizes)]
        return is_bits & torch.stack(chosen).all(0)

    def _flat(self, action: Tensor) -> Tensor:
        """``[*B, *shape] -> [*B, n]``, n one number per part, bit or category."""
        batch = action.shape[: max(action.ndim - len(self.shape), 0)]
        if action.shape != (*batch, *self.shape):
            rule = f"an action must have the shape [*batch, *{self.shape}]"
            raise ValueError(f"{rule}, got {list(action.shape)}.")
        return action.reshape(*batch, math.prod(self.shape))


def one_hot_parts(index: Tensor, sizes: Sequence[int]) -> Tensor:
    """Turn indices ``[..., parts]``, int64, into joint one-hots ``[..., sum(sizes)]``, float32."""
    parts = []
    for part, size in zip(split_parts(index, (1,) * len(sizes)), sizes, strict=True):
        zeros = torch.zeros((*index.shape[:-1], size), device=index.device)
        parts.append(zeros.scatter_(-1, part, 1.0))
    return join_parts(parts)


def split_parts(vector: Tensor, sizes: Sequence[int]) -> Sequence[Tensor]:
    """Split a vector ``[..., sum(sizes)]`` into parts ``[..., size]``."""
    # Splitting off all there is would cost more than what is usually done with it.
    return (vector,) if len(sizes) == 1 else vector.split(tuple(sizes), -1)


def join_parts(parts: Sequence[Tensor]) -> Tensor:
    """Join parts ``[..., size]`` into a vector ``[..., sum(sizes)]``."""
    return parts[0] if len(parts) == 1 else torch.cat(list(parts), -1)


def is_finitely_bounded(spec: TensorSpec) -> bool:
    """Return True if a spec is of floating-point numbers, each with a lower and an upper bound."""
    if not isinstance(spec, Bounded) or not spec.dtype.is_floating_point:
        return False
    # TorchRL also writes the largest number where there is no bound.
    largest = torch.finfo(spec.dtype).max
    return bool(((spec.low > -largest) & (spec.high < largest)).all())


def is_in_policy_scale(spec: TensorSpec) -> bool:
    """Return True if the bounds of a spec are -1 and 1, as continuous policies need them."""
    return is_finitely_bounded(spec) and bool(((spec.low == -1) & (spec.high == 1)).all())


def _check_bounds(spec: Bounded | Unbounded) -> None:
    if is_in_policy_scale(spec):
        return
    remedy = "Bound them in the environment (for example with Gymnasium's RescaleAction)"
    got = f"finite bounds, got {type(spec).__name__} without"
    if is_finitely_bounded(spec):
        remedy = "Append torchrl.envs.ActionScaling() to the environment, before "
        remedy += "PreviousStepTransform (make_trial_env does both)"
        got = f"the bounds -1 and 1, got {spec.low.min():g} to {spec.high.max():g}"
    raise ValueError(f"continuous actions must have {got}. {remedy}.")


def _categories(spec: TensorSpec, sizes: tuple[int, ...], one_hot: bool = False) -> ActionSpace:
    kind = "discrete" if len(sizes) == 1 else "multi_discrete"
    return ActionSpace(kind, tuple(spec.shape), spec.dtype, tuple(map(int, sizes)), one_hot)
