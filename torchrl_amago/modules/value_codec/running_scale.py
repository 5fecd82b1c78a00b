"""Scalar values in units of their targets' running root mean square.

Legend: N targets, G discounts.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from torchrl_amago.modules.value_codec._scaled import ScaledCodec


class RunningScale(ScaledCodec):
    """Scalar values less their mean, by their root mean square; the pace of learning follows it.

    The first targets set mean and scale, later ones move them while outputs are preserved. The
    change then moves from codec into the critics' last layers, online and target alike, as in the
    original method (arXiv 1602.07714, Algorithm 1). So an optimizer whose steps don't depend on the
    gradient's scale, as Adam's, moves values by the same part of their size, whether rewards are
    hundredths or hundreds. :class:`PopArt` leaves the critics alone, as the public AMAGO code does,
    which makes it the same part of ``sqrt(initial_nu)`` for ever. Unlike a deviation, the scale
    doesn't vanish while all targets are alike, as where each step costs 1.

    Args:
        num_discounts: G, size of the predictions' last dimension.
        beta: step size of the moving averages, in (0, 1].

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> codec = RunningScale(num_discounts=1)
        >>> codec.update(torch.tensor([[4.0], [6.0]]), torch.ones(2, 1, dtype=torch.bool))
        >>> codec.decode(torch.tensor([2.0]))
        tensor([15.1980])
    """

    MIN_SQUARE, MAX_SQUARE = 1e-8, 1e12

    def __init__(self, num_discounts: int, beta: float = 0.01) -> None:
        super().__init__(num_discounts, beta)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()
        self.weight.fill_(1.0)

    @property
    def sigma(self) -> Tensor:
        return self.nu.clamp(self.MIN_SQUARE, self.MAX_SQUARE).sqrt()

    @torch.no_grad()
    def update(self, target: Tensor, mask: Tensor) -> None:
        is_first, old_mu, old_sigma = self.count == 0, self.mu.clone(), self.sigma
        step, mean_G, square_mean_G = self._count_moments(target, mask)
        self.mu.lerp_(mean_G.to(self.mu.dtype), step)
        self.nu.lerp_(square_mean_G.to(self.nu.dtype), step)
        # Critics that haven't learned anything take the first scale as it is.
        self._preserve(
            torch.where(is_first, self.mu, old_mu), torch.where(is_first, self.sigma, old_sigma)
        )

    @torch.no_grad()
    def absorb_scale(self, critic: nn.Module, *params: TensorDictBase) -> None:
        if absorb := getattr(critic, "absorb_scale", None):
            for of_network in params:
                weight, bias = absorb(of_network, self.weight, self.bias)
            self.weight.copy_(weight)
            self.bias.copy_(bias)
