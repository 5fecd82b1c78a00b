"""Trajectories in a plain form, and checked against an environment as tensors.

Legend: L steps, S = L + 1 rows (the last one is what the last step led to), A action size. ``name`` is
what messages call an array.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from numpy.typing import ArrayLike
from tensordict import NestedKey, TensorDict, TensorDictBase, is_tensor_collection, unravel_key
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, OneHot, TensorSpec
from torchrl.envs import EnvBase, InitTracker, TransformedEnv
from torchrl.envs.batched_envs import BatchedEnvBase

from torchrl_amago import action_space, keys
from torchrl_amago.envs.transforms import PreviousStepTransform, TrialTransform
from torchrl_amago.envs.transforms.repeat import first_worker

ActionForm = Literal["env", "policy", "vector"]

# Names of a trajectory's arrays in a mapping; Minari's.
_ARRAYS = ("observations", "actions", "rewards", "terminations", "truncations")
_SPACE = "in the environment's space"
_REPLAYED = (TrialTransform, PreviousStepTransform, InitTracker)


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
        is_cut: whether the episode goes on where the data end; False for a time limit of its own.
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
        known = "a Trajectory, a mapping of arrays or a tensordict of steps"
        raise TrajectoryError(f"it must be {known}, got a {type(item).__name__}. Use a reader.")
    require("a mapping", _ARRAYS, item, "Rename its arrays; read_d4rl knows other names.")
    return Trajectory(*(item[name] for name in _ARRAYS))


def _flat(observation: Any, prefix: NestedKey = ()) -> dict[NestedKey, ArrayLike]:
    if not isinstance(observation, Mapping):
        return {unravel_key(prefix or "observation"): observation}
    parts = [_flat(x, (*prefix, name)) for name, x in observation.items()]
    return {key: x for part in parts for key, x in part.items()}


def _from_steps(steps: TensorDictBase, action_key: NestedKey, reward_key: NestedKey) -> Trajectory:
    if steps.ndim != 1:
        got = f"must have one dimension, got {list(steps.shape)}"
        raise TrajectoryError(f"a tensordict of steps {got}. Give the trajectories one by one.")
    needed = [action_key, unravel_key(("next", reward_key)), ("next", "done")]
    remedy = "Rename its entries, or give read_torchrl their action_key and reward_key."
    require("a tensordict of steps", needed, [*steps.keys(True)], remedy)
    after, observation = steps["next"], {}
    for key in after.exclude("done", "terminated", "truncated", reward_key).keys(True, True):
        x, y = steps.get(key, None), after.get(key)
        if x is None or is_tensor_collection(x):
            continue
        is_alike = x.shape == y.shape and x.dtype == y.dtype
        # NaN equals NaN, since another message is for those.
        if not (is_alike and x[1:].isclose(y[:-1], 0, 0, equal_nan=True).all()):
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


class CheckedTrajectory(NamedTuple):
    """A trajectory as tensors of an environment.

    A row has an observation, the action taken there, and reward and ends of the step that led there.
    """

    rows_S: TensorDict
    held_S: dict[NestedKey, Tensor]  # entries of the replayed transforms that the data hold
    is_trial: bool  # a whole one or a piece of one, which says where episodes begin
    is_fragment: bool  # it begins in mid-trial
    is_cut: bool
    last_is_stand_in: bool


class TrajectoryChecker:
    """The entries of an environment's steps: those that data hold, and those that transforms write.

    The transforms are :class:`TrialTransform`, :class:`PreviousStepTransform` and ``InitTracker``;
    data are taken to be as all others have made them, and workers of a batched environment to be alike.

    Args:
        env: such as :func:`make_trial_env` makes.

    Raises:
        ValueError: for several actions or rewards, or an action space that isn't supported.
    """

    def __init__(self, env: EnvBase) -> None:
        if len(env.action_keys) != 1 or len(env.reward_keys) != 1:
            raise ValueError(
                f"offline data have one action and one reward, got {env.action_keys} and "
                f"{env.reward_keys}. Join them with a transform of the environment."
            )
        # Data are read on the CPU, wherever the environment is.
        self.action_key, self.reward_key = env.action_keys[0], env.reward_keys[0]
        self.action_spec = env.full_action_spec_unbatched[self.action_key].to("cpu")
        self.reward_spec = env.full_reward_spec_unbatched[self.reward_key].to("cpu")
        specs = env.full_observation_spec_unbatched.to("cpu")
        self.specs = {key: specs[key] for key in specs.keys(True, True)}
        self.space = action_space.ActionSpace.from_spec(self.action_spec)
        self.transforms: list[TrialTransform | PreviousStepTransform | InitTracker] = []
        while isinstance(env, TransformedEnv | BatchedEnvBase):
            if isinstance(env, TransformedEnv):  # with those of nested Composes
                inner = [one for one in env.transform.modules() if isinstance(one, _REPLAYED)]
                self.transforms[:0] = inner
            env = env.base_env if isinstance(env, TransformedEnv) else first_worker(env)
        own = env.full_action_spec_unbatched[env.action_keys[0]].to("cpu")
        is_scaled = action_space.is_finitely_bounded(own) and not action_space.is_in_policy_scale(
            own
        )
        self._bounds = (own.low, own.high) if is_scaled else None
        written = {key for one in self.transforms for key in one.out_keys}
        self.written = [key for key in self.specs if key in written]
        self.given = [key for key in self.specs if key not in written]
        self.recorded_specs = (
            Composite({key: self.specs[key] for key in self.given}),
            Composite({self.action_key: self.action_spec}),
            Composite({self.reward_key: self.reward_spec}),
        )
        # Without a trial transform, a trial is an episode.
        self.rule, self.previous = TrialTransform(1, trial_end="episode"), PreviousStepTransform()
        for one in self.transforms:
            self.rule = one if isinstance(one, TrialTransform) else self.rule
            self.previous = one if isinstance(one, PreviousStepTransform) else self.previous

    def check(self, item: Any) -> CheckedTrajectory:
        """Convert a trajectory of any kind (see :func:`as_trajectory`).

        Raises:
            TrajectoryError: for anything that an agent couldn't be trained on.
        """
        one = as_trajectory(item, self.action_key, self.reward_key)
        action_L = self._action(one)
        steps = len(action_L)
        held_S = self._observation(one, steps + 1)
        reward_L = fit("rewards", one.reward, steps, self.reward_spec)
        rows_S = TensorDict({key: held_S.pop(key) for key in self.given}, [steps + 1])
        # The last row's action and the first row's reward are never seen.
        rows_S[self.action_key] = torch.cat([action_L, action_L[-1:]])
        rows_S[self.reward_key] = torch.cat([reward_L[:1], reward_L])
        terminated = flags("terminations", one.terminated, steps)
        truncated = flags("truncations", one.truncated, steps)
        over = (terminated | truncated).nonzero().reshape(-1).tolist()
        if over != [steps - 1]:
            raise TrajectoryError(
                f"its last step, and no other, must be terminated or truncated, got steps {over[:3]} "
                f"of {steps}. Split it where it ends, and mark it as truncated where it was cut off."
            )
        is_last_S1 = (torch.arange(steps + 1) == steps).unsqueeze(-1)
        rows_S["done"], rows_S["terminated"] = is_last_S1, is_last_S1 & terminated[-1]
        rows_S["truncated"] = is_last_S1 & truncated[-1]
        end = one.is_cut, one.last_is_stand_in
        return CheckedTrajectory(rows_S, held_S, *self._beginning(held_S), *end)

    def _action(self, trajectory: Trajectory) -> Tensor:
        form, space, given = (
            trajectory.action_form,
            self.space,
            numbers("actions", trajectory.action),
        )
        if not len(given):
            raise TrajectoryError("it must have at least one step, got none. Leave it out.")
        if form == "vector":
            vector_LA = reshape("actions", given, (len(given), space.size)).float()
            check_steps("actions", _SPACE, given, self._is_action(vector_LA))
            return space.from_vector(vector_LA)
        if form == "policy" or self._bounds is None:
            return fit("actions", given, len(given), space)
        low, high = self._bounds
        action_L = reshape("actions", given, (len(given), *space.shape))
        action_L = (action_L - (high + low) / 2) / ((high - low) / 2)
        check_steps("actions", _SPACE, given, space.contains(action_L))
        return action_L.to(space.dtype)

    def _is_action(self, vector_LA: Tensor) -> Tensor:
        """Whether there is an action of each vector, bool ``[L]``."""
        action_L = self.space.from_vector(vector_LA)
        is_same_L = (self.space.to_vector(action_L) - vector_LA).abs().amax(-1) < 1e-6
        return is_same_L & self.space.contains(action_L)

    def _observation(self, trajectory: Trajectory, rows: int) -> dict[NestedKey, Tensor]:
        held = dict(trajectory.observation)
        if len(self.given) == 1 and keys.OBSERVATION in held:
            held.setdefault(self.given[0], held[keys.OBSERVATION])  # whatever it is called
        require("observations", self.given, held, "Name them as the environment does.")
        specs = {key: spec for key, spec in self.specs.items() if key in held}
        return {key: fit(f"observations {key!r}", held[key], rows, specs[key]) for key in specs}

    def _beginning(self, held_S: dict[NestedKey, Tensor]) -> tuple[bool, bool]:
        """Whether a trajectory says where episodes begin, and whether it begins in mid-trial."""
        name, starts_S = self.previous.prev_action_key, held_S.get(self.rule.soft_reset_key)
        action_A = held_S.get(name, torch.zeros(1, self.space.size))[:1]
        is_possible = self._is_action(action_A) | (action_A == 0).all()
        check_steps(f"observations {name!r}", _SPACE, action_A, is_possible)
        time_S = held_S.get(self.previous.time_idx_key, torch.zeros(1)).reshape(-1)
        check_steps(f"observations {self.previous.time_idx_key!r}", _SPACE, time_S, time_S >= 0)
        is_fragment = bool(time_S[0]) or (starts_S is not None and not bool(starts_S[0]))
        if is_fragment:
            needed = [key for key in self.rule.out_keys if key in self.written]
            if self.rule.horizon is None and self.rule.time_idx_key in needed:
                needed.remove(self.rule.time_idx_key)
            remedy = "They follow from the trial's beginning: add them, or leave it out."
            require("observations of a fragment of a trial", needed, held_S, remedy)
        return starts_S is not None, is_fragment


def require(name: str, needed: Sequence[Any], held: Collection[Any], remedy: str) -> None:
    """Raise unless all of some names are held."""
    if missing := [one for one in needed if one not in held]:
        raise TrajectoryError(
            f"{name} must hold {needed}, got {[*held]} without {missing}. {remedy}"
        )


def check_steps(name: str, rule: str, x: Tensor, is_right: Tensor) -> None:
    """Raise unless a rule holds at every step."""
    if wrong := (~is_right).nonzero()[:, 0].unique().tolist():
        got = f"{len(wrong)} of {len(x)} aren't, the first at step {wrong[0]}"
        value = str(x[wrong[0]].tolist())[:80]
        raise TrajectoryError(f"{name} must be {rule}, and {got}: {value}. Clip or encode them.")


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
    check_steps(name, "finite", x, x.isfinite())
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
        got = "{} between {:.8g} and {:.8g}".format(x.dtype, *x.double().aminmax())
        raise TrajectoryError(
            f"{name} must be numbers that {dtype} can hold, got {got}. Cast them."
        )
    return y


def flags(name: str, array: Any, steps: int | None = None) -> Tensor:
    """Convert an array ``[N]`` or ``[N, 1]`` of zeros and ones to a bool tensor ``[N]``."""
    x = numbers(name, array)
    return cast(name, reshape(name, x, (len(x) if steps is None else steps,)), torch.bool)


def fit(name: str, array: Any, rows: int, spec: TensorSpec | action_space.ActionSpace) -> Tensor:
    """Convert an array to a tensor ``[rows, *spec.shape]`` of the spec's dtype.

    Numbers must be finite, categories and bits possible. Indices become one-hot where the spec is,
    floating-point numbers are rounded, dimensions of size 1 come and go; nothing else changes.
    """
    x = given = numbers(name, array)
    if isinstance(spec, Categorical | OneHot | Binary):
        spec = action_space.ActionSpace.from_spec(spec)
    is_space = isinstance(spec, action_space.ActionSpace)
    if is_space and spec.one_hot and x.numel() == rows * len(spec.sizes):
        index = cast(name, x, torch.int64).reshape(rows, len(spec.sizes))
        check_steps(
            name, _SPACE, given, ((index >= 0) & (index < torch.tensor(spec.sizes))).all(-1)
        )
        x = action_space.one_hot_parts(index, spec.sizes)
    x = cast(name, reshape(name, x, (rows, *spec.shape)), spec.dtype)
    if is_space:
        check_steps(name, _SPACE, given, spec.contains(x))
    return x
