"""The base of transforms that write entries at each step, and read them at the next one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from typing import Any, NoReturn

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import Composite, TensorSpec
from torchrl.envs import Transform


class StepTransform(Transform):
    """Base of transforms that follow an environment's steps, and work nowhere else."""

    @abstractmethod
    def _written_specs(self) -> Mapping[NestedKey, TensorSpec]:
        """Return the specs of the entries that this transform writes."""

    def _state_keys(self) -> list[NestedKey]:
        """Return those of the entries that the next step reads."""
        return list(self._written_specs())

    def _raise_outside_env(self, *_: Any) -> NoReturn:
        name = type(self).__name__
        raise RuntimeError(
            f"{name} must be in an environment, whose steps it follows (make_trial_env), not in a "
            "replay buffer or a module. load_trials gives its entries to recorded data."
        )

    _call = forward = _raise_outside_env

    def _before(self, tensordict: TensorDictBase, key: NestedKey) -> Tensor:
        """Return an entry that reset or the previous step wrote."""
        value = tensordict.get(key, None)
        if value is None:
            raise KeyError(
                f"a step needs the entry {key!r} that reset or the previous step wrote, got "
                f"{sorted(map(str, tensordict.keys()))}. Pass on the tensordict of env.reset()."
            )
        return value

    def _write(
        self, tensordict: TensorDictBase, after: TensorDictBase, written: Mapping[NestedKey, Tensor]
    ) -> None:
        stepped = tensordict.get("_step", None)
        for key, value in written.items():
            if stepped is not None:
                # Rows that skip this step (`break_when_all_done`) stay as they were.
                rows = stepped.view(*tensordict.batch_size, 1)
                value = torch.where(rows, value, self._before(tensordict, key))
            after.set(key, value)

    def transform_observation_spec(self, observation_spec: Composite) -> Composite:
        for key, spec in self._written_specs().items():
            if key in observation_spec.keys(True, True):
                raise ValueError(
                    f"{type(self).__name__} writes {key!r}, but the environment already has that "
                    "entry. Give the transform another key."
                )
            observation_spec[key] = spec.clone()
        return observation_spec

    def transform_state_spec(self, state_spec: Composite) -> Composite:
        specs = self._written_specs()
        for key in self._state_keys():
            state_spec[key] = specs[key].clone()
        return state_spec
