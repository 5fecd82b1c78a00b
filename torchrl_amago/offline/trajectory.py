"""Trajectories in one plain form, and as tensors that fit an environment's specs.

Legend: L steps, S rows (L + 1, with the observation after the last step), A action size. ``name``
is an array's name in errors.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, OneHot, TensorSpec, Unbounded
from torchrl.envs import EnvBase, InitTracker, TransformedEnv
from torchrl.envs.batched_envs import BatchedEnvBase

from torchrl_amago import action_space, keys
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.envs import PreviousStepTransform, TrialTransform
from torchrl_amago.envs.transforms.repeat import first_worker

ActionForm = Literal["env", "policy", "vector"]
FLAGS = ("done", "terminated", "truncated")
_REPLAYED = (TrialTransform, PreviousStepTransform, InitTracker)
# Names of a trajectory's arrays in a mapping; Minari's.
ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")


class TrajectoryError(ValueError):
    """A trajectory that can't be trained on; the message gives the reason."""


@dataclass(frozen=True, eq=False)
class Trajectory:
    """L steps in a row: arrays or tensors, neither copied nor checked.

    Args:
        observation: ``[L + 1, ...]`` of each entry by its key, up to the observation after the last
            step; ``[L, ...]`` if that is unknown: the last step is then dropped if a value would
            bootstrap there. An array alone is the entry ``"observation"``.
        action: ``[L, ...]``; ``reward`` is ``[L]`` or ``[L, 1]``, like the flags.
        terminated: True on the last step if it ended the episode for good.
        truncated: True on the last step at a time limit. With neither, the data are cut there.
        action_form: ``"env"`` for actions of the environment without transforms, ``"policy"`` for
            a policy's (continuous ones in [-1, 1]), ``"vector"`` for previous actions as a policy
            reads them (one-hot where discrete).

    Example:
        >>> len(Trajectory([[0.0], [1.0], [2.0]], [1, 0], [0.5, 0.5], [0, 1], [0, 0]))
        2
    """

    observation: Mapping[NestedKey, ArrayLike] | ArrayLike
    action: ArrayLike
    reward: ArrayLike
    terminated: ArrayLike
    truncated: ArrayLike
    action_form: ActionForm = "env"

    def __len__(self) -> int:
        return len(self.action)


def as_trajectory(item: Any, action_key: NestedKey, reward_key: NestedKey) -> Trajectory:
    """Bring an item of :func:`load_trials` into the plain form."""
    if isinstance(item, Trajectory):
        return item
    if isinstance(item, TensorDictBase) and item.ndim == 1:
        return from_steps(item, action_key, reward_key)
    is_mapping = isinstance(item, Mapping) and not isinstance(item, TensorDictBase)
    rule = "it must be a Trajectory, a mapping of arrays or a tensordict of steps [L]"
    require(is_mapping, f"{rule}, got a {type(item).__name__}. Use a reader.")
    require_names("a mapping", ARRAYS, item, "Rename its arrays; read_d4rl knows other names.")
    return Trajectory(*(item[name] for name in ARRAYS))


def _flatten(observation: Any, prefix: NestedKey = ()) -> dict[NestedKey, ArrayLike]:
    if not isinstance(observation, Mapping):
        return {unravel_key(prefix or "observation"): observation}
    parts = [_flatten(x, (*prefix, name)) for name, x in observation.items()]
    return {key: x for part in parts for key, x in part.items()}


def from_steps(
    steps: TensorDictBase,
    action_key: NestedKey,
    reward_key: NestedKey,
    action_form: ActionForm = "policy",
) -> Trajectory:
    """Bring steps ``[L]`` of one trajectory into the plain form."""
    needed = [action_key, unravel_key(("next", reward_key)), ("next", "done")]
    remedy = "Rename its entries, or give read_torchrl their action_key and reward_key."
    require_names("a tensordict of steps", needed, [*steps.keys(True)], remedy)
    after, observation = steps["next"], {}
    entries = after.exclude(*FLAGS, reward_key).keys(True, True)
    for key in {*entries} & {*steps.keys(True, True)}:
        x, y = steps[key], after[key]
        is_next = x.dtype == y.dtype and np.array_equal(x[1:], y[:-1], equal_nan=True)
        rule = f"{key!r} under 'next' must equal that of the following step"
        require(is_next, f"{rule}, and differs. Split the steps where they are done.")
        observation[key] = torch.cat([x, y[-1:]])
    done = flags("'done'", after["done"])
    terminated = flags("'terminated'", after.get("terminated", done))
    truncated = flags("'truncated'", after.get("truncated", done & ~terminated))
    arrays = observation, steps[action_key], after[reward_key], terminated, truncated
    return Trajectory(*arrays, action_form)


class RecordedTrial(NamedTuple):
    """An episode, a trial or a piece of one, in rows of a :class:`RecordedEnv`."""

    rows_S: TensorDict
    recorded_S: dict[NestedKey, Tensor]  # entries of the transforms that the data hold
    marks_episodes: bool = False
    is_fragment: bool = False  # it begins in mid-trial
    has_final_observation: bool = True  # else the last row repeats the one before

    @property
    def length(self) -> int:
        """L; a row where an earlier episode ended begins no step."""
        return len(self.rows_S) - 1 - int(self.rows_S["done"][:-1].sum())


class TrajectoryChecker:
    """Converter of trajectories to rows that fit an environment's specs.

    ``given`` are the entries that data hold, as other transforms than those of ``_REPLAYED`` have
    made them; ``written`` are those that the latter write.
    """

    def __init__(self, env: EnvBase) -> None:
        names = f"{env.action_keys} and {env.reward_keys}. Join them with a transform."
        is_single = len(env.action_keys) == len(env.reward_keys) == 1
        require(is_single, f"offline data have one action and one reward, got {names}")
        # Data are read on the CPU, wherever the environment is.
        self.action_key, self.reward_key = env.action_keys[0], env.reward_keys[0]
        action_spec = env.full_action_spec_unbatched[self.action_key].to("cpu")
        self.space = ActionSpace.from_spec(action_spec)
        self.reward_spec = env.full_reward_spec_unbatched[self.reward_key].to("cpu")
        self.specs = dict(env.full_observation_spec_unbatched.to("cpu").items(True, True))
        self.transforms: list[TrialTransform | PreviousStepTransform | InitTracker] = []
        while isinstance(env, TransformedEnv | BatchedEnvBase):
            if isinstance(env, TransformedEnv):  # with those of nested Composes
                inner = [one for one in env.transform.modules() if isinstance(one, _REPLAYED)]
                self.transforms[:0] = inner
            env = env.base_env if isinstance(env, TransformedEnv) else first_worker(env)
        # Without a trial transform, a trial is an episode.
        defaults = TrialTransform(1, trial_end="episode"), PreviousStepTransform()
        self.trial, self.previous = (
            next(one for one in (*self.transforms, other) if isinstance(one, type(other)))
            for other in defaults
        )
        self.shown = [*self.specs]
        if self.trial.episode_success_key in self.specs:  # data hold the steps' successes
            self.specs[self.trial.success_key] = self.specs.pop(self.trial.episode_success_key)
        written = {key for one in self.transforms for key in one.out_keys}
        self.written = [key for key in self.specs if key in written]
        self.given = [key for key in self.specs if key not in written]
        observation = {key: self.specs[key] for key in self.given}
        others = {self.action_key: action_spec}, {self.reward_key: self.reward_spec}
        self.recorded_specs = [Composite(specs) for specs in (observation, *others)]
        base = env.full_action_spec_unbatched[env.action_keys[0]].to("cpu")
        is_bounded = action_space.is_finitely_bounded(base)
        self._bounds = (base.low, base.high) if is_bounded else None

    def check(self, item: Any) -> RecordedTrial:
        """Convert a trajectory of any kind, or raise TrajectoryError."""
        one = as_trajectory(item, self.action_key, self.reward_key)
        action_L = self._action(one)
        steps, arrays = len(action_L), _flatten(one.observation)
        if len(self.given) == 1 and keys.OBSERVATION in arrays:
            arrays.setdefault(self.given[0], arrays[keys.OBSERVATION])  # under any name
        require_names("observations", self.given, arrays, "Name them as the environment does.")
        specs = {key: spec for key, spec in self.specs.items() if key in arrays}
        recorded_S = {k: fit(f"observations {k!r}", arrays[k], None, specs[k]) for k in specs}
        rows = {len(x) for x in recorded_S.values()}
        rule = f"observations must have a row for each of {steps} steps, and a last one"
        require(rows in ({steps}, {steps + 1}), f"{rule}, got {rows}.")
        if rows == {steps}:
            recorded_S = {key: torch.cat([x, x[-1:]]) for key, x in recorded_S.items()}
        reward_L = fit("rewards", one.reward, steps, self.reward_spec)
        terminated_L = flags("terminations", one.terminated, steps)
        truncated_L = flags("truncations", one.truncated, steps)
        done_L = terminated_L | truncated_L
        over = done_L.nonzero().flatten().tolist()
        rule = "no step but the last may be terminated or truncated"
        require(over in ([], [steps - 1]), f"{rule}, got {over[:3]} of {steps}. Split it there.")
        rows_S = TensorDict({key: recorded_S.pop(key) for key in self.given}, [steps + 1])
        # Nothing reads the last row's action and the first row's reward.
        rows_S[self.action_key] = torch.cat([action_L, action_L[-1:]])
        rows_S[self.reward_key] = torch.cat([reward_L[:1], reward_L])
        for key, flag_L in zip(FLAGS, (done_L, terminated_L, truncated_L), strict=True):
            rows_S[key] = torch.cat([flag_L.new_zeros(1), flag_L]).unsqueeze(-1)
        return RecordedTrial(rows_S, recorded_S, *self._start(recorded_S), rows != {steps})

    def _action(self, trajectory: Trajectory) -> Tensor:
        form, space, given = trajectory.action_form, self.space, trajectory.action
        if form == "policy" or (form == "env" and self._bounds is None):
            return fit("actions", given, None, space)
        if form == "vector":
            x = fit("actions", given, None, Unbounded((space.size,)))
            action_L, is_right_L = space.from_vector(x), self._is_action(x)
        else:
            low, high = self._bounds
            x = fit("actions", given, None, Unbounded(space.shape, dtype=torch.float64))
            action_L = ((x - (high + low) / 2) / ((high - low) / 2)).to(space.dtype)
            is_right_L = space.contains(action_L)
        require_steps("actions", x, is_right_L)
        return action_L

    def _is_action(self, vector_LA: Tensor) -> Tensor:
        action_L = self.space.from_vector(vector_LA)
        is_same_L = (self.space.to_vector(action_L) - vector_LA).abs().amax(-1) < 1e-6
        return is_same_L & self.space.contains(action_L)

    def _start(self, recorded_S: dict[NestedKey, Tensor]) -> tuple[bool, bool]:
        """Return whether the data mark episodes, and whether they begin in mid-trial."""
        action_key, time_key = self.previous.prev_action_key, self.previous.time_idx_key
        action_A = recorded_S.get(action_key, torch.zeros(1, self.space.size))[:1]
        is_possible = self._is_action(action_A) | (action_A == 0).all()
        require_steps(f"observations {action_key!r}", action_A, is_possible)
        time_S = recorded_S.get(time_key, torch.zeros(1)).flatten()
        require_steps(f"observations {time_key!r}", time_S, time_S >= 0)
        soft_reset_S = recorded_S.get(self.trial.soft_reset_key)
        is_fragment = bool(time_S[0]) or (soft_reset_S is not None and not bool(soft_reset_S[0]))
        if is_fragment:
            unread = self.trial.time_idx_key if self.trial.horizon is None else None
            needed = [x for x in self.trial.out_keys if x in self.written and x != unread]
            remedy = "They follow from the trial's beginning: add them, or leave it out."
            require_names("observations of a fragment of a trial", needed, recorded_S, remedy)
        return soft_reset_S is not None, is_fragment


def require(is_right: bool, problem: str) -> None:
    """Raise TrajectoryError unless a rule holds."""
    if not is_right:
        raise TrajectoryError(problem)


def require_names(name: str, needed: Sequence[Any], names: Collection[Any], remedy: str) -> None:
    """Raise unless all needed names are there."""
    if missing := [one for one in needed if one not in names]:
        require(False, f"{name} must hold {needed}, got {[*names]} without {missing}. {remedy}")


def require_steps(name: str, x: Tensor, is_right_L: Tensor) -> None:
    """Raise unless a rule holds at every step."""
    if not is_right_L.all():
        wrong = (~is_right_L).nonzero().flatten().tolist()
        got = f"{len(wrong)} of {len(x)} aren't, the first at step {wrong[0]}"
        rule = f"{name} must be finite numbers in the environment's space, and {got}"
        require(False, f"{rule}: {str(x[wrong[0]].tolist())[:80]}. Clip or encode them.")


def flags(name: str, array: Any, steps: int | None = None) -> Tensor:
    """Convert zeros and ones ``[L]`` or ``[L, 1]`` to a bool tensor ``[L]``."""
    return fit(name, array, steps, Unbounded((), dtype=torch.bool))


def fit(name: str, array: Any, rows: int | None, spec: TensorSpec | ActionSpace) -> Tensor:
    """Convert an array to ``[rows, *spec.shape]`` of the spec's dtype.

    Floats may be rounded, dimensions of size 1 come and go, and indices become one-hot if the spec
    is; other changes raise TrajectoryError.
    """
    try:
        if not isinstance(array, Tensor):
            array = np.asarray(array)
            # Copied, in this machine's byte order: files are read-only and may have the other.
            array = torch.from_numpy(array.astype(array.dtype.newbyteorder("="), order="C"))
    except (TypeError, ValueError) as error:
        raise TrajectoryError(f"{name} must be one array of numbers ({error}).") from error
    x = given = array.detach().cpu()
    rows = rows or (len(x) if x.ndim else 1)
    if isinstance(spec, Categorical | OneHot | Binary):
        spec = ActionSpace.from_spec(spec)
    is_space = isinstance(spec, ActionSpace)
    if is_space and spec.one_hot and x.numel() == rows * len(spec.sizes):
        indices = replace(spec, shape=(len(spec.sizes),), dtype=torch.int64, one_hot=False)
        x = action_space.one_hot_parts(fit(name, x, rows, indices), spec.sizes)
    shape = torch.Size([rows, *spec.shape])
    got, wanted = ([n for n in one[1:] if n != 1] for one in (x.shape, shape))
    is_alike = x.shape[:1] == shape[:1] and rows > 0 and got == wanted
    require(is_alike, f"{name} must have the shape {[*shape]}, got {[*given.shape]}.")
    x = x.reshape(shape)
    y = x.to(spec.dtype)
    is_right = x.isfinite() & y.isfinite()
    if x.dtype != y.dtype and not (x.is_floating_point() and y.is_floating_point()):
        # There and back alone would miss a lost sign, and float64 alone the last digits of int64.
        is_right &= (y.to(x.dtype) == x) & (y.double() == x.double())
    is_right_L = is_right.reshape(rows, -1).all(-1)
    require_steps(name, given, is_right_L & spec.contains(y) if is_space else is_right_L)
    return y
