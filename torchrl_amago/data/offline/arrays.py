"""Arrays of any kind as tensors of an environment's shapes and dtypes, or what is wrong with them.

All raise :class:`TrajectoryError`. ``name`` is what an array is called in messages.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torchrl.data import Binary, Categorical, OneHot, TensorSpec, Unbounded

from torchrl_amago.data.offline.trajectory import Trajectory, TrajectoryError


def fit(name: str, array: Any, rows: int, spec: TensorSpec) -> Tensor:
    """An array as a tensor ``[rows, *spec.shape]`` of the spec's dtype.

    Every number is finite. Indices become one-hot where the spec says so, floating-point numbers are
    rounded to its dtype, and dimensions of size 1 come and go; nothing else is changed.

    Example:
        >>> fit("observations", [0, 2], 2, OneHot(3, dtype=torch.int64)).tolist()
        [[1, 0, 0], [0, 0, 1]]
    """
    x = numbers(name, array)
    shape = (rows, *spec.shape)
    if isinstance(spec, OneHot) and x.numel() == rows * torch.Size(shape[1:-1]).numel():
        index = cast_whole(name, x, torch.int64).reshape(shape[:-1])
        is_known = (index >= 0) & (index < shape[-1])
        check_all(name, index, is_known.reshape(rows, -1).all(-1))
        x = torch.nn.functional.one_hot(index, shape[-1])
    x = cast(name, reshape(name, x, shape), spec.dtype)
    if isinstance(spec, Categorical | OneHot | Binary) and not spec.expand(shape).is_in(x):
        raise TrajectoryError(
            f"{name} must be of the environment's {type(spec).__name__}, got other values, between "
            f"{_range(x)}. Encode them alike."
        )
    return x


def numbers(name: str, array: Any) -> Tensor:
    """A tensor of finite numbers with a row per step, of whatever shape and dtype."""
    try:
        x = array.detach().cpu() if isinstance(array, Tensor) else _from_numpy(array)
    except (TypeError, ValueError) as error:
        raise TrajectoryError(
            f"{name} must be one array of numbers, got a {type(array).__name__} ({error}). Turn "
            "texts, tuples and the like into numbers first."
        ) from error
    if not x.ndim:
        raise TrajectoryError(f"{name} must have a row per step, got the number {x}. Stack them.")
    if x.is_floating_point() and not bool(torch.isfinite(x).all()):
        bad = (~torch.isfinite(x)).reshape(len(x), -1).any(-1).nonzero().reshape(-1).tolist()
        raise TrajectoryError(
            f"{name} must be finite, got NaN or infinity at {len(bad)} of {len(x)} steps, the first "
            f"at step {bad[0]}. Leave that trajectory out, or mend it."
        )
    return x


def _from_numpy(array: Any) -> Tensor:
    x = np.asarray(array)
    if x.dtype.kind not in "biuf":
        raise TypeError(f"dtype {x.dtype}")
    # Files may hold the other byte order, and be read-only; torch takes neither.
    return torch.from_numpy(x.astype(x.dtype.newbyteorder("="), order="C", copy=True))


def reshape(name: str, x: Tensor, shape: Sequence[int]) -> Tensor:
    """A tensor of this shape, where only dimensions of size 1 are too many or too few."""
    if len(x) != shape[0] or _without_ones(x.shape[1:]) != _without_ones(shape[1:]):
        raise TrajectoryError(
            f"{name} must have the shape {list(shape)}, got {list(x.shape)}. There is a row per "
            "step, of observations one more: what the last step led to."
        )
    return x.reshape(tuple(shape))


def _without_ones(shape: Sequence[int]) -> list[int]:
    return [size for size in shape if size != 1]


def cast(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of this dtype; floating-point numbers may be rounded, whole ones may not change."""
    if x.dtype == dtype:
        return x
    if not (dtype.is_floating_point and x.is_floating_point()):
        return cast_whole(name, x, dtype)
    rounded = x.to(dtype)
    if not bool(torch.isfinite(rounded).all()):
        raise TrajectoryError(
            f"{name} must fit into {dtype}, got numbers between {_range(x)}. Scale them down."
        )
    return rounded


def cast_whole(name: str, x: Tensor, dtype: torch.dtype) -> Tensor:
    """A tensor of this dtype, of the same whole numbers or bits."""
    whole = x.to(dtype)
    # There and back alone would miss a lost sign, and float64 alone the last digits of int64.
    is_same = torch.equal(whole.to(x.dtype), x)
    if not is_same or not torch.equal(whole.to(torch.float64), x.to(torch.float64)):
        raise TrajectoryError(
            f"{name} must be whole numbers that {dtype} can hold, got {x.dtype} between "
            f"{_range(x)}. Give what the environment's spec says."
        )
    return whole


def _range(x: Tensor) -> str:
    """The smallest and the largest number, for messages."""
    low, high = x.to(torch.float64).aminmax()  # not all dtypes can be compared
    return f"{low:.8g} and {high:.8g}"


def flags(name: str, array: Any) -> Tensor:
    """A tensor ``[N]`` of bits; NaN, which would become True, and other numbers are refused.

    Example:
        >>> flags("terminals", [[0.0], [1.0]])
        tensor([False,  True])
    """
    return cast_whole(name, numbers(name, array), torch.bool).reshape(-1)


def number(name: str, value: Any, dtype: torch.dtype) -> float | int:
    """One finite number, as it is in this dtype.

    Example:
        >>> number("first_time", 3.0, torch.int64)
        3
    """
    return fit(name, [value], 1, Unbounded((), dtype=dtype)).item()


def count(name: str, value: Any) -> int:
    """A whole number of steps."""
    steps = number(name, value, torch.int64)
    if steps < 0:
        raise TrajectoryError(
            f"{name} must be at least 0, got {steps}. It counts steps; give 0 where there were none."
        )
    return steps


def check_all(name: str, shown: Tensor, is_right: Tensor) -> None:
    """Refuse rows that aren't in the environment's space.

    Args:
        name: of the array.
        shown: its rows, for the message.
        is_right: bool, one for each row.
    """
    if bool(is_right.all()):
        return
    wrong = (~is_right).nonzero().reshape(-1).tolist()
    raise TrajectoryError(
        f"{name} must be in the environment's space, and {len(wrong)} of {len(is_right)} aren't, the "
        f"first at step {wrong[0]}: {shown[wrong[0]].tolist()}. Clip them, or leave that trajectory "
        "out."
    )


def ends(trajectory: Trajectory, steps: int) -> tuple[bool, bool]:
    """Whether the last step terminated, and whether it was truncated; no other may be either."""
    flag = Unbounded((), dtype=torch.bool)
    terminated = fit("terminations", trajectory.terminated, steps, flag)
    truncated = fit("truncations", trajectory.truncated, steps, flag)
    inside = (terminated | truncated)[:-1].nonzero().reshape(-1).tolist()
    if inside:
        raise TrajectoryError(
            f"only its last step may be terminated or truncated, got step {inside[0]} of {steps}. "
            "Split it there."
        )
    last = bool(terminated[-1]), bool(truncated[-1])
    if not any(last):
        raise TrajectoryError(
            f"its last step must be terminated or truncated, got neither in {steps} steps. Mark it "
            "as truncated if it was cut off there."
        )
    return last
