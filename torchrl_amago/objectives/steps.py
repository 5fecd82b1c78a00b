"""Which steps of a batch count, and how to get from all of them to those and back."""

from __future__ import annotations

from torch import Tensor


class Steps:
    """The steps M that count: ``[B, T]`` as it is, or its real steps alone in one row ``[N]``.

    In one row, padding costs nothing and cannot be seen; shapes then depend on the data.

    Args:
        mask_BT: bool ``[B, T]``, True on real steps.
        compact: put the real steps in one row.

    Example:
        >>> import torch
        >>> steps = Steps(torch.tensor([[True, False], [True, True]]), compact=True)
        >>> x_BT = torch.tensor([[1.0, float("nan")], [3.0, 4.0]])
        >>> steps.select(x_BT)
        tensor([1., 3., 4.])
        >>> steps.restore(steps.select(x_BT))
        tensor([[1., 0.],
                [3., 4.]])
    """

    def __init__(self, mask_BT: Tensor, compact: bool) -> None:
        self.mask_BT, self.compact = mask_BT, compact
        #: ``[M]``, which of the steps that are kept are real.
        self.mask = mask_BT[mask_BT] if compact else mask_BT

    def select(self, x_BT: Tensor) -> Tensor:
        """``[B, T, ...] -> [M, ...]``."""
        return x_BT[self.mask_BT] if self.compact else x_BT

    def restore(self, x_M: Tensor) -> Tensor:
        """``[M, ...] -> [B, T, ...]``, zero on padding if steps are in one row."""
        if not self.compact:
            return x_M
        x_BT = x_M.new_zeros(*self.mask_BT.shape, *x_M.shape[1:])
        return x_BT.index_put((self.mask_BT,), x_M)
