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


class Rows(NamedTuple):
    """Compiled functions of all rows, and the shapes and dtypes of one row's observation.

    ``reset`` and ``step`` return the observation, then ``step`` the reward ``[rows, 1]``, and both
    the flags done, terminated and truncated, ``[3, rows, 1]``.
    """

    start: Callable[[np.ndarray], Carry]
    reset: Callable[[Carry, Tree, Tree], tuple[Carry, Tree, Tree]]
    step: Callable[[Carry, Tree, Tree | None], tuple[Carry, Tree, Tree, Tree]]
    observation: Tree


def compile_rows(
    jax: ModuleType,
    reset: Callable,
    step: Callable,
    draw_task: Callable,
    action: Tree,
    num_rows: int,
    rows_per_reset: int,
) -> Rows:
    """Batch the functions that :class:`JaxEnv` takes; ``action`` has one row's shape and dtype."""
    jnp, tree = jax.numpy, jax.tree
    key = jax.ShapeDtypeStruct((2,), jnp.uint32)
    task = jax.eval_shape(draw_task, key)
    first = jax.eval_shape(reset, key, task)
    after = jax.eval_shape(step, key, first[1], action, task)[:2]
    # A step may return other dtypes than a reset does.
    observation, state = tree.map(
        lambda a, b: jax.ShapeDtypeStruct(a.shape, jnp.promote_types(a.dtype, b.dtype)),
        first,
        after,
    )

    def strong(values: Tree, like: Tree) -> Tree:
        # Python numbers have a weak type, and each combination of those would compile anew.
        return tree.map(lambda x, s: jax.lax.convert_element_type(x, s.dtype), values, like)

    def zeros(like: Tree) -> Tree:
        return tree.map(lambda s: jnp.zeros((num_rows, *s.shape), s.dtype), like)

    def start(key: np.ndarray) -> Carry:
        return Carry(jnp.asarray(key), zeros(task), zeros(state), jnp.zeros(num_rows, bool))

    def keys_of_rows(key: Tree) -> tuple[Tree, Tree]:
        keys = jax.random.split(key, num_rows + 1)
        return keys[0], keys[1:]

    def reset_row(key: Tree, old_task: Tree, keeps: Tree) -> tuple[Tree, Tree, Tree]:
        task_key, reset_key = jax.random.split(key)
        row_task = _where(jax, keeps, old_task, strong(draw_task(task_key), task))
        return row_task, *strong(reset(reset_key, row_task), (observation, state))

    def reset_rows(carry: Carry, selected: Tree, repeated: Tree) -> tuple[Carry, Tree, Tree]:
        new_key, keys = keys_of_rows(carry.key)
        given = (keys, carry.task, repeated & carry.has_task)
        before = (carry.task, zeros(observation), carry.state)
        if rows_per_reset < num_rows:
            after = _apply_in_turns(jax, reset_row, given, before, selected, rows_per_reset)
        else:
            after = _where(jax, selected, jax.vmap(reset_row)(*given), before)
        new_task, seen, new_state = after
        flags = jnp.zeros((3, num_rows, 1), bool)
        carry = Carry(new_key, new_task, new_state, carry.has_task | selected)
        return carry, tree.map(jnp.copy, seen), flags

    def step_rows(carry: Carry, action: Tree, stepped: Tree | None) -> tuple:
        new_key, keys = keys_of_rows(carry.key)
        out = jax.vmap(step)(keys, carry.state, action, carry.task)
        seen, new_state = strong(out[:2], (observation, state))
        reward = out[2].astype(jnp.float32).reshape(num_rows, 1)
        terminated, truncated = (flag.astype(bool).reshape(num_rows, 1) for flag in out[3:])
        flags = jnp.stack([terminated | truncated, terminated, truncated & ~terminated])
        if stepped is not None:
            new_state = _where(jax, stepped, new_state, carry.state)
        carry = carry._replace(key=new_key, state=new_state)
        # Copied, since torch may write into what it gets, and the state is JAX's.
        return carry, tree.map(jnp.copy, seen), reward, flags

    return Rows(start, jax.jit(reset_rows), jax.jit(step_rows), observation)


def _where(jax: ModuleType, mask: Tree, new: Tree, old: Tree) -> Tree:
    def select(new: Tree, old: Tree) -> Tree:
        shape = mask.shape + (1,) * (old.ndim - mask.ndim)
        return jax.numpy.where(mask.reshape(shape), new, old)

    return jax.tree.map(select, new, old)


def _apply_in_turns(
    jax: ModuleType, function: Callable, given: Tree, before: Tree, selected: Tree, at_once: int
) -> Tree:
    """Replace the selected rows of ``before`` by a function of ``given``, so many at once."""
    jnp, num_rows = jax.numpy, len(selected)
    # Rows that aren't selected get an index out of range: nothing is written for them.
    rows = jnp.nonzero(selected, size=num_rows, fill_value=num_rows)[0]
    rows = jnp.pad(rows, (0, -num_rows % at_once), constant_values=num_rows)

    def turn(i: Tree, current: Tree) -> Tree:
        some = jax.lax.dynamic_slice_in_dim(rows, i * at_once, at_once)
        new = jax.vmap(function)(*jax.tree.map(lambda x: x.at[some].get(mode="clip"), given))
        return jax.tree.map(lambda x, y: x.at[some].set(y, mode="drop"), current, new)

    return jax.lax.fori_loop(0, -(-selected.sum() // at_once), turn, before)
