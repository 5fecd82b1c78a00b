"""Scalar values in units of their targets' running mean and deviation.

Legend: N targets, G discounts.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from torchrl_amago._validation import check_fractions, check_positive
from torchrl_amago.modules.value_codec._scaled import ScaledCodec


class RunningScale(ScaledCodec):
    """Scalar values, normalised as :class:`PopArt`'s, whose pace of learning follows the scale.

    The first targets set mean and deviation, later ones move them while outputs are preserved. The
    change then moves from codec into the critics' last layers, online and target alike, as in the
    original method (arXiv 1602.07714, Algorithm 1). So an optimizer whose steps don't depend on the
    gradient's scale, as Adam's, moves values by the same part of their deviation whether rewards
    are hundredths or hundreds. Under :class:`PopArt`, which leaves the critics alone as the public
    AMAGO code does, it moves them by the same part of ``sqrt(initial_nu)`` for ever.

    Args:
        num_discounts: G, size of the predictions' last dimension.
        beta: step size of the moving averages, in (0, 1].

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> codec = RunningScale(num_discounts=1)
        >>> codec.update(torch.tensor([[4.0], [6.0]]), torch.ones(2, 1, dtype=torch.bool))
        >>> codec.decode(torch.tensor([2.0]))
        tensor([7.0000])
    """

    MIN_VARIANCE, MAX_VARIANCE = 1e-8, 1e12

    def __init__(self, num_discounts: int, beta: float = 0.01) -> None:
        super().__init__()
        check_positive("Use 0.01.", beta=beta)
        check_fractions("It is the step size of moving averages.", beta=beta)
        self.num_discounts, self.beta = num_discounts, beta
        for name in ("mu", "variance", "weight", "bias"):
            self.register_buffer(name, torch.empty(num_discounts))
        self.register_buffer("count", torch.empty(()))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()
        self.weight.fill_(1.0)

    @property
    def sigma(self) -> Tensor:
        return self.variance.clamp(self.MIN_VARIANCE, self.MAX_VARIANCE).sqrt()

    @torch.no_grad()
    def update(self, target: Tensor, mask: Tensor) -> None:
        target_NG = torch.where(mask, target, self.mu).float().flatten(0, -2)
        (num_real,) = self.all_reduce(mask.sum())
        weight_N1 = mask.flatten(0, -2) / num_real.clamp_min(1)
        (change_G,) = self.all_reduce((weight_N1 * (target_NG - self.mu)).sum(0))
        deviation_NG = target_NG - self.mu - change_G
        (variance_G,) = self.all_reduce((weight_N1 * deviation_NG.square()).sum(0))
        any_real = (num_real > 0).to(self.count.dtype)
        is_first, old_mu, old_sigma = self.count == 0, self.mu.clone(), self.sigma
        self.count += any_real
        # The average of all targets at first; a batch without real ones moves nothing.
        step = any_real * self.beta / (1.0 - (1.0 - self.beta) ** self.count.clamp_min(1))
        self.variance.lerp_(variance_G, step).add_(step * (1.0 - step) * change_G.square())
        self.mu += step * change_G
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
