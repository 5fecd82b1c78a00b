"""How a task is repeated: what a soft reset must pass to the environment to stay at the same task.

A trial is several episodes at one task, so someone has to know how to start the next episode
without drawing a new task. The four ways are four small classes with the same two methods:
``soft_reset`` starts another episode in some rows, ``hard_reset`` is told of rows that were just
given a new task. :func:`make_repeater` looks through wrappers and batched environments and chooses.
"""

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

__all__ = ["RepeatFunction", "RepeatMode", "ResetOptions", "make_repeater"]

RepeatFunction = Callable[[EnvBase, Tensor, TensorDictBase], TensorDictBase]
RepeatMode = Literal["env", "options", "seed"] | RepeatFunction
ResetOptions = dict[str, Any] | Callable[[int], dict[str, Any]]


class Below(NamedTuple):
    """What lies under a trial transform: the base environment and the transforms in between."""

    env: EnvBase
    transforms: Sequence[Transform]

    def reset(
        self, mask: Tensor, request: TensorDictBase | None = None, **kwargs
    ) -> TensorDictBase:
        """Reset the rows of ``mask`` (bool ``[*B, 1]``) without the checks of ``EnvBase.reset``.

        Called in steps, where time matters; the caller selects the rows it asked for.
        """
        request = self.request(mask, request)
        return self.transformed(request, self.env._reset(request, **kwargs))

    def request(self, mask: Tensor, request: TensorDictBase | None = None) -> TensorDictBase:
        """What a reset of these rows shows the base environment."""
        if request is None:
            request = TensorDict({}, batch_size=self.env.batch_size, device=self.env.device)
        request.set("_reset", mask)
        for transform in reversed(self.transforms):
            request = transform._reset_env_preprocess(request)
        return request

    def transformed(self, request: TensorDictBase, out: TensorDictBase) -> TensorDictBase:
        """Show the base environment's reset to the transforms in between."""
        if self.transforms:
            self.env._complete_done(self.env.full_done_spec, out)
        for transform in self.transforms:
            out = transform._reset(request, out)
        return out


class Layout(NamedTuple):
    """How the rows of an environment are spread over processes, vector and single environments."""

    leaf: EnvBase
    # Number of sub-environments of each Serial/ParallelEnv, from the outside in.
    workers: tuple[int, ...]
    # Whether a TransformedEnv or a batched environment stands before the leaf.
    is_wrapped: bool

    @property
    def is_vector(self) -> bool:
        """Whether the leaf itself holds several rows."""
        return self.leaf.batch_size.numel() != 1 or len(self.leaf.batch_size) > 0


def layout_of(env: EnvBase) -> Layout:
    """Look through transforms and batched environments, down to one environment that does the work."""
    workers: tuple[int, ...] = ()
    is_wrapped = False
    while isinstance(env, TransformedEnv | BatchedEnvBase):
        is_wrapped = True
        if isinstance(env, TransformedEnv):
            env = env.base_env
            continue
        workers = (*workers, env.num_workers)
        env = first_worker(env)
    return Layout(env, workers, is_wrapped)


def first_worker(env: BatchedEnvBase) -> EnvBase:
    """The first environment of a batched one, to look at.

    Workers of a ParallelEnv live elsewhere, so a twin is built.
    """
    if isinstance(env, SerialEnv) and not env.is_closed:
        return env._envs[0]
    return env.create_env_fn[0](**env.create_env_kwargs[0])


def _row_kwargs(layout: Layout, name: str, values: Sequence[Any]) -> dict[str, Any]:
    """Reset keywords that give every row its value, nested as the batched environments want it."""
    if layout.workers:
        inner = layout._replace(workers=layout.workers[1:])
        size = len(values) // layout.workers[0]
        chunks = [values[i : i + size] for i in range(0, len(values), size)]
        return {"list_of_kwargs": [_row_kwargs(inner, name, chunk) for chunk in chunks]}
    if not layout.is_vector:
        return {name: values[0]}
    if name == "seed":
        return {name: list(values)}
    # A Gymnasium vector environment takes one dict of options for all the rows of a reset.
    return {name: next((value for value in values if value is not None), {})}


class EnvRepeater:
    """The environment itself stays at its task in the rows reset with ``repeat_task``."""

    def __init__(self, layout: Layout) -> None:
        parameters = inspect.signature(layout.leaf._reset).parameters
        self._by_keyword = "repeat_task" in parameters
        if layout.is_wrapped and not self._by_keyword:
            raise ValueError(
                "repeat='env' under another transformed or batched environment needs an environment "
                "whose _reset takes the keyword repeat_task, since undeclared entries of the reset "
                f"tensordict are dropped on the way; {type(layout.leaf).__name__}._reset takes "
                f"{sorted(parameters)}. Add the keyword, or put the trial transform directly on it."
            )

    def soft_reset(self, below: Below, mask: Tensor, tensordict: TensorDictBase) -> TensorDictBase:
        if self._by_keyword:
            return below.reset(mask, repeat_task=True)
        env = below.env
        request = TensorDict({"repeat_task": mask}, batch_size=env.batch_size, device=env.device)
        return below.reset(mask, request)

    def hard_reset(self, below: Below, mask: Tensor) -> TensorDictBase | None:
        return None


class FunctionRepeater:
    """A user's function resets the rows."""

    def __init__(self, function: RepeatFunction) -> None:
        self._function = function

    def soft_reset(self, below: Below, mask: Tensor, tensordict: TensorDictBase) -> TensorDictBase:
        # Clones, because the tensors already belong to the step's result.
        out = self._function(below.env, mask.clone(), tensordict.clone())
        if not isinstance(out, TensorDictBase) or out.batch_size != below.env.batch_size:
            got = tuple(out.batch_size) if isinstance(out, TensorDictBase) else type(out).__name__
            raise ValueError(
                "repeat(env, reset_mask, tensordict) must return a tensordict of the environment's "
                f"batch size {tuple(below.env.batch_size)}, got {got}. Return all rows, with the "
                "first observation of the new episode in those of the mask."
            )
        return below.transformed(below.request(mask.clone()), out)

    def hard_reset(self, below: Below, mask: Tensor) -> TensorDictBase | None:
        return None


class OptionsRepeater:
    """``reset(options=...)`` keeps the task; a reset without options draws a new one."""

    def __init__(self, layout: Layout, options: ResetOptions) -> None:
        self._layout = layout
        self._options = options

    def soft_reset(self, below: Below, mask: Tensor, tensordict: TensorDictBase) -> TensorDictBase:
        if not (callable(self._options) and self._layout.is_vector):
            return self._reset(below, mask)
        # Rows with options of their own have to take turns in a vector environment.
        out = None
        for row in mask.view(-1).nonzero().view(-1).tolist():
            one = torch.zeros_like(mask)
            one.view(-1)[row] = True
            turn = self._reset(below, one)
            out = turn if out is None else torch.where(one.view(out.batch_size), turn, out)
        return out

    def hard_reset(self, below: Below, mask: Tensor) -> TensorDictBase | None:
        return None

    def _reset(self, below: Below, mask: Tensor) -> TensorDictBase:
        # Copied because TorchRL writes the reset mask of vector environments into the dict.
        options = [
            deepcopy(self._options(row) if callable(self._options) else self._options)
            if is_reset
            else None
            for row, is_reset in enumerate(mask.view(-1).tolist())
        ]
        return below.reset(mask, **_row_kwargs(self._layout, "options", options))


class SeedRepeater:
    """A task is a reset seed: drawn anew for a new task, passed again for another episode.

    Row i's n-th task seed is a hash of (row's own seed, i, n), so that the tasks of a row depend
    neither on the other rows nor on how long trials last. The row's own seed is the one that
    ``set_seed`` gave to the Gymnasium environment (its ``np_random_seed``), found by looking
    whether it changed since our last reset: transforms are not told of ``set_seed``.
    """

    def __init__(self, layout: Layout, num_rows: int) -> None:
        self._layout = layout
        self._task_seed: list[int | None] = [None] * num_rows
        self._row_seed: list[int | None] = [None] * num_rows
        self._num_tasks = [0] * num_rows
        self._seen: list[int | None] = [None] * num_rows
        self._may_warn = True

    def soft_reset(self, below: Below, mask: Tensor, tensordict: TensorDictBase) -> TensorDictBase:
        seeds = self._chosen(mask)
        if None in self._chosen(mask, default=0):
            raise RuntimeError(
                "another episode needs the seed of its trial's task, and there is none: the rows were "
                "not reset since the trial transform was put into this environment. Call env.reset() "
                "after changing an environment's transforms."
            )
        return below.reset(mask, **_row_kwargs(self._layout, "seed", seeds))

    def hard_reset(self, below: Below, mask: Tensor) -> TensorDictBase | None:
        self._notice_set_seed(below.env)
        for row, is_reset in enumerate(mask.view(-1).tolist()):
            if is_reset:
                self._draw(row)
        out = self.soft_reset(below, mask, None)
        self._seen = _current_seeds(below.env)
        if self._may_warn and None in self._chosen(mask, self._seen, default=0):
            self._may_warn = False
            warnings.warn(
                f"{self._layout.leaf} does not report the seed it was reset with, so set_seed does "
                "not decide its tasks (torch.manual_seed does). Call super().reset(seed=seed) in "
                "the Gymnasium environment's reset.",
                stacklevel=2,
            )
        return out

    def _chosen(self, mask: Tensor, values=None, default=None) -> list[int | None]:
        values = self._task_seed if values is None else values
        flags = mask.view(-1).tolist()
        return [
            value if is_reset else default for value, is_reset in zip(values, flags, strict=True)
        ]

    def _notice_set_seed(self, env: EnvBase) -> None:
        for row, seed in enumerate(_current_seeds(env)):
            if seed is not None and seed != self._seen[row]:
                self._row_seed[row] = seed
                self._num_tasks[row] = 0

    def _draw(self, row: int) -> None:
        if self._row_seed[row] is None:
            self._row_seed[row] = int(torch.randint(2**31, ()))
        entropy = [self._row_seed[row], row, self._num_tasks[row]]
        # 31 bits, because some environments hand the seed to libraries that take int32.
        self._task_seed[row] = int(np.random.SeedSequence(entropy).generate_state(1)[0] >> 1)
        self._num_tasks[row] += 1


def _current_seeds(env: EnvBase) -> list[int | None]:
    """The seed each row's Gymnasium environment was last reset with, None where it doesn't say."""
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
    env: EnvBase, repeat: RepeatMode | None, options: ResetOptions | None
) -> EnvRepeater | FunctionRepeater | OptionsRepeater | SeedRepeater:
    """Choose how ``env`` repeats tasks, refusing what it cannot do.

    Args:
        env: environment under the trial transform.
        repeat: the way; None chooses ``"env"`` if the environment says ``repeats_task``, else
            ``"seed"`` for Gymnasium environments.
        options: for ``repeat="options"``.

    Raises:
        ValueError: if the environment cannot repeat a task in this way.
    """
    if callable(repeat):
        return FunctionRepeater(repeat)
    layout = layout_of(env)
    leaf = layout.leaf
    is_gym = isinstance(leaf, GymWrapper)
    name = type(leaf).__name__
    repeats_task = bool(getattr(type(leaf), "repeats_task", False))
    if is_gym and layout.is_vector:
        _check_autoreset(leaf)
    if repeat is None:
        if not (repeats_task or is_gym):
            raise ValueError(
                "a trial needs an environment that can repeat a task: one with repeats_task = True "
                f"or a Gymnasium environment whose task depends on the reset seed, got {name}. "
                "Pass repeat=f with f(env, reset_mask, tensordict) -> reset tensordict."
            )
        repeat = "env" if repeats_task else "seed"
    if repeat == "env":
        if not repeats_task:
            raise ValueError(
                "repeat='env' needs an environment with the class attribute repeats_task = True, "
                f"got {name}. Use repeat='seed' or 'options' for Gymnasium environments, or a function."
            )
        return EnvRepeater(layout)
    if not is_gym:
        raise ValueError(
            f"repeat={repeat!r} needs a Gymnasium environment (GymEnv, GymWrapper), got {name}. "
            "Use repeat='env' if it can repeat its task, else a function."
        )
    if repeat == "options":
        return OptionsRepeater(layout, options)
    return SeedRepeater(layout, env.batch_size.numel())


def _check_autoreset(env: GymWrapper) -> None:
    mode = getattr(getattr(env._env, "autoreset_mode", None), "name", None)
    if mode != "DISABLED":
        raise ValueError(
            "a trial over a Gymnasium vector environment needs autoreset_mode=AutoresetMode.DISABLED, "
            f"got {mode}: it would start a new task before the trial transform can repeat the old "
            "one. Pass it to SyncVectorEnv or AsyncVectorEnv."
        )
