"""Arrays of any kind as tensors of a spec's shape and dtype; ``name`` is what messages call them."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.data import Binary, Categorical, OneHot, TensorSpec

from torchrl_amago.action_space import ActionSpace, one_hot_parts


class TrajectoryError(ValueError):
    """A trajectory that can't be trained on; says what is wrong with it."""


def fit(name: str, array: Any, rows: int, spec: TensorSpec) -> Tensor:
    """Convert an array to a tensor ``[rows, *spec.shape]`` of the spec's dtype.

    Numbers must be finite, categories and bits possible. Indices become one-hot where the spec is,
    floating-point numbers are rounded, dimensions of size 1 come and go; nothing else changes.
    """
    x = numbers(name, array)
    if isinstance(spec, Categorical | OneHot | Binary):
        return fit_space(name, x, rows, ActionSpace.from_spec(spec))
    return cast(name, reshape(name, x, (rows, *spec.shape)), spec.dtype)


def fit_space(name: str, given: Tensor, rows: int, space: ActionSpace) -> Tensor:
    """Convert numbers to elements ``[rows, *space.shape]`` of a space."""
    x = given
    if space.one_hot and x.numel() == rows * len(space.sizes):
        index = cast(name, x, torch.int64).reshape(rows, len(space.sizes))
        check_rows(name, given, ((index >= 0) & (index < torch.tensor(space.sizes))).all(-1))
        x = one_hot_parts(index, space.sizes)
    x = cast(name, reshape(name, x, (rows, *space.shape)), space.dtype)
    check_rows(name, given, space.contains(x))
    return x


def check_rows(name: str, given: Tensor, is_possible: Tensor) -> None:
    """Raise unless all rows of an array are in the environment's space."""
    if not bool(is_possible.all()):
        wrong = (~is_possible).nonzero().reshape(-1).tolist()
        raise TrajectoryError(
            f"{name} must be in the environment's space, and {len(wrong)} of {len(given)} aren't, the "
            f"first at step {wrong[0]}: {given[wrong[0]].tolist()}. Clip or encode them."
        )


def require(name: str, needed: Sequence[Any], held: Collection[Any], remedy: str) -> None:
    """Raise unless all of some names are held."""
    if missing := [one for one in needed if one not in held]:
        got = f"got {[*held]} without {missing}"
        raise TrajectoryError(f"{name} must hold {[*needed]}, {got}. {remedy}")


def numbers(name: str, array: Any) -> Tensor:
    """Convert an array to a tensor of finite numbers with a row per step, of any shape and dtype."""
    try:
        if not isinstance(array, Tensor):
            array = np.asarray(array)
            # Copied, in this machine's byte order: files are read-only and may have the other.
            array = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError) as error:
        problem = (
            f"{name} must be one array of numbers ({error}). Turn texts and tuples into numbers."
        )
        raise TrajectoryError(problem) from error
    x = array.detach().cpu()
    if not x.ndim:
        raise TrajectoryError(f"{name} must have a row per step, got the number {x}. Stack them.")
    is_finite = torch.isfinite(x)
    if not bool(is_finite.all()):
        bad = (~is_finite).nonzero()[:, 0].unique().tolist()
        raise TrajectoryError(
            f"{name} must be finite, got NaN or infinity at {len(bad)} of {len(x)} steps, the first "
            f"at step {bad[0]}. Fix that trajectory, or leave it out."
        )
    return x


def reshape(name: str, x: Tensor, shape: Sequence[int]) -> Tensor:
    """Reshape a tensor where only dimensions of size 1 are too many or too few."""
    got, wanted = ([size for size in one[1:] if size != 1] for one in (x.shape, shape))
    if len(x) != shape[0] or got != wanted:
        raise TrajectoryError(
            f"{name} must have the shape {list(shape)}, got {list(x.shape)}. There is a row per "
            "step, of observations one more: what the last step led to."
        )
    return x.reshape(tuple(shape))


def cast(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert numbers to a dtype: floating-point ones may be rounded, whole ones may not change."""
    y = x.to(dtype)
    if x.is_floating_point() and dtype.is_floating_point:
        is_same = bool(torch.isfinite(y).all())
    else:
        # There and back alone would miss a lost sign, and float64 alone the last digits of int64.
        is_same = torch.equal(y.to(x.dtype), x) and torch.equal(y.double(), x.double())
    if not is_same:
        low, high = x.double().aminmax()
        raise TrajectoryError(
            f"{name} must be numbers that {dtype} can hold, got {x.dtype} between {low:.8g} and "
            f"{high:.8g}. Give what the environment's spec says."
        )
    return y


def flags(name: str, array: Any) -> Tensor:
    """Convert an array ``[N]`` or ``[N, 1]`` of zeros and ones to a bool tensor ``[N]``."""
    x = numbers(name, array)
    return cast(name, reshape(name, x, x.shape[:1]), torch.bool)
