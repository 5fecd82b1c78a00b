"""Normalisation of inputs by moving averages, in float32 for weights of every dtype."""

from __future__ import annotations

from collections.abc import Callable

import torch
from tensordict import is_batchedtensor
from torch import Tensor, nn

from torchrl_amago._validation import check_counts, check_positive


class PreciseBuffers(nn.Module):
    """Base of modules whose buffers keep their precision when converted to a lower one."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PreciseBuffers:
        before = dict(self.named_buffers(recurse=False))
        super()._apply(fn, recurse)
        for name, old in before.items():
            new = getattr(self, name)
            if new.dtype.itemsize < old.dtype.itemsize:
                setattr(self, name, old.to(new.device))
        return self


class InputNorm(PreciseBuffers):
    """Shift and scale features by moving averages of their first two moments.

        beta_t = beta / (1 - (1 - beta)^t)
        mu <- (1 - beta_t) mu + beta_t mean(x),    nu <- (1 - beta_t) nu + beta_t mean(x^2)
        sigma = sqrt(nu - mu^2 + 1e-5), in [1e-3, 1e6]

    Features that hardly vary (sigma <= 0.01) are shifted but not scaled; so are, by the rounding of
    float32, those whose mean is beyond about 3,000 standard deviations. `t` starts at 1 and counts
    before use, so that the first update moves half-way; ``beta`` is the step size after many.
    """

    #: Bound on normalised values, so that one outlier cannot overflow later layers.
    limit = 1e4
    all_reduce = staticmethod(lambda *sums: sums)  # over data-parallel ranks, see Ranks.attach
    #: Bound on inputs of the moments, whose squares must be finite.
    input_limit = 1e9

    def __init__(self, size: int, beta: float = 1e-4, initial_nu: float = 1.0) -> None:
        super().__init__()
        check_counts(size=size)
        check_positive("Use 1e-4 and 1, the published ones.", beta=beta, initial_nu=initial_nu)
        self.beta, self.initial_nu = beta, initial_nu
        self.register_buffer("mu", torch.empty(size))
        self.register_buffer("nu", torch.empty(size))
        self.register_buffer("t", torch.empty(1))
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Forget all statistics."""
        self.mu.zero_()
        self.nu.fill_(self.initial_nu)
        self.t.fill_(1.0)

    @property
    def sigma(self) -> Tensor:
        """Standard deviation of every feature, `[size]`."""
        # The variance of a constant feature may come out below zero by rounding.
        variance = self.nu - self.mu.square() + 1e-5
        return variance.clamp(min=0.0).sqrt().clamp(1e-3, 1e6)

    @torch.no_grad()
    def update(self, x: Tensor, mask: Tensor | None = None) -> None:
        """Move the statistics towards those of inputs `[*B, size]`; outliers count as 1e9.

        The mask, bool `[*B]` or `[*B, 1]`, is True on real steps (default: all). Padding has no
        influence, NaN included; without any real step nothing changes.
        """
        if is_batchedtensor(x) and not is_batchedtensor(self.mu):
            raise RuntimeError(
                "statistics of inputs can't follow several batches at once, under torch.vmap. Use "
                "deactivate_vmap=True, call eval() before, or normalize_inputs=False."
            )
        if mask is None:
            mask = x.new_ones(x.shape[:-1], dtype=torch.bool)
        mask = mask.reshape(*x.shape[:-1], 1)
        x = torch.where(mask, x.float(), 0.0).clamp(-self.input_limit, self.input_limit)
        x = x.reshape(-1, x.shape[-1])
        total, sum_, square_sum = self.all_reduce(mask.sum(), x.sum(0), x.square().sum(0))
        scale, t = 1.0 / total.clamp(min=1), self.t + 1
        beta_t = self.beta / (1.0 - (1.0 - self.beta) ** t)
        # A weight of zero, not a branch: a branch on data would stop torch.compile.
        weight = torch.where(total > 0, beta_t, 0.0)
        self.mu.lerp_((sum_ * scale).to(self.mu.dtype), weight.to(self.mu.dtype))
        self.nu.lerp_((square_sum * scale).to(self.nu.dtype), weight.to(self.nu.dtype))
        self.t.copy_(torch.where(total > 0, t, self.t))

    def forward(self, x: Tensor, mask: Tensor | None = None, update: bool = False) -> Tensor:
        """Normalise floats `[..., size]`, after an :meth:`update` if so chosen."""
        if update:
            self.update(x.detach(), mask)
        sigma = self.sigma
        shifted = x - self.mu
        normalised = torch.where(sigma > 0.01, shifted / sigma, shifted)
        return normalised.clamp(-self.limit, self.limit).to(x.dtype)
