"""Batch normalisation of states over real steps, so that an encoder can't make them all alike."""

from __future__ import annotations

from typing import Any

import torch
from tensordict import is_batchedtensor
from torch import Tensor

from torchrl_amago.modules._input_norm import PreciseBuffers
from torchrl_amago.modules._layers import at_least_float32


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, norm: StateNorm, x: Tensor) -> Tensor:
        ctx.norm = norm
        return norm.all_reduce(x)[0]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor]:
        return None, ctx.norm.all_reduce(gradient)[0]


class StateNorm(PreciseBuffers):
    """Shift and scale features to mean 0 and variance 1 (arXiv 1502.03167), without weights.

    An update takes the moments of its batch's real steps, with gradient, and moves averages by the
    fraction ``beta`` towards them. Everything else uses the averages.
    """

    eps = 1e-6  # added to variances
    all_reduce = staticmethod(lambda *sums: sums)  # over data-parallel ranks, see Ranks.attach

    def __init__(self, size: int, beta: float = 0.05) -> None:
        super().__init__()
        self.beta = beta
        self.register_buffer("mean", torch.zeros(size))
        self.register_buffer("variance", torch.ones(size))

    def reset_parameters(self) -> None:
        """Forget all statistics."""
        self.mean.zero_()
        self.variance.fill_(1.0)

    def forward(self, x: Tensor, mask: Tensor | None = None, update: bool = False) -> Tensor:
        """Normalise ``[*B, size]``; an update's mask, bool ``[*B]``, is True on real steps."""
        wide, (mean, variance) = at_least_float32(x), (self.mean, self.variance)
        if update:
            if is_batchedtensor(x):
                raise RuntimeError(
                    "statistics of states can't follow several batches at once, under torch.vmap. "
                    "Use deactivate_vmap=True, call eval() before, or normalize_states=False."
                )
            mask = torch.ones_like(x[..., 0], dtype=torch.bool) if mask is None else mask
            mask = mask.reshape(*x.shape[:-1], 1)
            wide = torch.where(mask, wide, 0.0)  # padding may be anything
            mean, variance = self._update(wide, mask.to(wide.dtype))
        return ((wide - mean) * (variance + self.eps).rsqrt()).to(x.dtype)

    def _update(self, x: Tensor, real: Tensor) -> tuple[Tensor, Tensor]:
        """Return the moments of the real steps, after moving the averages towards them."""
        dims, (total,) = tuple(range(x.ndim - 1)), self.all_reduce(real.sum())
        mean = self._sum((real * x).sum(dims)) / total.clamp(min=1.0)
        variance = self._sum((real * (x - mean).square()).sum(dims)) / total.clamp(min=1.0)
        with torch.no_grad():
            # A weight of zero, not a branch: a branch on data would stop torch.compile.
            weight = self.beta * (total > 0).to(self.mean.dtype)
            for average, moment in ((self.mean, mean), (self.variance, variance)):
                average.lerp_(moment.to(average.dtype), weight)
        return mean, variance

    def _sum(self, x: Tensor) -> Tensor:
        return x if self.all_reduce is StateNorm.all_reduce else _SumOverRanks.apply(self, x)
