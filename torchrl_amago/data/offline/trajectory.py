"""One trajectory in a plain form, and arrays as tensors; ``name`` is what messages call an array."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import ArrayLike
from tensordict import NestedKey, TensorDictBase, is_tensor_collection, unravel_key
from torch import Tensor

ActionForm = Literal["env", "policy", "vector"]

# Names of a trajectory's arrays in a mapping; Minari's.
_ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")


class TrajectoryError(ValueError):
    """A trajectory that can't be trained on; says what is wrong with it."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """L steps in a row: arrays or tensors, neither copied nor checked.

    Args:
        observation: ``[L + 1, ...]`` of each entry by its key, the last row being what the last step
            led to. An array alone is the entry ``"observation"``; nested mappings become nested keys.
        action: ``[L, ...]``.
        reward: ``[L]`` or ``[L, 1]``, like the flags.
        terminated: whether a step ended the trajectory, which is worth nothing more.
        truncated: whether it was cut off there.
        action_form: ``"env"`` for actions as the environment under all transforms takes them,
            ``"policy"`` for those that a policy gives (continuous ones in [-1, 1]), ``"vector"`` for
            what a policy sees of the previous one (one-hot where discrete).
        is_cut: whether the attempt goes on where the data end; False for a time limit of its own.
        last_is_stand_in: whether the last observation only stands in for what the last step led to,
            which isn't known: the step is given up where a value would bootstrap.

    Example:
        >>> trajectory = Trajectory([[0.0], [1.0], [2.0]], [1, 0], [0.5, 0.5], [0, 1], [0, 0])
        >>> len(trajectory), sorted(trajectory.observation)
        (2, ['observation'])
    """

    observation: Mapping[NestedKey, ArrayLike] | ArrayLike
    action: ArrayLike
    reward: ArrayLike
    terminated: ArrayLike
    truncated: ArrayLike
    action_form: ActionForm = "env"
    is_cut: bool = False
    last_is_stand_in: bool = False

    def __post_init__(self) -> None:
        object.__setattr__(self, "observation", _flat(self.observation))

    def __len__(self) -> int:
        return len(self.action)


def as_trajectory(
    item: Any, action_key: NestedKey = "action", reward_key: NestedKey = "reward"
) -> Trajectory:
    """Bring a trajectory of any kind into the plain form.

    Args:
        item: a :class:`Trajectory`; a mapping with the arrays ``observations`` ``[L + 1, ...]`` (or a
            mapping of them), ``actions``, ``rewards``, ``terminations`` and ``truncations``; or a
            tensordict ``[L]`` of steps as a collector writes them, ``next`` included.
        action_key: of a tensordict; likewise ``reward_key``, under ``next``.

    Raises:
        TrajectoryError: where something is missing, or ``next`` of a step isn't the step that follows.

    Example:
        >>> as_trajectory({
        ...     "observations": [[0.0], [1.0]], "actions": [1], "rewards": [0.5],
        ...     "terminations": [True], "truncations": [False]}).reward
        [0.5]
    """
    if isinstance(item, Trajectory):
        return item
    if isinstance(item, TensorDictBase):
        return _from_steps(item, action_key, reward_key)
    if not isinstance(item, Mapping):
        raise TrajectoryError(
            "it must be a Trajectory, a mapping of arrays or a tensordict of steps, got a "
            f"{type(item).__name__}. Readers such as read_minari give the first."
        )
    require("a mapping", _ARRAYS, item, "Rename its arrays; read_d4rl knows other names.")
    return Trajectory(*(item[name] for name in _ARRAYS))


def _flat(observation: Any, prefix: NestedKey = ()) -> dict[NestedKey, ArrayLike]:
    if not isinstance(observation, Mapping):
        return {unravel_key(prefix or "observation"): observation}
    parts = [_flat(x, (*prefix, name)) for name, x in observation.items()]
    return {key: x for part in parts for key, x in part.items()}


def _from_steps(steps: TensorDictBase, action_key: NestedKey, reward_key: NestedKey) -> Trajectory:
    if steps.ndim != 1:
        raise TrajectoryError(
            f"a tensordict of steps must have one dimension, got {list(steps.shape)}. Give the "
            "trajectories one by one."
        )
    needed = [action_key, unravel_key(("next", reward_key)), ("next", "done")]
    remedy = "Rename its entries, or give read_torchrl their action_key and reward_key."
    require("a tensordict of steps", needed, [*steps.keys(True)], remedy)
    after, observation = steps["next"], {}
    for key in after.exclude("done", "terminated", "truncated", reward_key).keys(True, True):
        x, y = steps.get(key, None), after.get(key)
        if x is None or is_tensor_collection(x):
            continue
        is_same = x.shape == y.shape
        if is_same:  # NaN equals NaN, since another message is for those
            x_after, y_before = x[1:], y[:-1]
            both_nan = (x_after != x_after) & (y_before != y_before)
            is_same = bool(((x_after == y_before) | both_nan).all())
        if not is_same:
            raise TrajectoryError(
                f"{key!r} under 'next' must be what the following step holds, and differs (shapes "
                f"{list(x.shape)} and {list(y.shape)}). Split the steps where they are done."
            )
        observation[key] = torch.cat([x, y[-1:]])
    done = flags("'done'", after["done"])
    terminated = flags("'terminated'", after.get("terminated", done))
    truncated = flags("'truncated'", after.get("truncated", done & ~terminated))
    action, reward = steps.get(action_key), after.get(reward_key)
    return Trajectory(observation, action, reward, terminated, truncated, action_form="policy")


def require(name: str, needed: Sequence[Any], held: Collection[Any], remedy: str) -> None:
    """Raise unless all of some names are held."""
    if missing := [one for one in needed if one not in held]:
        got = f"got {[*held]} without {missing}"
        raise TrajectoryError(f"{name} must hold {[*needed]}, {got}. {remedy}")


def check_steps(rule: str, x: Tensor, is_right: Tensor, remedy: str) -> None:
    """Raise unless a rule holds at every step."""
    wrong = (~is_right).nonzero()[:, 0].unique().tolist()
    if wrong:
        got = f"{len(wrong)} of {len(x)} aren't, the first at step {wrong[0]}"
        raise TrajectoryError(f"{rule}, and {got}: {str(x[wrong[0]].tolist())[:80]}. {remedy}")


def numbers(name: str, array: Any) -> Tensor:
    """Convert an array to a tensor of finite numbers with a row per step, of any shape and dtype."""
    try:
        if not isinstance(array, Tensor):
            array = np.asarray(array)
            # Copied, in this machine's byte order: files are read-only and may have the other.
            array = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError) as error:
        rule = f"{name} must be one array of numbers"
        raise TrajectoryError(f"{rule} ({error}). Turn texts and tuples into numbers.") from error
    x = array.detach().cpu()
    if not x.ndim:
        raise TrajectoryError(f"{name} must have a row per step, got the number {x}. Stack them.")
    check_steps(f"{name} must be finite", x, x.isfinite(), "Mend that trajectory, or leave it out.")
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
        is_same = bool(y.isfinite().all())
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


def flags(name: str, array: Any, steps: int | None = None) -> Tensor:
    """Convert an array ``[N]`` or ``[N, 1]`` of zeros and ones to a bool tensor ``[N]``."""
    x = numbers(name, array)
    return cast(name, reshape(name, x, (len(x) if steps is None else steps,)), torch.bool)
