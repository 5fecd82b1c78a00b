"""Memory of recurrent encoders: tensors whose size doesn't grow with the trial."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain

import torch
from torch import Tensor

from torchrl_amago.modules.trajectory.memory.base import Memory


class StateMemory(Memory):
    """Tensors of constant size, zero at a trial's start, updated in place by an encoder's `step`.

    Kept in float32 at least, also under autocast: a sum over a thousand steps in bfloat16 stops
    changing after a few hundred.

    Args:
        num_rows: environments of the rollout, first dimension of every tensor.
        shapes: for every layer, the shapes of its tensors without that dimension.
        device: where they are stored.
        dtype: of the encoder's computation.

    Attributes:
        layers: the tensors of every layer.

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
        """Return the tensors of every layer, named ``layer.number``."""
        layers = enumerate(self.layers)
        return {f"{i}.{j}": state for i, layer in layers for j, state in enumerate(layer)}

    def clear(self, rows_B: Tensor) -> None:
        for state in chain(*self.layers):
            state.masked_fill_(rows_B.view(-1, *[1] * (state.ndim - 1)), 0.0)
