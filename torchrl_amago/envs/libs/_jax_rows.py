"""Functions of one row in JAX, made into two compiled functions of all rows."""

from __future__ import annotations

from collections.abc import Callable
from types import ModuleType
from typing import Any, NamedTuple

import numpy as np

Tree = Any  # arrays, or containers of them that JAX has registered


class Carry(NamedTuple):
    """Everything that changes from call to call; all but the key have the rows first."""

    key: Tree
    task: Tree
    state: Tree
    has_task: Tree


class JaxRows:
    """Compiled ``reset`` and ``step`` of all rows, without side effects.

    Other arguments: see :class:`JaxEnv`.

    Args:
        jax: the package, which is optional.
        action: shape and dtype of one row's action.
    """

    def __init__(
        self,
        jax: ModuleType,
        reset: Callable,
        step: Callable,
        draw_task: Callable,
        action: Tree,
        num_rows: int,
        rows_per_reset: int,
    ) -> None:
        self.jax, self.num_rows, self.rows_per_reset = jax, num_rows, rows_per_reset
        self._reset_row, self._step_row, self._draw_task = reset, step, draw_task
        key = jax.ShapeDtypeStruct((2,), "uint32")
        self.task = jax.eval_shape(draw_task, key)
        first = jax.eval_shape(reset, key, self.task)
        after = jax.eval_shape(step, key, first[1], action, self.task)[:2]
        # A step may return other dtypes than a reset does.
        self.observation, self.state = jax.tree.map(
            lambda a, b: jax.ShapeDtypeStruct(a.shape, jax.numpy.promote_types(a.dtype, b.dtype)),
            first,
            after,
        )
        self.reset, self.step = jax.jit(self._reset), jax.jit(self._step)

    def start(self, key: np.ndarray) -> Carry:
        """Return what there is before the first reset."""
        task, state = self._zeros(self.task), self._zeros(self.state)
        return Carry(key, task, state, np.zeros(self.num_rows, bool))

    def _reset(self, carry: Carry, selected: Tree, repeated: Tree) -> tuple[Carry, Tree, Tree]:
        """Return the carry, observations, and done, terminated, truncated ``[3, rows, 1]``."""
        key, keys = self._split(carry.key)
        given = (keys, carry.task, repeated & carry.has_task)
        before = (carry.task, self._zeros(self.observation), carry.state)
        if self.rows_per_reset < self.num_rows:
            after = self._reset_in_turns(given, before, selected)
        else:
            after = self._where(selected, self.jax.vmap(self._restart)(*given), before)
        task, observation, state = after
        flags = self.jax.numpy.zeros((3, self.num_rows, 1), bool)
        return Carry(key, task, state, carry.has_task | selected), self._own(observation), flags

    def _restart(self, key: Tree, old_task: Tree, keeps: Tree) -> tuple[Tree, Tree, Tree]:
        """Return one row's task, observation and state."""
        task_key, reset_key = self.jax.random.split(key)
        new_task = self._strong(self._draw_task(task_key), self.task)
        task = self._where(keeps, old_task, new_task)
        first = self._reset_row(reset_key, task)
        return task, *self._strong(first, (self.observation, self.state))

    def _reset_in_turns(self, given: Tree, before: Tree, selected: Tree) -> Tree:
        jax, num_rows, at_once = self.jax, self.num_rows, self.rows_per_reset
        # Rows that aren't selected get an index out of range: nothing is written for them.
        rows = jax.numpy.nonzero(selected, size=num_rows, fill_value=num_rows)[0]
        rows = jax.numpy.pad(rows, (0, -num_rows % at_once), constant_values=num_rows)

        def turn(i: Tree, current: Tree) -> Tree:
            some = jax.lax.dynamic_slice_in_dim(rows, i * at_once, at_once)
            chosen = jax.tree.map(lambda x: x.at[some].get(mode="clip"), given)
            new = jax.vmap(self._restart)(*chosen)
            return jax.tree.map(lambda x, y: x.at[some].set(y, mode="drop"), current, new)

        return jax.lax.fori_loop(0, -(-selected.sum() // at_once), turn, before)

    def _step(self, carry: Carry, action: Tree, stepped: Tree | None) -> tuple:
        """Return the carry, observations, rewards ``[rows, 1]``, and the flags as a reset does."""
        key, keys = self._split(carry.key)
        out = self.jax.vmap(self._step_row)(keys, carry.state, action, carry.task)
        observation, state = self._strong(out[:2], (self.observation, self.state))
        reward = out[2].astype("float32").reshape(-1, 1)
        terminated, truncated = (flag.astype(bool).reshape(-1, 1) for flag in out[3:])
        done = terminated | truncated
        flags = self.jax.numpy.stack([done, terminated, truncated & ~terminated])
        if stepped is not None:
            state = self._where(stepped, state, carry.state)
        return carry._replace(key=key, state=state), self._own(observation), reward, flags

    def _split(self, key: Tree) -> tuple[Tree, Tree]:
        # In two stages: most steps draw nothing, and are compiled without keys of rows.
        key, now = self.jax.random.split(key)
        return key, self.jax.random.split(now, self.num_rows)

    def _zeros(self, like: Tree) -> Tree:
        shape = (self.num_rows,)
        return self.jax.tree.map(lambda s: self.jax.numpy.zeros(shape + s.shape, s.dtype), like)

    def _where(self, mask: Tree, new: Tree, old: Tree) -> Tree:
        def select(new: Tree, old: Tree) -> Tree:
            shape = mask.shape + (1,) * (old.ndim - mask.ndim)
            return self.jax.numpy.where(mask.reshape(shape), new, old)

        return self.jax.tree.map(select, new, old)

    def _strong(self, values: Tree, like: Tree) -> Tree:
        # Python numbers have a weak type, and each combination of those would compile anew.
        convert = self.jax.lax.convert_element_type
        return self.jax.tree.map(lambda x, s: convert(x, s.dtype), values, like)

    def _own(self, observation: Tree) -> Tree:
        # A copy: torch may write into what it gets, which must not be a part of the state.
        return self.jax.tree.map(self.jax.numpy.copy, observation)
