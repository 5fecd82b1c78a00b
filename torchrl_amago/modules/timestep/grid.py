"""Embedding of grids of categories: the cells of grid worlds, whose numbers are names."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from torchrl_amago.modules.timestep.embeddings import CategoryEmbedding, EntryEmbedding
from torchrl_amago.modules.timestep.vision import ImageEmbedding


class GridEmbedding(EntryEmbedding):
    """A table for each of the C categories of a cell, then a convolutional trunk.

    As an image, ids would be numbers in [-1, 1) that hardly differ.

    Args:
        shape: of one grid, ``[H, W, C]``.
        sizes: number of values of each of the C categories.
        embedding_size: features of each category.
        trunk: and further options: see :class:`ImageEmbedding`, but for ``random_shift``.

    Raises:
        ValueError: if shape and sizes don't fit; when called, if a value is out of range.

    Example:
        >>> import torch
        >>> grid = GridEmbedding((7, 7, 3), sizes=[11, 6, 3], output_size=16)
        >>> grid(torch.zeros(2, 5, 7, 7, 3, dtype=torch.uint8)).shape
        torch.Size([2, 5, 16])
    """

    def __init__(
        self,
        shape: Sequence[int],
        sizes: Sequence[int],
        *,
        embedding_size: int = 8,
        output_size: int = 256,
        trunk: str = "grid",
        **options: Any,
    ) -> None:
        super().__init__(shape, output_size)
        if len(self.shape) != 3 or self.shape[2] != len(sizes):
            got = f"got shape {self.shape} and sizes {list(sizes)}"
            raise ValueError(f"a grid must have the shape [H, W, C] and C sizes, {got}.")
        self.categories = CategoryEmbedding(sizes, embedding_size=embedding_size)
        features = (*self.shape[:2], self.categories.output_size)
        self.image = ImageEmbedding(features, output_size=output_size, trunk=trunk, **options)

    def forward(self, value: Tensor) -> Tensor:
        """Embed grids of integers ``[*M, H, W, C]``."""
        return self.image(self.categories(value))
