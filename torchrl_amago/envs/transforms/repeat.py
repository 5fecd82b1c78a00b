"""Repeating a task: resets that start another episode without drawing a new task."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Sequence
from copy import deepcopy
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase, GymWrapper, SerialEnv, Transform, TransformedEnv
from torchrl.envs.batched_envs import BatchedEnvBase

RepeatFunction = Callable[[EnvBase, Tensor, TensorDictBase], TensorDictBase]
RepeatMode = Literal["env", "options", "seed"] | RepeatFunction
ResetOptions = dict[str, Any] | Callable[[int], dict[str, Any]]


class InnerEnv(NamedTuple):
    """The environment inside of a trial: the base environment and the transforms around it."""

    env: EnvBase
    transforms: Sequence[Transform]

    def reset(self, mask: Tensor, **kwargs: Any) -> TensorDictBase:
        """Reset the mask's rows without the checks of ``EnvBase.reset``: steps must be fast."""
        request = self.request(_reset=mask)
        return self.transformed(request, self.env._reset(request, **kwargs))

    def request(self, **entries: Tensor) -> TensorDictBase:
        """Return the base environment's input for a reset."""
        request = TensorDict(entries, batch_size=self.env.batch_size, device=self.env.device)
        for transform in reversed(self.transforms):
            request = transform._reset_env_preprocess(request)
        return request

    def transformed(self, request: TensorDictBase, out: TensorDictBase) -> TensorDictBase:
        """Apply the transforms to the base environment's output of a reset."""
        if self.transforms:
            self.env._complete_done(self.env.full_done_spec, out)
        for transform in self.transforms:
            out = transform._reset(request, out)
        return out


class Nesting(NamedTuple):
    """An environment's rows, spread over processes, vector and single environments."""

    leaf: EnvBase
    workers: tuple[int, ...]  # of each Serial/ParallelEnv, from the outside in
    is_wrapped: bool  # by a TransformedEnv or a batched environment

    @property
    def is_vector(self) -> bool:
        """True if the leaf itself holds several rows."""
        return self.leaf.batch_size.numel() != 1 or len(self.leaf.batch_size) > 0

    def kwargs_of_rows(self, name: str, values: Sequence[Any]) -> dict[str, Any]:
        """Return keywords of a reset that give every row its value."""
        if self.workers:
            inner = Nesting(self.leaf, self.workers[1:], self.is_wrapped)
            size = len(values) // self.workers[0]
            chunks = [values[i : i + size] for i in range(0, len(values), size)]
            return {"list_of_kwargs": [inner.kwargs_of_rows(name, chunk) for chunk in chunks]}
        if not self.is_vector:
            return {name: values[0]}
        if name == "seed":
            return {name: list(values)}
        # A Gymnasium vector environment takes one dict of options for all the rows of a reset.
        return {name: next((value for value in values if value is not None), {})}


def nesting_of(env: EnvBase) -> Nesting:
    """Look through transforms and batched environments, down to a single environment."""
    workers, is_wrapped = (), False
    while isinstance(env, TransformedEnv | BatchedEnvBase):
        is_wrapped = True
        if isinstance(env, BatchedEnvBase):
            workers = (*workers, env.num_workers)
        env = env.base_env if isinstance(env, TransformedEnv) else first_worker(env)
    return Nesting(env, workers, is_wrapped)


def first_worker(env: BatchedEnvBase) -> EnvBase:
    """Return the first environment of a batched one, or a new one like it if it is elsewhere."""
    if isinstance(env, SerialEnv) and not env.is_closed:
        return env._envs[0]
    return env.create_env_fn[0](**env.create_env_kwargs[0])


class Repeater:
    """Base of the ways to repeat a task, enough for one episode; masks are bool ``[*B, 1]``."""

    def soft_reset(self, inner: InnerEnv, mask: Tensor, after: TensorDictBase) -> TensorDictBase:
        """Start another episode in the mask's rows, after a step's next tensordict."""

    def hard_reset(self, inner: InnerEnv, mask: Tensor) -> TensorDictBase | None:
        """Follow TorchRL's own reset to new tasks; a tensordict replaces its output."""
        return None


class EnvRepeater(Repeater):
    """The environment itself stays at its task in the rows reset with ``repeat_task``."""

    def __init__(self, nesting: Nesting) -> None:
        parameters = inspect.signature(nesting.leaf._reset).parameters
        self._by_keyword = "repeat_task" in parameters
        if nesting.is_wrapped and not self._by_keyword:
            raise ValueError(
                "repeat='env' through transformed or batched environments needs one whose _reset "
                f"takes the keyword repeat_task; {type(nesting.leaf).__name__}._reset takes "
                f"{sorted(parameters)}. Add the keyword, or put the trial transform directly on it."
            )

    def soft_reset(self, inner: InnerEnv, mask: Tensor, after: TensorDictBase) -> TensorDictBase:
        if self._by_keyword:
            return inner.reset(mask, repeat_task=True)
        request = inner.request(_reset=mask, repeat_task=mask)
        return inner.transformed(request, inner.env._reset(request))


class FunctionRepeater(Repeater):
    """A user's function resets the rows."""

    def __init__(self, function: RepeatFunction) -> None:
        self._function = function

    def soft_reset(self, inner: InnerEnv, mask: Tensor, after: TensorDictBase) -> TensorDictBase:
        # Clones, because the tensors already belong to the step's result.
        out = self._function(inner.env, mask.clone(), after.clone())
        if not isinstance(out, TensorDictBase) or out.batch_size != inner.env.batch_size:
            got = tuple(out.batch_size) if isinstance(out, TensorDictBase) else type(out).__name__
            raise ValueError(
                "repeat(env, reset_mask, tensordict) must return a tensordict of the environment's "
                f"batch size {tuple(inner.env.batch_size)}, got {got}. Return all rows."
            )
        return inner.transformed(inner.request(_reset=mask.clone()), out)


class OptionsRepeater(Repeater):
    """``reset(options=...)`` keeps the task; a reset without options draws a new one."""

    def __init__(self, nesting: Nesting, options: ResetOptions) -> None:
        self._nesting, self._options = nesting, options

    def soft_reset(self, inner: InnerEnv, mask: Tensor, after: TensorDictBase) -> TensorDictBase:
        if not (callable(self._options) and self._nesting.is_vector):
            return self._reset(inner, mask)
        # Rows with options of their own have to take turns in a vector environment.
        out = None
        for row in _rows(mask):
            one = torch.zeros_like(mask)
            one.view(-1)[row] = True
            turn = self._reset(inner, one)
            out = turn if out is None else torch.where(one.view(out.batch_size), turn, out)
        return out

    def _reset(self, inner: InnerEnv, mask: Tensor) -> TensorDictBase:
        options: list[dict[str, Any] | None] = [None] * mask.numel()
        for row in _rows(mask):
            of_row = self._options(row) if callable(self._options) else self._options
            # Copied because TorchRL writes the reset mask of vector environments into the dict.
            options[row] = deepcopy(of_row)
        return inner.reset(mask, **self._nesting.kwargs_of_rows("options", options))


class SeedRepeater(Repeater):
    """A task is a reset seed: drawn anew for a new task, passed again for another episode.

    Row i's n-th task seed is a hash of (row's own seed, i, n): no other row matters. The row's own
    seed is the one that ``set_seed`` gave to the Gymnasium environment (its ``np_random_seed``),
    recognised by a change since the last reset here: transforms have no hook for ``set_seed``.
    """

    def __init__(self, nesting: Nesting, num_rows: int) -> None:
        self._nesting, self._may_warn, self._num_tasks = nesting, True, [0] * num_rows
        self._task_seed, self._row_seed, self._last_seen = ([None] * num_rows for _ in range(3))

    def soft_reset(self, inner: InnerEnv, mask: Tensor, after: TensorDictBase) -> TensorDictBase:
        return self._reset(inner, mask)

    def _reset(self, inner: InnerEnv, mask: Tensor) -> TensorDictBase:
        seeds: list[int | None] = [None] * mask.numel()
        for row in _rows(mask):
            seeds[row] = self._task_seed[row]
            if seeds[row] is None:
                raise RuntimeError(
                    "another episode needs the seed of its trial's task, and there is none. Call "
                    "env.reset() after changing an environment's transforms."
                )
        return inner.reset(mask, **self._nesting.kwargs_of_rows("seed", seeds))

    def hard_reset(self, inner: InnerEnv, mask: Tensor) -> TensorDictBase:
        for row, seed in enumerate(_current_seeds(inner.env)):
            if seed is not None and seed != self._last_seen[row]:  # set_seed was called
                self._row_seed[row], self._num_tasks[row] = seed, 0
        rows = _rows(mask)
        for row in rows:
            if self._row_seed[row] is None:
                self._row_seed[row] = int(torch.randint(2**31, ()))
            entropy = [self._row_seed[row], row, self._num_tasks[row]]
            # 31 bits, because some environments hand the seed to libraries that take int32.
            self._task_seed[row] = int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
            self._num_tasks[row] += 1
        out = self._reset(inner, mask)
        self._last_seen = _current_seeds(inner.env)
        if self._may_warn and any(self._last_seen[row] is None for row in rows):
            self._may_warn = False
            warnings.warn(
                f"set_seed doesn't decide tasks of {self._nesting.leaf}, whose seed is unknown. "
                "Call super().reset(seed=seed) in the Gymnasium environment's reset.",
                stacklevel=2,
            )
        return out


def _rows(mask: Tensor) -> list[int]:
    return [row for row, is_in in enumerate(mask.view(-1).tolist()) if is_in]


def _current_seeds(env: EnvBase) -> list[int | None]:
    """Return the seed of each row's last reset in its Gymnasium environment, None if unknown."""
    while isinstance(env, TransformedEnv):
        env = env.base_env
    if isinstance(env, SerialEnv):
        return [seed for worker in env._envs for seed in _current_seeds(worker)]
    if isinstance(env, BatchedEnvBase):
        seeds = list(env.np_random_seed)
    else:
        bare = env._env.unwrapped
        if hasattr(bare, "envs"):
            seeds = [getattr(one.unwrapped, "_np_random_seed", None) for one in bare.envs]
        elif env.batch_size:
            seeds = bare.get_attr("np_random_seed")
        else:
            # Not the public property: on an unseeded environment it would draw a seed.
            seeds = [getattr(bare, "_np_random_seed", None)]
    flat = np.hstack([np.asarray(seed, dtype=object) for seed in seeds]).tolist()
    return [None if seed is None or seed < 0 else int(seed) for seed in flat]


def make_repeater(
    env: EnvBase, repeat: RepeatMode | None, options: ResetOptions | None, one_episode: bool
) -> Repeater:
    """Choose how the environment under a trial transform repeats tasks."""
    if callable(repeat):
        return FunctionRepeater(repeat)
    nesting = nesting_of(env)
    leaf, is_gym = nesting.leaf, isinstance(nesting.leaf, GymWrapper)
    repeats_task = getattr(type(leaf), "repeats_task", False)
    autoreset = getattr(getattr(leaf, "_env", None), "autoreset_mode", None)
    if is_gym and nesting.is_vector and getattr(autoreset, "name", None) != "DISABLED":
        raise ValueError(
            "a trial over a Gymnasium vector environment needs autoreset_mode="
            f"AutoresetMode.DISABLED, got {autoreset}. Make it with gymnasium_rows(id, num_envs)."
        )
    if repeat is None:
        repeat = "env" if repeats_task or not is_gym else "seed"
    can_repeat = repeats_task if repeat == "env" else is_gym
    if one_episode and not can_repeat:
        return Repeater()
    if not can_repeat:
        raise ValueError(
            f"a trial needs an environment that can repeat a task, got {type(leaf).__name__} for "
            f"repeat={repeat!r}. 'env' needs the class attribute repeats_task = True; 'seed' and "
            "'options' need a Gymnasium environment (GymEnv, GymWrapper); for any other pass a "
            "function: repeat=f with f(env, reset_mask, tensordict) -> reset tensordict."
        )
    if repeat == "env":
        return EnvRepeater(nesting)
    if repeat == "options":
        return OptionsRepeater(nesting, options)
    return SeedRepeater(nesting, env.batch_size.numel())
