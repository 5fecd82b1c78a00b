"""Embedding of a single entry to a vector of features: the base class, and categories.

Legend: *M steps, K components of a category, E features of a component, F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from torchrl_amago._masking import is_traced
from torchrl_amago.modules._settings import Configurable


class EntryEmbedding(Configurable, nn.Module):
    """Base of the embeddings of one entry, parts of the combined encoder.

    To write your own, implement ``forward(value)``: ``[*M, *shape] -> [*M, F]``, of the dtype in the
    tensordict. With a ``mask_key`` it is called with the elements' mask too.

    Args:
        shape: shape of one step's entry.
        output_size: F.
        mask_key: entry, bool ``[*M, L]``, True on the elements of a sequence that are present.

    Example:
        >>> class Thermometer(EntryEmbedding):
        ...     def forward(self, value):
        ...         return (value.unsqueeze(-1) > torch.linspace(-1.0, 1.0, 5)).float()
        >>> Thermometer(shape=(), output_size=5)(torch.tensor([0.2]))
        tensor([[1., 1., 1., 0., 0.]])
    """

    def __init__(
        self, shape: Sequence[int], output_size: int, mask_key: NestedKey | None = None
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        self.output_size = output_size
        self.mask_key = mask_key

    def augment(self, value: Tensor, rows: Tensor, num_rows: int) -> Tensor:
        """Change values at random in training, see :meth:`TimestepEncoder.augment`."""
        return value


def check_range(index: Tensor, sizes: Sequence[int] | int, name: str) -> None:
    """Raise ValueError for numbers outside of ``[0, size)``, on a CPU and untraced.

    Elsewhere the check would wait for the device; there the look-up itself fails, less clearly.
    """
    if index.device.type != "cpu" or is_traced(index):
        return
    if ((index < 0) | (index >= torch.tensor(sizes))).any():
        raise ValueError(
            f"{name} must be in [0, size) with size {sizes}, got values from "
            f"{int(index.min())} to {int(index.max())}. Correct the spec, or shift the values."
        )


class CategoryEmbedding(EntryEmbedding):
    """One table of vectors per component (``Categorical``, ``MultiDiscrete``), side by side.

    Args:
        sizes: number of values of each of the K components.
        shape: shape of one step's entry, K numbers altogether; default ``[K]``.
        embedding_size: E, features of each component; F is K x E.

    Raises:
        ValueError: if sizes and shape do not go together; when called, if a value is out of range.

    Example:
        >>> embedding = CategoryEmbedding([3, 5], embedding_size=4)
        >>> embedding(torch.tensor([[2, 4]])).shape, embedding.table.num_embeddings
        (torch.Size([1, 8]), 8)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        shape: Sequence[int] | None = None,
        embedding_size: int = 16,
    ) -> None:
        shape = (len(sizes),) if shape is None else tuple(shape)
        if torch.Size(shape).numel() != len(sizes) or min(sizes, default=0) < 1:
            rule = "sizes must hold one positive number for each component of an entry"
            raise ValueError(f"{rule} of shape {shape}, got {list(sizes)}.")
        super().__init__(shape, len(sizes) * embedding_size)
        # One table for all, each component in its own rows: one look-up however many they are.
        self.table = nn.Embedding(sum(sizes), embedding_size)
        self._sizes = list(sizes)
        self.register_buffer("sizes", torch.tensor(sizes))
        self.register_buffer("first_row", self.sizes.cumsum(0) - self.sizes)

    def forward(self, value: Tensor) -> Tensor:
        """Embed integers ``[*M, *shape]``."""
        batch = value.shape[: value.ndim - len(self.shape)]
        index_MK = value.long().reshape(*batch, len(self._sizes))
        check_range(index_MK, self._sizes, "a category")
        # Out of range must be no row at all, rather than another component's.
        is_inside = (index_MK >= 0) & (index_MK < self.sizes)
        row_MK = torch.where(is_inside, index_MK + self.first_row, self.table.num_embeddings)
        return self.table(row_MK).flatten(-2)
