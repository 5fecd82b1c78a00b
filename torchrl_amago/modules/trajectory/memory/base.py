"""The contract of a rollout's memory."""

from __future__ import annotations

import abc
from collections.abc import Mapping

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves


class Memory(abc.ABC):
    """Tensors that an encoder keeps of a rollout between steps, for every row of the batch.

    Attributes:
        batch_size: number of rows.
        device: device of the stored tensors.
    """

    batch_size: int
    device: torch.device

    @abc.abstractmethod
    def clear(self, rows_B: Tensor) -> None:
        """Forget everything about the rows where the bool `rows_B` is True."""

    def advance(self) -> None:  # noqa: B027  (a hook, optional on purpose)
        """Make room for one more step; called once before each, outside of compiled code."""

    @property
    def nbytes(self) -> int:
        """Bytes of all rows together."""
        return sum(z.nbytes for z in tree_leaves(vars(self)) if isinstance(z, Tensor))

    def tensors(self) -> dict[str, Tensor]:
        """Return everything remembered, by name: by default the tensors among the attributes."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def state_dict(self) -> dict[str, Tensor]:
        """Copy :meth:`tensors`, and other values that the next step depends on."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy the tensors of a :meth:`state_dict` into this memory's own.

        Raises:
            ValueError: if names, shapes or dtypes differ.
        """
        found, expected = _describe(state), _describe(self.tensors())
        if found != expected:
            raise ValueError(
                f"a memory loads only tensors like its own, {expected}; got {found}. Build the "
                "encoder with the arguments of the one that was saved."
            )
        for name, tensor in self.tensors().items():
            tensor.copy_(state[name])


def _describe(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    return {name: f"{z.dtype} {list(z.shape)}" for name, z in tensors.items()}
