"""One trajectory in a plain form, whatever it was read from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from numpy.typing import ArrayLike
from tensordict import NestedKey, TensorDictBase, is_tensor_collection, unravel_key
from torch import Tensor

from torchrl_amago.data.offline.arrays import TrajectoryError, flags, require

ActionForm = Literal["env", "policy", "vector"]

# Names of a trajectory's arrays in a mapping; Minari's.
_ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")


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
        is_cut: whether the attempt goes on where the data end, so that it ends no trial; False also
            for an environment's own time limit.
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
        action_key: of a tensordict.
        reward_key: of a tensordict, under ``next``.

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


def _flat(observation: Any, prefix: tuple[str, ...] = ()) -> dict[NestedKey, ArrayLike]:
    if not isinstance(observation, Mapping):
        return {unravel_key(prefix or "observation"): observation}
    entries: dict[NestedKey, ArrayLike] = {}
    for name, value in observation.items():
        entries |= _flat(value, (*prefix, *(name if isinstance(name, tuple) else (name,))))
    return entries


def _from_steps(steps: TensorDictBase, action_key: NestedKey, reward_key: NestedKey) -> Trajectory:
    if steps.ndim != 1:
        problem = f"a tensordict of steps must have one dimension, got {list(steps.shape)}."
        raise TrajectoryError(f"{problem} Give the trajectories one by one.")
    needed = [action_key, unravel_key(("next", reward_key)), ("next", "done")]
    remedy = "Rename its entries, or give read_torchrl their action_key and reward_key."
    require("a tensordict of steps", needed, [*steps.keys(True)], remedy)
    after, observation = steps["next"], {}
    for key in after.exclude("done", "terminated", "truncated", reward_key).keys(True, True):
        x, following = steps.get(key, None), after.get(key)
        if x is None or is_tensor_collection(x):
            continue
        if x.shape != following.shape or not _equal(x[1:], following[:-1]):
            raise TrajectoryError(
                f"{key!r} under 'next' must be what the following step holds, and differs (shapes "
                f"{list(x.shape)} and {list(following.shape)}). Tell trajectories apart, as "
                "read_torchrl does where they are done."
            )
        observation[key] = torch.cat([x, following[-1:]])
    done = flags("'done'", after["done"])
    terminated = flags("'terminated'", after.get("terminated", done))
    truncated = flags("'truncated'", after.get("truncated", done & ~terminated))
    action, reward = steps.get(action_key), after.get(reward_key)
    return Trajectory(observation, action, reward, terminated, truncated, action_form="policy")


def _equal(x: Tensor, y: Tensor) -> bool:
    """Whether two tensors hold the same; NaN equals NaN, since another message is for those."""
    return bool(((x == y) | ((x != x) & (y != y))).all())
