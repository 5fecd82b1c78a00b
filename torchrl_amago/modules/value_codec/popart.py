"""Scalar values on a scale that follows the targets.

Legend: N targets, G discounts.
"""

from __future__ import annotations

from torch import Tensor

from torchrl_amago._validation import check_positive
from torchrl_amago.modules.value_codec._scaled import ScaledCodec


class PopArt(ScaledCodec):
    """Scalar values, normalised per discount while outputs are preserved (arXiv 1602.07714).

    Targets' moments are moving averages, corrected for their start; an affine map of the raw
    prediction moves along, so that :meth:`decode` of an unchanged critic stays the same:

        mu, nu   <- lerp(mu, mean(target)), lerp(nu, mean(target^2))
        weight   <- weight * sigma_old / sigma
        bias     <- (sigma_old * bias + mu_old - mu) / sigma

    Args:
        num_discounts: G, size of the predictions' last dimension.
        beta: step size of the moving averages, in (0, 1]; 5e-4 is the published one.
        initial_nu: initial second moment; large values start with small normalised targets.
        enabled: False makes every method the identity (plain regression on reward units).

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> import torch
        >>> codec = PopArt(num_discounts=1)
        >>> codec.update(torch.full((6, 1), 5.0), torch.ones(6, 1, dtype=torch.bool))
        >>> codec.mu.round(decimals=2), codec.decode(torch.tensor([1.0])).round(decimals=2)
        (tensor([2.5000]), tensor([10.]))
    """

    not_settings = frozenset({"initial_nu"})
    # Bounds of the public AMAGO code on the variance, in squared reward units.
    MIN_VARIANCE, MAX_VARIANCE = 1e-4, 1e8

    def __init__(
        self,
        num_discounts: int,
        beta: float = 5e-4,
        initial_nu: float = 100.0,
        enabled: bool = True,
    ) -> None:
        super().__init__(num_discounts, beta)
        check_positive("Use 100, as published.", initial_nu=initial_nu)
        self.initial_nu, self.enabled = initial_nu, enabled
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.mu.zero_()
        self.nu.fill_(self.initial_nu)
        self.weight.fill_(1.0)
        self.bias.zero_()
        # Starts at 1, as in the public code: the first update moves half-way, not all the way.
        self.count.fill_(1.0)

    @property
    def sigma(self) -> Tensor:
        return (self.nu - self.mu.square()).clamp(self.MIN_VARIANCE, self.MAX_VARIANCE).sqrt()

    def update(self, target: Tensor, mask: Tensor) -> None:
        if self.enabled:
            super().update(target, mask)

    def normalize(self, value: Tensor) -> Tensor:
        return super().normalize(value) if self.enabled else value

    def normalized(self, prediction: Tensor) -> Tensor:
        return super().normalized(prediction) if self.enabled else prediction

    def decode(self, prediction: Tensor) -> Tensor:
        return super().decode(prediction) if self.enabled else prediction
