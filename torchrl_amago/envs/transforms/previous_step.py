"""The previous action and reward as inputs of the agent, and the time in the trial.

An agent that adapts must know which action led to which reward. Both are put into the next step's
tensordict, in a form that networks read, and zeroed only when a trial begins.
"""

from __future__ import annotations

from typing import NoReturn

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase, Transform

from torchrl_amago import keys
from torchrl_amago.action_space import ActionSpace, is_finitely_bounded

__all__ = ["PreviousStepTransform"]

# Between the inverse pass of `step`, which sees the action as the policy chose it, and `_step`,
# which sees it as other transforms have changed it for the base environment.
_TAKEN_ACTION = "_taken_action"


class PreviousStepTransform(Transform):
    """Writes the previous action, the previous reward and the time index of each step.

    All are zero at the start of a trial (at every reset that reaches this transform) and untouched
    by the soft resets of a :class:`TrialTransform` before it. ``next`` of step t equals the root
    of step t+1 within a trial.

    =============== ========= =================== ================================================
    key             dtype     shape               value
    =============== ========= =================== ================================================
    ``prev_action`` float32   ``[*B, A]``         one-hot for ``Categorical`` and ``OneHot``,
                                                  concatenated one-hots for their ``Multi`` kinds,
                                                  0 and 1 for ``Binary``; continuous actions
                                                  scaled to [-1, 1] where both bounds are finite,
                                                  else as they are
    ``prev_reward`` float32   ``[*B, 1]``         reward of the previous step
    ``time_idx``    int64     ``[*B, 1]``         steps since the trial began, from 0
    =============== ========= =================== ================================================

    The action is the one seen from here: changes that earlier transforms make to it for the base
    environment are not included.

    Args:
        action_key: action to read; None for the environment's only one.
        reward_key: reward to read.
        prev_action_key: where to write; likewise ``prev_reward_key`` and ``time_idx_key``.

    Raises:
        ValueError: once the transform is used, if the action space isn't one of the above.
        RuntimeError: if it is called outside of an environment, as in a replay buffer.

    Examples:
        >>> from torchrl.envs import TransformedEnv
        >>> from torchrl_amago.envs.tasks import MetaFrozenLake
        >>> from torchrl_amago.envs.transforms import PreviousStepTransform
        >>> lake = MetaFrozenLake(batch_size=[4], recover_mode=True)
        >>> env = TransformedEnv(lake, PreviousStepTransform())
        >>> steps = env.rollout(3, break_when_any_done=False)
        >>> steps["prev_action"].shape, steps["time_idx"][0].flatten().tolist()
        (torch.Size([4, 3, 5]), [0, 1, 2])
    """

    def __init__(
        self,
        *,
        action_key: NestedKey | None = None,
        reward_key: NestedKey = "reward",
        prev_action_key: NestedKey = keys.PREV_ACTION,
        prev_reward_key: NestedKey = keys.PREV_REWARD,
        time_idx_key: NestedKey = keys.TIME_IDX,
    ) -> None:
        super().__init__(in_keys=[], out_keys=[prev_action_key, prev_reward_key, time_idx_key])
        self.action_key = action_key
        self.reward_key = reward_key
        self.prev_action_key = prev_action_key
        self.prev_reward_key = prev_reward_key
        self.time_idx_key = time_idx_key
        self._set_up: tuple | None = None

    # ------------------------------------------------------------ life in an env

    def set_container(self, container: Transform | EnvBase) -> None:
        self._set_up = None
        super().set_container(container)

    def empty_cache(self) -> None:
        self._set_up = None
        super().empty_cache()

    def __getstate__(self) -> dict:
        # Derived from the environment, and the encoder's functions cannot be pickled.
        return {**super().__getstate__(), "_set_up": None}

    def _get_set_up(self) -> tuple[NestedKey, ActionEncoder, Composite]:
        """The action's key and encoder, and the specs: read from the environment once."""
        if self._set_up is None:
            env = self.parent
            if env is None:
                raise_outside_env(self)
            key = self._find_action_key(env)
            encoder = ActionEncoder(env.full_action_spec_unbatched[key], env.batch_size)
            time = Unbounded(shape=(*env.batch_size, 1), dtype=torch.int64, device=env.device)
            reward_shape = env.full_reward_spec[self.reward_key].shape
            specs = {
                self.prev_action_key: encoder.spec(env.device),
                self.prev_reward_key: Unbounded(shape=reward_shape, device=env.device),
                self.time_idx_key: time,
            }
            self._set_up = (key, encoder, specs)
        return self._set_up

    def _find_action_key(self, env: EnvBase) -> NestedKey:
        if self.action_key is not None:
            return self.action_key
        if len(env.action_keys) != 1:
            raise ValueError(
                f"PreviousStepTransform reads one action, got {env.action_keys}. "
                "Name the one to read with action_key=."
            )
        return env.action_keys[0]

    # ----------------------------------------------------------------- stepping

    def _call(self, next_tensordict: TensorDictBase) -> NoReturn:
        raise_outside_env(self)

    forward = _call

    def _reset(
        self, tensordict: TensorDictBase, tensordict_reset: TensorDictBase
    ) -> TensorDictBase:
        for key, spec in self._get_set_up()[2].items():
            # Rows that are not reset are dropped by the caller.
            tensordict_reset.set(key, spec.zero())
        return tensordict_reset

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        action_key, encoder, _ = self._get_set_up()
        return tensordict.set(_TAKEN_ACTION, encoder(tensordict.get(action_key)))

    def _step(self, tensordict: TensorDictBase, next_tensordict: TensorDictBase) -> TensorDictBase:
        time_idx = tensordict.get(self.time_idx_key, None)
        if time_idx is None:
            raise KeyError(
                f"a step needs the entry {self.time_idx_key!r} that reset or the previous step "
                f"wrote, got {sorted(map(str, tensordict.keys()))}. Pass on the tensordict of "
                "env.reset() or step_mdp(...), not a new one."
            )
        written = {
            self.prev_action_key: tensordict.get(_TAKEN_ACTION),
            self.prev_reward_key: next_tensordict.get(self.reward_key).to(torch.float32, copy=True),
            self.time_idx_key: time_idx + 1,
        }
        stepped = tensordict.get("_step", None)
        for key, value in written.items():
            if stepped is not None:
                # Rows that skip this step (`break_when_all_done`) stay as they were.
                rows = stepped.view(time_idx.shape)
                value = torch.where(rows, value, tensordict.get(key))
            next_tensordict.set(key, value)
        return next_tensordict

    # -------------------------------------------------------------------- specs

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        for key, spec in self._get_set_up()[2].items():
            if key in observation_spec.keys(True, True):
                raise ValueError(
                    f"PreviousStepTransform writes {key!r}, but the environment already has that "
                    "entry. Give the transform another key, or remove a second one."
                )
            observation_spec[key] = spec.clone()
        return observation_spec

    def transform_state_spec(self, state_spec: Composite) -> Composite:
        state_spec[self.time_idx_key] = self._get_set_up()[2][self.time_idx_key].clone()
        return state_spec


class ActionEncoder:
    """Turns actions into float32 vectors ``[*B, A]``, continuous ones scaled by their bounds.

    Args:
        action_spec: the action's spec, without batch dimensions.
        batch_size: the environment's batch size.

    Raises:
        ValueError: if the action space is not supported.
    """

    def __init__(self, action_spec: TensorSpec, batch_size: torch.Size) -> None:
        self.space = ActionSpace.from_spec(action_spec, check_bounds=False)
        self.shape = (*batch_size, *self.space.shape)
        self.batch_size = torch.Size(batch_size)
        is_continuous = self.space.kind == "continuous"
        self.has_bounds = not is_continuous or is_finitely_bounded(action_spec)
        self.center = self.half_width = None
        if is_continuous and isinstance(action_spec, Bounded):
            self.center, self.half_width = _center_and_half_width(action_spec)

    def __call__(self, action: Tensor) -> Tensor:
        action = action.reshape(self.shape)
        if self.center is not None:
            action = (action - self.center) / self.half_width
        return self.space.to_vector(action)

    def spec(self, device: torch.device | None) -> TensorSpec:
        """The spec of what is written."""
        shape = (*self.batch_size, self.space.size)
        if not self.has_bounds:
            return Unbounded(shape=shape, device=device)
        low = -1.0 if self.space.kind == "continuous" else 0.0
        return Bounded(low, 1.0, shape=shape, device=device)


def raise_outside_env(transform: Transform) -> NoReturn:
    """Say where a transform that follows an environment's steps belongs.

    Raises:
        RuntimeError: always.
    """
    name = type(transform).__name__
    raise RuntimeError(
        f"{name} must be in an environment, whose steps it follows, and was called outside of one, as "
        "by a replay buffer or in a module. Put it into the environment that is collected from "
        "(make_trial_env); what is collected then holds its entries. load_trials gives them to "
        "recorded data."
    )


def _center_and_half_width(spec: Bounded) -> tuple[Tensor, Tensor]:
    """Shift and divisor of bounded numbers: 0 and 1 for those without both bounds."""
    low, high = spec.low / 2, spec.high / 2  # halved first: their difference could overflow
    largest = torch.finfo(spec.dtype).max / 2
    is_finite = (low > -largest) & (high < largest)
    center = torch.where(is_finite, high + low, 0.0)
    return center, torch.where(is_finite & (high > low), high - low, 1.0)
