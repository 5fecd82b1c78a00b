"""The previous action and reward as inputs of the agent, and the time in the trial."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Bounded, TensorSpec, Unbounded
from torchrl.envs import EnvBase, Transform

from torchrl_amago import keys
from torchrl_amago.action_space import ActionSpace, is_finitely_bounded
from torchrl_amago.envs.transforms._step_transform import StepTransform

# Between the inverse pass of `step`, which sees the action as the policy chose it, and `_step`,
# which sees it as other transforms have changed it for the base environment.
_TAKEN_ACTION = "_taken_action"


class PreviousStepTransform(StepTransform):
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
    ``time_idx``    int64     ``[*B, 1]``         steps since the reset, unless written before
    =============== ========= =================== ================================================

    The action is the policy's own, before earlier transforms change it for the base environment.

    Args:
        action_key, reward_key: entries to read; the action's is None for the only one.
        prev_action_key, prev_reward_key, time_idx_key: entries to write.

    Raises:
        ValueError: once the transform is used, if the action space isn't one of the above.
        RuntimeError: if it is called outside of an environment, as in a replay buffer.

    Examples:
        >>> from torchrl.envs import TransformedEnv
        >>> from torchrl_amago.envs.tasks import MetaFrozenLake
        >>> env = TransformedEnv(MetaFrozenLake(batch_size=[4]), PreviousStepTransform())
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
        self.action_key, self.reward_key = action_key, reward_key
        self.prev_action_key, self.prev_reward_key = prev_action_key, prev_reward_key
        self.time_idx_key = time_idx_key
        self._set_up: tuple[NestedKey, ActionEncoder, dict[NestedKey, TensorSpec]] | None = None

    def set_container(self, container: Transform | EnvBase) -> None:
        self._set_up = None
        super().set_container(container)

    def empty_cache(self) -> None:
        self._set_up = None
        super().empty_cache()

    def _get_set_up(self) -> tuple[NestedKey, ActionEncoder, dict[NestedKey, TensorSpec]]:
        """Return the action's key and encoder, and the specs, read from the environment once."""
        if self._set_up is None:
            env = self.parent
            if env is None:
                self._raise_outside_env()
            key = env.action_key if self.action_key is None else self.action_key
            encoder = ActionEncoder(env.full_action_spec_unbatched[key], env.batch_size)
            reward_shape = env.full_reward_spec[self.reward_key].shape
            specs = {
                self.prev_action_key: encoder.spec.to(env.device) if env.device else encoder.spec,
                self.prev_reward_key: Unbounded(reward_shape, device=env.device),
            }
            if self.time_idx_key not in env.observation_spec.keys(True, True):
                where = {"shape": (*env.batch_size, 1), "device": env.device}
                specs[self.time_idx_key] = Unbounded(dtype=torch.int64, **where)
            self._set_up = (key, encoder, specs)
        return self._set_up

    def _written_specs(self) -> Mapping[NestedKey, TensorSpec]:
        return self._get_set_up()[2]

    def _state_keys(self) -> list[NestedKey]:
        return [key for key in self._written_specs() if key == self.time_idx_key]

    def _reset(self, tensordict: TensorDictBase, first: TensorDictBase) -> TensorDictBase:
        for key, spec in self._written_specs().items():
            # Rows that are not reset are dropped by the caller.
            first.set(key, spec.zero())
        return first

    def _inv_call(self, tensordict: TensorDictBase) -> TensorDictBase:
        action_key, encoder, _ = self._get_set_up()
        return tensordict.set(_TAKEN_ACTION, encoder(tensordict.get(action_key)))

    def _step(self, tensordict: TensorDictBase, after: TensorDictBase) -> TensorDictBase:
        written = {
            self.prev_action_key: tensordict.get(_TAKEN_ACTION),
            self.prev_reward_key: after.get(self.reward_key).to(torch.float32, copy=True),
        }
        if self.time_idx_key in self._written_specs():
            written[self.time_idx_key] = self._before(tensordict, self.time_idx_key) + 1
        self._write(tensordict, after, written)
        return after


class ActionEncoder:
    """Actions as float32 vectors ``[*B, A]``; ``action_spec`` is without batch dimensions."""

    def __init__(self, action_spec: TensorSpec, batch_size: torch.Size) -> None:
        self.space = ActionSpace.from_spec(action_spec, check_bounds=False)
        self.shape = (*batch_size, *self.space.shape)
        is_continuous, shape = self.space.kind == "continuous", (*batch_size, self.space.size)
        self.spec = Bounded(-1.0 if is_continuous else 0.0, 1.0, shape=shape)
        if is_continuous and not is_finitely_bounded(action_spec):
            self.spec = Unbounded(shape=shape)
        self.center = self.half_width = None
        if is_continuous and isinstance(action_spec, Bounded):
            # Halved first: their difference could overflow. Unbounded numbers stay as they are.
            low, high = action_spec.low / 2, action_spec.high / 2
            largest = torch.finfo(action_spec.dtype).max / 2
            is_finite = (low > -largest) & (high < largest)
            self.center = torch.where(is_finite, high + low, 0.0)
            self.half_width = torch.where(is_finite & (high > low), high - low, 1.0)

    def __call__(self, action: Tensor) -> Tensor:
        action = action.reshape(self.shape)
        if self.center is not None:
            action = (action - self.center) / self.half_width
        return self.space.to_vector(action)
