"""The contract of a rollout's memory, and the memory of recurrent encoders."""

from __future__ import annotations

import abc
from collections.abc import Mapping, Sequence
from itertools import chain

import torch
from torch import Tensor


class Memory(abc.ABC):
    """Tensors that an encoder keeps of a rollout between steps, for every row of the batch."""

    batch_size: int  # number of rows
    device: torch.device

    @abc.abstractmethod
    def clear(self, rows_B: Tensor) -> None:
        """Forget everything about the rows where the bool `rows_B` is True."""

    def advance(self) -> None:  # noqa: B027  (a hook, optional on purpose)
        """Make room for one more step; called once before each, outside of compiled code."""

    def tensors(self) -> dict[str, Tensor]:
        """Return everything remembered, by name: by default the tensors among the attributes."""
        return {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}

    def state_dict(self) -> dict[str, Tensor]:
        """Copy :meth:`tensors`, and other values that the next step depends on."""
        return {name: tensor.detach().clone() for name, tensor in self.tensors().items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Copy in the tensors of a :meth:`state_dict`; ValueError for other names or shapes."""
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


class StateMemory(Memory):
    """Tensors of constant size, zero at a trial's start, updated in place by an encoder's `step`.

    Kept in float32 at least, also under autocast: a sum over a thousand steps in bfloat16 stops
    changing after a few hundred.

    Args:
        num_rows: environments of the rollout, first dimension of every tensor.
        shapes: of the tensors of every layer (attribute `layers`), without that dimension.
        device: where they are stored.
        dtype: of the encoder's computation.

    Example:
        >>> memory = StateMemory(2, [[(3,)]], torch.device("cpu"), torch.bfloat16)
        >>> memory.layers[0][0].add_(1.0).dtype
        torch.float32
        >>> memory.clear(torch.tensor([True, False]))
        >>> memory.layers[0][0].sum(-1)
        tensor([0., 3.])
    """

    def __init__(
        self,
        num_rows: int,
        shapes: Sequence[Sequence[tuple[int, ...]]],
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.batch_size = num_rows
        dtype = torch.promote_types(dtype, torch.float32)
        # Memory outlives the no-grad or inference block it is made in, and is written in others.
        with torch.inference_mode(False):
            self.layers = [
                [torch.zeros(num_rows, *shape, device=device, dtype=dtype) for shape in layer]
                for layer in shapes
            ]
        self.device = self.layers[0][0].device

    def tensors(self) -> dict[str, Tensor]:
        layers = enumerate(self.layers)
        return {f"{i}.{j}": state for i, layer in layers for j, state in enumerate(layer)}

    def clear(self, rows_B: Tensor) -> None:
        for state in chain(*self.layers):
            state.masked_fill_(rows_B.view(-1, *[1] * (state.ndim - 1)), 0.0)
