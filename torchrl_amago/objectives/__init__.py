"""The objective: pure functions of tensors in ``functional``, the loss module in ``amago``."""

from torchrl_amago.objectives.amago import AMAGOLoss
from torchrl_amago.objectives.functional import (
    binary_filter,
    exponential_filter,
    leaky_relu_filter,
    masked_mean,
    n_step_target,
)

__all__ = [
    "AMAGOLoss",
    "binary_filter",
    "exponential_filter",
    "leaky_relu_filter",
    "masked_mean",
    "n_step_target",
]
