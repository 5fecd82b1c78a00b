"""What a collector writes in an environment, and trajectories checked against it.

Legend: L steps of a trial, S = L + 1 rows (the last one is what the last step led to), A action size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from tensordict import NestedKey
from torch import Tensor
from torchrl.data import Composite, TensorSpec, Unbounded
from torchrl.envs import Compose, EnvBase, InitTracker, Transform, TransformedEnv
from torchrl.envs.batched_envs import BatchedEnvBase

from torchrl_amago import keys
from torchrl_amago.action_space import (
    ActionSpace,
    is_finitely_bounded,
    is_in_policy_scale,
    one_hot_parts,
)
from torchrl_amago.data.offline.arrays import (
    cast,
    cast_whole,
    check_all,
    count,
    ends,
    fit,
    number,
    numbers,
    reshape,
)
from torchrl_amago.data.offline.trajectory import (
    ActionForm,
    Trajectory,
    TrajectoryError,
    as_trajectory,
)
from torchrl_amago.envs.transforms import PreviousStepTransform, TrialTransform
from torchrl_amago.envs.transforms.repeat import first_worker
from torchrl_amago.envs.transforms.trial import TrialEnd

TRIAL_ENTRIES = (
    keys.SOFT_RESET,
    keys.EPISODE_IDX,
    keys.ATTEMPT_RETURN,
    keys.TRIAL_STEP,
    keys.TRIAL_PROGRESS,
)
_STEP_ENTRIES = (keys.PREV_ACTION, keys.PREV_REWARD, keys.TIME_IDX, keys.IS_INIT)


class TrialRule(NamedTuple):
    """When a trial is over, and with which flag: arguments of :class:`TrialTransform`.

    Example:
        >>> TrialRule(episodes=5, trial_end="terminated").horizon is None
        True
    """

    episodes: int | None = 1
    horizon: int | None = None
    trial_end: TrialEnd = "attempt"


class Attempt(NamedTuple):
    """One trajectory, checked: tensors of the right shapes and dtypes, actions as a policy gives them."""

    observation_S: dict[NestedKey, Tensor]
    action_L: Tensor
    reward_L: Tensor
    terminated: bool
    truncated: bool
    first_time: int
    first_prev_action_A: Tensor
    first_prev_reward: float
    is_cut: bool
    last_is_stand_in: bool


class TrialSchema:
    """The entries of a collected step: which must come from data, and how the others follow.

    Args:
        observation_spec: of one environment, without batch dimensions: the task's own entries, and
            those of the trial and of the previous step that are to be written.
        action_spec: of the policy's actions, likewise.
        env_action_spec: of the actions under all transforms; default ``action_spec``. Where the bounds
            of both differ, the data's actions are scaled.
        reward_spec: of one reward.
        rule: when a trial is over; None leaves ends as the data have them.
        action_key: of the action.
        reward_key: of the reward under ``next``.
        names: key of each entry that follows from others, by its key in :mod:`torchrl_amago.keys`;
            default: all of them, under those keys.

    Raises:
        ValueError: for an action space that isn't supported.

    Example:
        >>> from torchrl.data import Bounded
        >>> specs = {"observation": Unbounded((3,)), "prev_reward": Unbounded((1,))}
        >>> schema = TrialSchema(Composite(specs), Bounded(-1.0, 1.0, (1,)))
        >>> attempt = schema.check(Trajectory(
        ...     torch.zeros(3, 3), torch.ones(2, 1), [0.25, 1.0], [0, 1], [0, 0]))
        >>> attempt.reward_L.flatten().tolist(), attempt.terminated
        ([0.25, 1.0], True)
    """

    def __init__(
        self,
        observation_spec: Composite,
        action_spec: TensorSpec,
        *,
        env_action_spec: TensorSpec | None = None,
        reward_spec: TensorSpec | None = None,
        rule: TrialRule | None = None,
        action_key: NestedKey = keys.ACTION,
        reward_key: NestedKey = "reward",
        names: dict[str, NestedKey] | None = None,
    ) -> None:
        # Data are read on the CPU, wherever the environment is.
        observation_spec, action_spec = observation_spec.to("cpu"), action_spec.to("cpu")
        self.space = ActionSpace.from_spec(action_spec)
        self.reward_spec = Unbounded((1,)) if reward_spec is None else reward_spec.to("cpu")
        self.action_key, self.reward_key = action_key, reward_key
        self._specs = {key: observation_spec[key] for key in observation_spec.keys(True, True)}
        if names is None:
            names = {name: name for name in (*TRIAL_ENTRIES, *_STEP_ENTRIES)}
        #: Keys of the entries that can be worked out, of those that the environment has.
        self.computed = {name: key for name, key in names.items() if key in self._specs}
        #: Keys of the entries that the data must hold.
        self.given = [key for key in self._specs if key not in self.computed.values()]
        if rule is None and any(name in self.computed for name in TRIAL_ENTRIES):
            rule = TrialRule()
        self.rule = rule
        self._scale: tuple[Tensor, Tensor] | None = None
        env_spec = action_spec if env_action_spec is None else env_action_spec.to("cpu")
        if is_finitely_bounded(env_spec) and not is_in_policy_scale(env_spec):
            low, high = env_spec.low, env_spec.high
            self._scale = ((high + low) / 2, (high - low) / 2)

    @classmethod
    def from_env(cls, env: EnvBase) -> TrialSchema:
        """Read everything off an environment, such as :func:`make_trial_env` makes.

        Observations and rewards of the data must be as they are below its trial transform: what other
        transforms do to them is up to whoever reads the data. Workers of a batched environment are
        taken to be alike.

        Raises:
            ValueError: for an environment with several actions or rewards.

        Example:
            >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
            >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
            >>> TrialSchema.from_env(env).rule
            TrialRule(episodes=5, horizon=None, trial_end='terminated')
        """
        if len(env.action_keys) != 1 or len(env.reward_keys) != 1:
            raise ValueError(
                f"offline data have one action and one reward, got {env.action_keys} and "
                f"{env.reward_keys}. Join them with a transform of the environment."
            )
        action_key, reward_key = env.action_keys[0], env.reward_keys[0]
        base, transforms = _unwrap(env)
        rule, names = None, {}
        for transform in transforms:
            if isinstance(transform, TrialTransform):
                rule = TrialRule(transform.episodes, transform.horizon, transform.trial_end)
                names |= {name: getattr(transform, f"{name}_key") for name in TRIAL_ENTRIES}
            elif isinstance(transform, PreviousStepTransform):
                names[keys.PREV_ACTION] = transform.prev_action_key
                names[keys.PREV_REWARD] = transform.prev_reward_key
                names[keys.TIME_IDX] = transform.time_idx_key
            elif isinstance(transform, InitTracker):
                names[keys.IS_INIT] = transform.out_keys[0]
        return cls(
            env.full_observation_spec_unbatched,
            env.full_action_spec_unbatched[action_key],
            env_action_spec=base.full_action_spec_unbatched[base.action_keys[0]],
            reward_spec=env.full_reward_spec_unbatched[reward_key],
            rule=rule,
            action_key=action_key,
            reward_key=reward_key,
            names=names,
        )

    # -- one trajectory ------------------------------------------------------------------------

    def check(self, item: Any) -> Attempt:
        """Bring a trajectory of any kind into the environment's shapes and dtypes.

        Args:
            item: see :func:`as_trajectory`.

        Raises:
            TrajectoryError: for anything that an agent couldn't be trained on.
        """
        trajectory = as_trajectory(item, self.action_key, self.reward_key)
        action = numbers("actions", trajectory.action)
        steps = len(action)
        if not steps:
            raise TrajectoryError("it must have at least one step, got none. Leave it out.")
        return Attempt(
            self._observations(trajectory, steps + 1),
            self._actions(action, trajectory.action_form),
            fit("rewards", trajectory.reward, steps, self.reward_spec),
            *ends(trajectory, steps),
            count("first_time", trajectory.first_time),
            self._first_prev_action(trajectory),
            number("first_prev_reward", trajectory.first_prev_reward, torch.float32),
            trajectory.is_cut,
            trajectory.last_is_stand_in,
        )

    def _observations(self, trajectory: Trajectory, rows: int) -> dict[NestedKey, Tensor]:
        held = dict(trajectory.observation)
        if list(held) == [keys.OBSERVATION] and len(self.given) == 1:
            held = {self.given[0]: held[keys.OBSERVATION]}  # whatever it is called
        missing = [key for key in self.given if key not in held]
        if missing:
            raise TrajectoryError(
                f"observations must hold {self.given}, got {list(held)} without {missing}. Name "
                "them as the environment does."
            )
        wanted = [*self.given, *(key for key in self.computed.values() if key in held)]
        return {
            key: fit(f"observations {key!r}", held[key], rows, self._specs[key]) for key in wanted
        }

    def _actions(self, given: Tensor, form: ActionForm) -> Tensor:
        space, action, steps = self.space, given, len(given)
        is_possible = torch.ones(steps, dtype=torch.bool)
        if form == "vector":
            vector = reshape("actions", action, (steps, space.size)).to(torch.float32)
            action, is_possible = self._from_vector(vector)
        elif space.one_hot and action.numel() == steps * len(space.sizes):
            index = cast_whole("actions", action, torch.int64).reshape(steps, len(space.sizes))
            is_known = (index >= 0) & (index < torch.tensor(space.sizes))
            check_all("actions", index, is_known.all(-1))
            action = one_hot_parts(index, space.sizes)
        action = reshape("actions", action, (steps, *space.shape))
        if form == "env" and self._scale is not None:
            center, half_width = self._scale
            action = (action - center) / half_width
        action = cast("actions", action, space.dtype)
        check_all("actions", given, is_possible & space.contains(action))
        return action

    def _first_prev_action(self, trajectory: Trajectory) -> Tensor:
        """Vector ``[A]`` of the action before the first step; zeros where there was none."""
        name, given = "first_prev_action", trajectory.first_prev_action
        if given is None:
            return torch.zeros(self.space.size)
        vector_A = cast(name, reshape(name, numbers(name, given), [self.space.size]), torch.float32)
        _, is_possible = self._from_vector(vector_A.unsqueeze(0))
        check_all(name, vector_A.unsqueeze(0), is_possible | (vector_A == 0).all())
        return vector_A

    def _from_vector(self, vector_LA: Tensor) -> tuple[Tensor, Tensor]:
        """The actions of vectors, and which of these an action can have, bool ``[L]``."""
        action = self.space.from_vector(vector_LA)
        is_same = (self.space.to_vector(action) - vector_LA).abs().amax(-1) < 1e-6
        return action, is_same & self.space.contains(action)

    def is_whole_trial(self, attempt: Attempt) -> bool:
        """Whether a trajectory says itself where attempts begin: it isn't a part of a trial, then."""
        return self.computed.get(keys.SOFT_RESET) in attempt.observation_S


def _unwrap(env: EnvBase) -> tuple[EnvBase, list[Transform]]:
    """The environment under all transforms and workers, and the transforms, the innermost first."""
    if isinstance(env, BatchedEnvBase):
        return _unwrap(first_worker(env))
    if not isinstance(env, TransformedEnv):
        return env, []
    base, below = _unwrap(env.base_env)
    return base, [*below, *_flat(env.transform)]


def _flat(transform: Transform) -> list[Transform]:
    """The transforms of nested Composes."""
    if not isinstance(transform, Compose):
        return [transform]
    return [one for part in transform.transforms for one in _flat(part)]
