"""One trajectory in a plain form, whatever it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike
from tensordict import NestedKey, TensorDictBase, is_tensor_collection
from torch import Tensor

ActionForm = Literal["env", "policy", "vector"]

# Names of a trajectory's arrays in a mapping; Minari's.
_ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")
_FLAGS = ("done", "terminated", "truncated")


class TrajectoryError(ValueError):
    """A trajectory that can't be trained on; says what is wrong with it."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """L steps in a row: arrays or tensors, neither copied nor checked.

    Args:
        observation: ``[L + 1, ...]`` of each entry by its key, the last row being what the last step
            led to. An array alone is the entry ``"observation"``; nested mappings become nested keys.
        action: ``[L, ...]``.
        reward: ``[L]`` or ``[L, 1]``.
        terminated: ``[L]`` or ``[L, 1]``, whether a step ended the trajectory, which is worth nothing
            more.
        truncated: likewise, whether it was cut off there.
        action_form: ``"env"`` for actions as the environment under all transforms takes them,
            ``"policy"`` for those that a policy gives (continuous ones in [-1, 1]), ``"vector"`` for
            what a policy sees of the previous one (one-hot where discrete).
        first_time: steps of the trial before this trajectory; 0 unless it is a fragment.
        first_prev_action: ``[A]``, the action before a fragment, in the form ``"vector"``.
        first_prev_reward: the reward before a fragment.
        is_cut: whether the attempt goes on where the data end, so that it ends no trial; False also
            for an environment's own time limit.
        last_is_stand_in: whether the last row of the observations only stands in for what the last
            step led to, which isn't known: the step is given up where a value would bootstrap.

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
    first_time: int = 0
    first_prev_action: ArrayLike | None = None
    first_prev_reward: float = 0.0
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
            f"it must be a Trajectory, a mapping of arrays or a tensordict of steps, got a "
            f"{type(item).__name__}. Readers such as read_minari give the first."
        )
    missing = [name for name in _ARRAYS if name not in item]
    if missing:
        raise TrajectoryError(
            f"a mapping must hold {', '.join(_ARRAYS)}, got {sorted(map(str, item))} without "
            f"{', '.join(missing)}. Rename its arrays; read_d4rl and read_amago know other names."
        )
    return Trajectory(*(item[name] for name in _ARRAYS))


def _flat(observation: Any, prefix: tuple[str, ...] = ()) -> dict[NestedKey, ArrayLike]:
    if not isinstance(observation, Mapping):
        key = prefix or ("observation",)
        return {key[0] if len(key) == 1 else key: observation}
    entries: dict[NestedKey, ArrayLike] = {}
    for name, value in observation.items():
        name = name if isinstance(name, tuple) else (name,)
        entries.update(_flat(value, (*prefix, *name)))
    return entries


def _from_steps(steps: TensorDictBase, action_key: NestedKey, reward_key: NestedKey) -> Trajectory:
    if steps.ndim != 1:
        raise TrajectoryError(
            f"a tensordict of steps must have one dimension, got {list(steps.shape)}. Give the "
            "trajectories one by one."
        )
    after = steps.get("next", None)
    needed = [action_key, ("next", reward_key), ("next", "done")]
    missing = [key for key in needed if steps.get(key, None) is None]
    if after is None or missing:
        raise TrajectoryError(
            f"a tensordict of steps must hold {needed}, got {sorted(map(str, steps.keys(True)))}. "
            "Rename its entries, or give read_torchrl their action_key and reward_key."
        )
    observation = {}
    for key in after.keys(True, True):
        before, following = steps.get(key, None), after.get(key)
        is_flag = (key if isinstance(key, str) else key[-1]) in _FLAGS
        if before is None or is_flag or key == reward_key or is_tensor_collection(before):
            continue
        if before.shape != following.shape:
            raise TrajectoryError(
                f"{key!r} under 'next' must have the shape {list(before.shape)} that it has in the "
                f"steps, got {list(following.shape)}. Reshape it, or leave it out of 'next'."
            )
        if not _equal(before[1:], following[:-1]):
            raise TrajectoryError(
                f"{key!r} under 'next' must be what the following step holds, and differs. Steps "
                "of several trajectories must be told apart; read_torchrl does where they are done."
            )
        observation[key] = torch.cat([before, following[-1:]])
    done = after.get("done")
    terminated = after.get("terminated", done)
    if terminated.shape != done.shape:
        raise TrajectoryError(
            f"'terminated' under 'next' must have the shape {list(done.shape)} of 'done', got "
            f"{list(terminated.shape)}. Give one flag per step."
        )
    truncated = after.get("truncated", None)
    if truncated is None:
        # Flags may be numbers; whatever isn't 0 or 1 stays as it is, and is refused later.
        truncated = done.masked_fill(terminated.bool(), 0)
    return Trajectory(
        observation,
        steps.get(action_key),
        after.get(reward_key),
        terminated,
        truncated,
        action_form="policy",
    )


def _equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same; NaN equals NaN, since another message is for those."""
    return bool(((x == y) | ((x != x) & (y != y))).all())
