"""The objective: pure functions of tensors in ``functional``, the loss module in ``amago``.

``networks`` holds its networks, keys and calls, ``batch`` reads batches, ``checks`` are its errors,
``critics`` is how the loss asks critics of both kinds, ``metrics`` what it tells of an update,
``presets`` are the published choices.
"""

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
    "LOSSES",
    "AMAGOLoss",
    "amago2_loss",
    "amago_loss",
    "binary_filter",
    "exponential_filter",
    "leaky_relu_filter",
    "masked_mean",
    "n_step_target",
]
