"""The objective: AMAGO's loss, its mathematics in ``functional``, choices in ``presets``."""

from torchrl_amago.objectives.amago import AMAGOLoss
from torchrl_amago.objectives.functional import (
    binary_filter,
    exponential_filter,
    leaky_relu_filter,
    masked_mean,
    n_step_target,
)
from torchrl_amago.objectives.presets import LOSSES, amago2_loss, amago_loss

__all__ = [
    "LOSSES", "AMAGOLoss", "amago2_loss", "amago_loss", "binary_filter", "exponential_filter",
    "leaky_relu_filter", "masked_mean", "n_step_target",
]  # fmt: skip
