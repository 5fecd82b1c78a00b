"""Selection of a batch's real steps, and the way back to all of them."""

from __future__ import annotations

import torch
from torch import Tensor

from torchrl_amago._cpu import compact_batches


class Steps:
    """The steps M to compute: all of ``[*B]``, or the real ones alone in one row ``[N]``.

    In one row, padding costs nothing. Shapes then depend on data: fine on a CPU, but it stops
    ``torch.compile`` and ``torch.vmap``, and makes a GPU wait.

    Args:
        mask: bool ``[*B]``, True on real steps.
        compact: put the real steps in one row; by default on a CPU, untraced.
    """

    def __init__(self, mask: Tensor, compact: bool | None = None) -> None:
        if mask.dtype != torch.bool:
            raise ValueError(f"a mask must be bool, got {mask.dtype}. Use mask.bool() for 0 and 1.")
        self.full_mask = mask
        self.compact = compact_batches(mask) if compact is None else compact
        self._place_M = mask.flatten().nonzero().squeeze(-1) if self.compact else None
        #: ``[M]``, True on the selected steps that are real.
        self.mask = torch.ones_like(self._place_M, dtype=torch.bool) if self.compact else mask

    def select(self, x: Tensor, fill: float | None = None) -> Tensor:
        """Select steps, ``[*B, ...] -> [M, ...]``; ``fill`` replaces the padding that is kept."""
        if self.compact:
            return x.flatten(0, self.full_mask.ndim - 1).index_select(0, self._place_M)
        if fill is None:
            return x
        mask = self.full_mask
        return x.masked_fill(~mask.reshape(mask.shape + (1,) * (x.ndim - mask.ndim)), fill)

    def restore(self, x_M: Tensor) -> Tensor:
        """Undo the selection, ``[M, ...] -> [*B, ...]``; zero on padding if compact."""
        if not self.compact:
            return x_M
        x = x_M.new_zeros(self.full_mask.numel(), *x_M.shape[1:])
        return x.index_copy(0, self._place_M, x_M).unflatten(0, self.full_mask.shape)
