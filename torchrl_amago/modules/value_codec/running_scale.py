"""Scalar values in units of the size of their largest targets.

Legend: N targets, G discounts.
"""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn

from torchrl_amago._validation import check_choice
from torchrl_amago.modules.value_codec._scaled import ScaledCodec


class RunningScale(ScaledCodec):
    """Scalar values less their mean, by the size of large targets; the pace of learning follows it.

    The scale is the fourth root of the targets' mean fourth power. Where few of them are large, as
    near a rare reward, it is closer to their size than a root mean square; and it doesn't vanish
    while all are alike, as a deviation does where each step costs 1.

    The first targets set mean and scale, later ones move them while outputs are preserved. The
    change then moves from codec into the critics' last layers, online and target alike, as in the
    original method (arXiv 1602.07714, Algorithm 1). So an optimizer whose steps don't depend on the
    gradient's scale, as Adam's, moves values by the same part of their size, whether rewards are
    hundredths or hundreds. :class:`PopArt` leaves the critics alone, as the public AMAGO code does,
    which makes it the same part of ``sqrt(initial_nu)`` for ever.

    Args:
        num_discounts: G, size of the predictions' last dimension.
        beta: step size of the moving averages, in (0, 1].
        power: of the targets in the scale: 4, or 2 for the root mean square.

    Raises:
        ValueError: if a number is out of its range.

    Example:
        >>> codec = RunningScale(num_discounts=1)
        >>> codec.update(torch.tensor([[6.0], [6.0]]), torch.ones(2, 1, dtype=torch.bool))
        >>> codec.decode(torch.tensor([2.0]))
        tensor([18.0000])
    """

    MIN_SCALE, MAX_SCALE = 1e-4, 1e6

    def __init__(self, num_discounts: int, beta: float = 0.01, power: int = 4) -> None:
        super().__init__(num_discounts, beta)
        check_choice("power", power, (2, 4), "2 is for the root mean square.")
        self.power = power
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for buffer in self.buffers():
            buffer.zero_()
        self.weight.fill_(1.0)

    @property
    def sigma(self) -> Tensor:
        return self.nu.pow(1.0 / self.power).clamp(self.MIN_SCALE, self.MAX_SCALE)

    @torch.no_grad()
    def absorb_scale(self, critic: nn.Module, *params: TensorDictBase) -> None:
        if absorb := getattr(critic, "absorb_scale", None):
            for of_network in params:
                weight, bias = absorb(of_network, self.weight, self.bias)
            self.weight.copy_(weight)
            self.bias.copy_(bias)
