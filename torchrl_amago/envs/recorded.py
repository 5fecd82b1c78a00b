"""An environment that plays recorded rows."""

from __future__ import annotations

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import EnvBase

_FLAGS = ("done", "terminated", "truncated")


class RecordedEnv(EnvBase):
    """An environment that plays recorded rows and ignores the actions it is given.

    A step goes to the next row, and so does a soft reset: the row where an episode ended comes
    before the first row of the next episode. Without ``rows`` it has specs only, and a reset raises
    RuntimeError; under :func:`make_trial_env` specs are enough for policies and ``load_trials``.

    Args:
        observation_spec: without batch dimensions, like the other specs.
        action_spec: one, or a Composite of one under another key than ``"action"``.
        reward_spec: in the same form; one float32 number by default.
        rows: ``[N]``, each an observation, the action taken there, and reward and ends (``done``,
            ``terminated``, ``truncated``) of the step that led there.
        first: ``[R]``, the row that each environment of the batch begins with.

    Example:
        >>> from torchrl_amago.envs import make_trial_env
        >>> env = RecordedEnv(Composite(observation=Unbounded((3,))), Categorical(4))
        >>> make_trial_env(env, episodes=2).observation_spec["prev_action"].shape
        torch.Size([4])
    """

    repeats_task = True

    def __init__(
        self,
        observation_spec: Composite,
        action_spec: TensorSpec,
        reward_spec: TensorSpec | None = None,
        *,
        rows: TensorDict | None = None,
        first: Tensor | None = None,
    ) -> None:
        super().__init__(batch_size=() if first is None else first.shape)
        flags = {key: Categorical(2, shape=(1,), dtype=torch.bool) for key in _FLAGS}
        specs = observation_spec, action_spec, reward_spec or Unbounded((1,)), Composite(flags)
        specs = [spec.expand((*self.batch_size, *spec.shape)) for spec in specs]
        self.observation_spec, self.action_spec, self.reward_spec, self.done_spec = specs
        self._rows, self._first, self._row = rows, first, first

    def act(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the recorded actions, as a policy does."""
        return tensordict.set(self.action_key, self._rows.get(self.action_key)[self._row])

    def _reset(
        self, tensordict: TensorDictBase | None = None, repeat_task: bool = False
    ) -> TensorDictBase:
        if self._rows is None:
            raise RuntimeError("a RecordedEnv without rows has specs only. Pass rows= and first=.")
        mask = torch.ones_like(self._row, dtype=torch.bool)
        if tensordict is not None:
            mask = tensordict.get("_reset", mask).reshape(mask.shape)
        self._row = torch.where(mask, self._row + 1 if repeat_task else self._first, self._row)
        step = self._read().exclude(self.reward_key)
        return step.update({key: torch.zeros_like(step[key]) for key in _FLAGS})

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._row = self._row + 1
        return self._read()

    def _read(self) -> TensorDict:
        # Rows that are over go on with those of others until the longest is over.
        self._row = self._row.clamp(max=len(self._rows) - 1)
        return self._rows[self._row].exclude(self.action_key)

    def _set_seed(self, seed: int | None) -> None:
        """Do nothing: nothing is random."""
