"""Environments written in JAX as rows of one batch: compiled once, stepped together."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from torchrl_amago._validation import check_counts
from torchrl_amago.envs._reset_request import read_reset_request
from torchrl_amago.envs.libs._extras import import_extra
from torchrl_amago.envs.libs._jax_rows import JaxRows, Tree
from torchrl_amago.envs.libs._jax_spaces import env_specs


class JaxEnv(EnvBase):
    """Environment of pure JAX functions that play one row, batched by ``jax.vmap``, ``jax.jit``.

    The functions take and return arrays, or pytrees of arrays:

    - ``draw_task(key) -> task``: all that the episodes of a trial share; by default the key itself;
    - ``reset(key, task) -> (observation, state)``: the start of an episode;
    - ``step(key, state, action, task) -> (observation, state, reward, terminated, truncated)``:
      no automatic resets; discrete actions are int32;
    - ``render(state, task) -> uint8 [H, W, 3]``: a picture. It isn't compiled.

    ``env.reset(td, repeat_task=True)`` keeps the task in the rows that ``td["_reset"]`` selects; a
    bool tensor ``[num_envs, 1]`` chooses row by row. ``make_trial_env`` uses that. Everything that
    ``reset`` derives from the task is the same in each episode of a trial, everything that it draws
    with ``key`` is new.

    Each reset and each step is one compiled call for all rows. There are two compilations, and a
    third if a step leaves rows out. Arrays pass to torch by DLPack, on a GPU in both directions.
    ``set_seed`` decides everything; results depend on the number of rows, too. ``state_dict()``
    holds all that changes. Discrete actions out of range raise no error: JAX clips indices.

    Args:
        reset, step, draw_task, render: see above.
        action_spec: spec of one row's action.
        num_envs: number of rows, the batch size.
        observation_spec: spec of one row's observation, by default ``Unbounded`` of the shapes and
            dtypes that ``reset`` returns. A dictionary needs a ``Composite``, or a mapping, of the
            same keys; anything else is the entry ``"observation"``.
        rows_per_reset: rows reset at once, by default all. Few pay if a reset outweighs a step.
        device: device of JAX and of the tensors; by default JAX's own choice.
        seed: as for ``set_seed(seed)``; by default drawn from torch's global generator.

    Raises:
        ImportError: if JAX isn't installed.

    Example:
        >>> from torchrl.data import Categorical
        >>> def reset(key, task):
        ...     return jax.numpy.zeros(1), 0
        >>> def step(key, state, action, task):
        ...     is_right = action == jax.random.bernoulli(task)
        ...     return jax.numpy.zeros(1), state + 1, 1.0 * is_right, is_right, state >= 4
        >>> import jax  # doctest: +SKIP
        >>> env = JaxEnv(reset, step, action_spec=Categorical(2), num_envs=64)  # doctest: +SKIP
    """

    repeats_task = True
    # `state_dict` holds all that changes: a collector can stop in mid-trial and go on elsewhere.
    can_save_state = True

    def __init__(
        self,
        reset: Callable[[Tree, Tree], tuple[Tree, Tree]],
        step: Callable[[Tree, Tree, Tree, Tree], tuple[Tree, Tree, Tree, Tree, Tree]],
        *,
        action_spec: TensorSpec,
        num_envs: int,
        observation_spec: TensorSpec | Mapping[str, TensorSpec] | None = None,
        draw_task: Callable[[Tree], Tree] = lambda key: key,
        render: Callable[[Tree, Tree], np.ndarray] | None = None,
        rows_per_reset: int | None = None,
        device: torch.device | str | None = None,
        seed: int | None = None,
    ) -> None:
        rows_per_reset = num_envs if rows_per_reset is None else rows_per_reset
        check_counts(num_envs=num_envs, rows_per_reset=rows_per_reset)
        jax = import_extra("jax")
        if device is None:
            device = "cpu" if jax.default_backend() == "cpu" else "cuda"
        super().__init__(device=device, batch_size=[num_envs])
        self._jax, self._render_row = jax, render
        self._jax_device = jax.devices(self.device.type)[self.device.index or 0]
        dtype = "float32" if action_spec.dtype.is_floating_point else "int32"
        action = jax.ShapeDtypeStruct(action_spec.shape, dtype)
        self._rows = JaxRows(jax, reset, step, draw_task, action, num_envs, rows_per_reset)
        for name, spec in env_specs(num_envs, self._rows.observation, observation_spec).items():
            setattr(self, name, spec.to(self.device))
        self.action_spec = action_spec.expand(num_envs, *action_spec.shape).to(self.device)
        self._set_seed(seed)

    def _set_seed(self, seed: int | None) -> None:
        if seed is None:
            seed = int(torch.empty((), dtype=torch.int64).random_())
        # JAX takes seeds of 32 bits: all 64 are mixed into its key.
        key = np.random.SeedSequence(seed).generate_state(2)
        self._carry = self._jax.device_put(self._rows.start(key), self._jax_device)

    def _reset(
        self,
        tensordict: TensorDictBase | None = None,
        *,
        repeat_task: bool | Tensor | None = None,
        **kwargs: Any,
    ) -> TensorDictBase:
        selected, repeated = map(self._mask, read_reset_request(tensordict, repeat_task))
        self._carry, seen, flags = self._rows.reset(self._carry, selected, repeated)
        return self._to_tensordict(seen, flags)

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        action = tensordict.get("action")
        action = action if action.is_floating_point() else action.to(torch.int32)
        stepped = tensordict.get("_step", None)
        mask = None if stepped is None else self._mask(stepped)
        action = _to_jax(self._jax, action)
        self._carry, seen, reward, flags = self._rows.step(self._carry, action, mask)
        out = self._to_tensordict(seen, flags).set("reward", _to_torch(reward))
        if stepped is None:
            return out
        return torch.where(stepped.view(self.batch_size), out, self._skip_tensordict(tensordict))

    def _mask(self, mask: bool | Tensor) -> Tree:
        """Return a mask ``[num_envs, 1]``, or one value for all rows, as bool ``[num_envs]``."""
        if not isinstance(mask, Tensor):
            mask = torch.full(self.batch_size, mask, device=self.device)
        return _to_jax(self._jax, mask.reshape(-1))

    def _to_tensordict(self, seen: Tree, flags: Tree) -> TensorDict:
        seen = self._jax.tree.map(_to_torch, seen)
        entries = dict(seen) if isinstance(seen, Mapping) else {"observation": seen}
        entries["done"], entries["terminated"], entries["truncated"] = _to_torch(flags)
        return TensorDict(entries, batch_size=self.batch_size, device=self.device)

    def get_extra_state(self) -> dict[str, Tensor]:
        """Return all that changes, which `state_dict` holds."""
        leaves = map(np.array, self._jax.tree.leaves(self._carry))
        return {str(i): torch.from_numpy(leaf) for i, leaf in enumerate(leaves)}

    def set_extra_state(self, state: Mapping[str, Tensor]) -> None:
        """Restore what :meth:`get_extra_state` returned."""
        leaves = [state[str(i)].cpu().numpy().copy() for i in range(len(state))]
        carry = self._jax.tree.unflatten(self._jax.tree.structure(self._carry), leaves)
        self._carry = self._jax.device_put(carry, self._jax_device)

    def render(self, row: int = 0) -> np.ndarray:
        """Draw one row, all that is hidden from the agent included; uint8 ``[H, W, 3]``.

        Raises:
            NotImplementedError: if the environment was made without ``render``.
        """
        if self._render_row is None:
            raise NotImplementedError("pictures need JaxEnv(render=...), a function of one row.")
        state, task = self._carry.state, self._carry.task
        row_of = self._jax.tree.map(lambda x: x[range(self.batch_size[0])[row]], (state, task))
        return np.asarray(self._render_row(*row_of))


def _to_jax(jax: ModuleType, tensor: Tensor) -> Tree:
    if tensor.is_cuda:
        return jax.dlpack.from_dlpack(tensor)
    # A compiled call takes numpy's view of the tensor; an import by DLPack costs 0.1 ms.
    return tensor.detach().numpy()


def _to_torch(array: Tree) -> Tensor:
    if array.platform() != "cpu":
        return torch.from_dlpack(array)
    # The same without checks of streams, at half the time. It waits until the values are there.
    return torch.utils.dlpack.from_dlpack(array.__dlpack__())
