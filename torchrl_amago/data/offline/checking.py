"""Trajectories checked against an environment: entries, shapes, dtypes, spaces, ends.

Legend: L steps, S = L + 1 rows (the last one is what the last step led to), A action size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import NestedKey, TensorDict
from torch import Tensor
from torchrl.data import Binary, Categorical, Composite, OneHot, TensorSpec
from torchrl.envs import EnvBase, InitTracker, TransformedEnv
from torchrl.envs.batched_envs import BatchedEnvBase

from torchrl_amago import keys
from torchrl_amago.action_space import (
    ActionSpace,
    is_finitely_bounded,
    is_in_policy_scale,
    one_hot_parts,
)
from torchrl_amago.data.offline.trajectory import (
    Trajectory,
    TrajectoryError,
    as_trajectory,
    cast,
    check_steps,
    flags,
    numbers,
    require,
    reshape,
)
from torchrl_amago.envs.transforms import PreviousStepTransform, TrialTransform
from torchrl_amago.envs.transforms.repeat import first_worker

_REPLAYED = (TrialTransform, PreviousStepTransform, InitTracker)


class CheckedTrajectory(NamedTuple):
    """A trajectory as tensors of an environment.

    A row has an observation, the action taken there, and reward and ends of the step that led there.
    """

    rows_S: TensorDict
    held_S: dict[NestedKey, Tensor]  # entries of the replayed transforms that the data hold
    is_trial: bool  # a whole one or a piece of one, which says where attempts begin
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
        self.space = ActionSpace.from_spec(self.action_spec)
        self.transforms: list[TrialTransform | PreviousStepTransform | InitTracker] = []
        while isinstance(env, TransformedEnv | BatchedEnvBase):
            if isinstance(env, TransformedEnv):  # with those of nested Composes
                inner = [one for one in env.transform.modules() if isinstance(one, _REPLAYED)]
                self.transforms[:0] = inner
            env = env.base_env if isinstance(env, TransformedEnv) else first_worker(env)
        own = env.full_action_spec_unbatched[env.action_keys[0]].to("cpu")
        is_scaled = is_finitely_bounded(own) and not is_in_policy_scale(own)
        self._bounds = (own.low, own.high) if is_scaled else None
        written = {key for one in self.transforms for key in one.out_keys}
        self.written = [key for key in self.specs if key in written]
        self.given = [key for key in self.specs if key not in written]
        self.recorded_specs = (
            Composite({key: self.specs[key] for key in self.given}),
            Composite({self.action_key: self.action_spec}),
            Composite({self.reward_key: self.reward_spec}),
        )
        # Without a trial transform, a trial is an attempt.
        self.rule, self.previous = TrialTransform(1, trial_end="attempt"), PreviousStepTransform()
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
        ends = {
            "terminated": flags("terminations", one.terminated, steps),
            "truncated": flags("truncations", one.truncated, steps),
        }
        ends["done"] = ends["terminated"] | ends["truncated"]
        over = ends["done"].nonzero().reshape(-1).tolist()
        if over != [steps - 1]:
            raise TrajectoryError(
                f"its last step, and no other, must be terminated or truncated, got steps {over[:3]} "
                f"of {steps}. Split it where it ends, and mark it as truncated where it was cut off."
            )
        for key, flag_L in ends.items():
            rows_S[key] = torch.cat([flag_L.new_zeros(1), flag_L]).unsqueeze(-1)
        return CheckedTrajectory(
            rows_S, held_S, *self._beginning(held_S), one.is_cut, one.last_is_stand_in
        )

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
            check_space("actions", given, self._is_action(vector_LA))
            return space.from_vector(vector_LA)
        if form == "policy" or self._bounds is None:
            return fit("actions", given, len(given), space)
        low, high = self._bounds
        action_L = reshape("actions", given, (len(given), *space.shape))
        action_L = (action_L - (high + low) / 2) / ((high - low) / 2)
        check_space("actions", given, space.contains(action_L))
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
        """Whether a trajectory says where attempts begin, and whether it begins in mid-trial."""
        name, starts_S = self.previous.prev_action_key, held_S.get(self.rule.soft_reset_key)
        action_A = held_S.get(name, torch.zeros(1, self.space.size))[:1]
        is_possible = self._is_action(action_A) | (action_A == 0).all()
        check_space(f"observations {name!r}", action_A, is_possible)
        time_S = held_S.get(self.previous.time_idx_key, torch.zeros(1)).reshape(-1)
        check_space(f"observations {self.previous.time_idx_key!r}", time_S, time_S >= 0)
        is_fragment = bool(time_S[0]) or (starts_S is not None and not bool(starts_S[0]))
        if is_fragment:
            needed = [key for key in self.rule.out_keys if key in self.written]
            remedy = "They follow from the trial's beginning: add them, or leave it out."
            require("observations of a fragment of a trial", needed, held_S, remedy)
        return starts_S is not None, is_fragment


def fit(name: str, array: Any, rows: int, spec: TensorSpec | ActionSpace) -> Tensor:
    """Convert an array to a tensor ``[rows, *spec.shape]`` of the spec's dtype.

    Numbers must be finite, categories and bits possible. Indices become one-hot where the spec is,
    floating-point numbers are rounded, dimensions of size 1 come and go; nothing else changes.
    """
    x = given = numbers(name, array)
    if isinstance(spec, Categorical | OneHot | Binary):
        spec = ActionSpace.from_spec(spec)
    is_space = isinstance(spec, ActionSpace)
    if is_space and spec.one_hot and x.numel() == rows * len(spec.sizes):
        index = cast(name, x, torch.int64).reshape(rows, len(spec.sizes))
        check_space(name, given, ((index >= 0) & (index < torch.tensor(spec.sizes))).all(-1))
        x = one_hot_parts(index, spec.sizes)
    x = cast(name, reshape(name, x, (rows, *spec.shape)), spec.dtype)
    if is_space:
        check_space(name, given, spec.contains(x))
    return x


def check_space(name: str, given: Tensor, is_possible: Tensor) -> None:
    """Raise unless all rows of an array are in the environment's space."""
    rule = f"{name} must be in the environment's space"
    check_steps(rule, given, is_possible, "Clip or encode them.")
