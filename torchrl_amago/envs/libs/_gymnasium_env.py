"""Gymnasium environments, single or vector, with the specs of one row's spaces."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, VectorEnv
from tensordict import TensorDictBase
from tensordict.utils import expand_as_right
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    TensorSpec,
    Unbounded,
)
from torchrl.envs import GymWrapper
from torchrl.envs.gym_like import BaseInfoDictReader

from torchrl_amago import keys

_MAX_TASKS = 2**62


class GymnasiumEnv(GymWrapper):
    """A Gymnasium environment whose specs are those of its single spaces, expanded over rows.

    A vector environment must have ``autoreset_mode=AutoresetMode.DISABLED``. ``row_tasks`` is the
    ``task_id`` of each row, if it never changes. Other arguments, entries and errors: see
    :func:`~torchrl_amago.envs.gymnasium_rows`.
    """

    def __init__(
        self,
        env: gym.Env | VectorEnv,
        *,
        success_key: str | None = None,
        task_key: str | None = None,
        row_tasks: Sequence[int] = (),
        task_names: Sequence[str] = (),
        **options: Any,
    ) -> None:
        autoreset = getattr(env, "autoreset_mode", None)
        if isinstance(env, VectorEnv) and autoreset != AutoresetMode.DISABLED:
            raise ValueError(
                "a Gymnasium vector environment must have autoreset_mode=AutoresetMode.DISABLED, "
                f"got {autoreset}. Make it with torchrl_amago.envs.gymnasium_rows."
            )
        self._info_names = {keys.SUCCESS: success_key, keys.TASK_ID: task_key}
        self._row_tasks, self.task_names = row_tasks, tuple(task_names)
        super().__init__(env, categorical_action_encoding=True, **options)

    def _make_specs(self, env: gym.Env | VectorEnv, batch_size: Any = None) -> None:
        single = "single_" if isinstance(env, VectorEnv) else ""
        observation = spec_of(getattr(env, f"{single}observation_space"))
        if not isinstance(observation, Composite):
            observation = Composite({keys.OBSERVATION: observation})
        mask = observation.get(keys.ACTION_MASK, None)
        if mask is not None:
            observation[keys.ACTION_MASK] = _flags(mask.shape)
        reader = self._make_reader({} if mask is not None else env.reset()[1])
        done = Composite({key: _flags((1,)) for key in ("done", "terminated", "truncated")})
        actions = spec_of(getattr(env, f"{single}action_space"))
        specs = observation.update(reader.specs), actions, Unbounded((1,)), done
        specs = [spec.expand(*self.batch_size, *spec.shape).to(self.device) for spec in specs]
        self.observation_spec, self.action_spec, self.reward_spec, self.done_spec = specs
        self.info_dict_reader[:] = [reader] if reader.specs else []

    def _make_reader(self, info: dict[str, Any]) -> _InfoReader:
        """Return the reader of what the settings name, and of the mask if ``info`` has one."""
        specs, names = {}, {key: name for key, name in self._info_names.items() if name}
        if keys.ACTION_MASK in info:
            names[keys.ACTION_MASK] = keys.ACTION_MASK
            specs[keys.ACTION_MASK] = _flags(info[keys.ACTION_MASK].shape[len(self.batch_size) :])
        if keys.SUCCESS in names:
            specs[keys.SUCCESS] = _flags((1,))
        if keys.TASK_ID in names or self._row_tasks:
            specs[keys.TASK_ID] = Categorical(len(self.task_names) or _MAX_TASKS, shape=(1,))
        return _InfoReader(specs, names, self.batch_size, self._row_tasks)

    def read_obs(self, observations: Any) -> dict[str, Any]:
        parts = _named(observations)
        if not isinstance(parts, dict):
            parts = {keys.OBSERVATION: parts}
        spec = self.observation_spec
        return {key: spec[key].encode(part, ignore_device=True) for key, part in parts.items()}

    def read_done(self, **flags: Any) -> tuple[Any, ...]:
        # With the last dimension, which SerialEnv and ParallelEnv expect of their environments.
        *flags, is_over = super().read_done(**flags)
        return *(flag.view(*self.batch_size, 1) for flag in flags), is_over


class _InfoReader(BaseInfoDictReader):
    """Entries of ``info``: a missing success is False, a missing mask True, a missing task kept."""

    def __init__(
        self,
        specs: dict[str, TensorSpec],
        names: dict[str, str],
        rows: torch.Size,
        row_tasks: Sequence[int],
    ) -> None:
        self.specs, self._names = specs, names
        expanded = {key: spec.expand(*rows, *spec.shape) for key, spec in specs.items()}
        self._missing = {key: spec.zero() for key, spec in expanded.items()}
        if keys.ACTION_MASK in specs:
            self._missing[keys.ACTION_MASK] = expanded[keys.ACTION_MASK].one()
        if row_tasks:
            self._missing[keys.TASK_ID] = torch.tensor(row_tasks).view(*rows, 1)

    @property
    def info_spec(self) -> Composite:
        return Composite(self.specs)

    def __call__(self, info: dict[str, Any], tensordict: TensorDictBase) -> TensorDictBase:
        for key, missing in self._missing.items():
            value, name = missing.clone(), self._names.get(key)
            if name in info:
                value = np.asarray(info[name])
                if value.dtype == object:  # numpy's own bools, None in rows without
                    value = value.astype(bool)
                value = torch.as_tensor(value).to(missing.dtype).view(missing.shape)
                # Rows of a vector environment that report the entry.
                rows = torch.as_tensor(info.get(f"_{name}", True))
                value = torch.where(expand_as_right(rows, value), value, missing)
            if key == keys.TASK_ID:
                self._missing[key] = value.clone()
            tensordict.set(key, value)
        return tensordict


def spec_of(space: spaces.Space, name: str = "the space") -> TensorSpec:
    """Return the spec of one row; discrete numbers are categories, a Tuple is a Dict of numbers."""
    if isinstance(space, spaces.Tuple):
        space = spaces.Dict({str(index): part for index, part in enumerate(space)})
    if isinstance(space, spaces.Dict):
        return Composite({key: spec_of(part, f"{name}[{key!r}]") for key, part in space.items()})
    from_zero = not np.any(getattr(space, "start", 0))
    if isinstance(space, spaces.Discrete) and from_zero:
        return Categorical(int(space.n))
    if isinstance(space, spaces.MultiDiscrete) and from_zero:
        if np.unique(space.nvec).size > 1:
            return MultiCategorical(torch.as_tensor(space.nvec))
        return Categorical(int(space.nvec.flat[0]), shape=space.shape)
    if isinstance(space, spaces.MultiBinary):
        return Binary(shape=space.shape, dtype=torch.int8)
    if isinstance(space, spaces.Box):
        low, high = torch.as_tensor(space.low), torch.as_tensor(space.high)
        limits = torch.finfo if low.dtype.is_floating_point else torch.iinfo
        limits, shape = limits(low.dtype), space.shape or (1,)
        if (low <= limits.min).all() and (high >= limits.max).all():
            return Unbounded(shape, dtype=low.dtype)
        return Bounded(low, high, shape, dtype=low.dtype)
    raise ValueError(
        f"{name} must be a Box, MultiBinary, or Discrete or MultiDiscrete from 0, or a Dict or "
        f"Tuple of these, got {space}. Leave it out with gymnasium.wrappers.FilterObservation, or "
        "turn it into one of these (text into numbers of words) with TransformObservation."
    )


def _flags(shape: Sequence[int]) -> TensorSpec:
    return Categorical(2, shape=torch.Size(shape), dtype=torch.bool)


def _named(observations: Any) -> Any:
    """Turn tuples into dicts, as :func:`spec_of` does."""
    if isinstance(observations, tuple):
        observations = {str(index): part for index, part in enumerate(observations)}
    if isinstance(observations, dict):
        return {key: _named(part) for key, part in observations.items()}
    return observations
