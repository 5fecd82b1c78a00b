"""Bounds of standard deviations and concentrations, and of actions in their log-probability."""

from __future__ import annotations

import math
import sys
from typing import Literal

from torch import Tensor
from torch.nn.functional import softplus

from torchrl_amago._validation import check_choice

Bound = Literal["tanh", "softplus"]

# At the very edge the density of an action, or its gradient, has no bound: the log-probability of
# a stored action is that of one a little inside. Bounds of the public AMAGO code.
CLIP_ACTIONS = (-0.99, 0.99)


def tanh_bounded(x: Tensor, low: float, high: float) -> Tensor:
    """Map to (low, high), evenly in the logarithm: ``low^(1 - u) high^u``, u = (tanh x + 1) / 2."""
    log_low, log_high = math.log(low), math.log(high)
    return (log_low + 0.5 * (log_high - log_low) * (x.tanh() + 1.0)).exp()


def softplus_bounded(x: Tensor, low: float, high: float | None = None) -> Tensor:
    """Map to (low, high]: ``min(low + log(1 + exp(x)), high)``; None is no upper bound."""
    return (softplus(x) + low).clamp_max(math.inf if high is None else high)


def bounded(x: Tensor, bound: Bound, low: float, high: float | None) -> Tensor:
    """Map by :func:`tanh_bounded` or :func:`softplus_bounded`."""
    return tanh_bounded(x, low, high) if bound == "tanh" else softplus_bounded(x, low, high)


def check_bounds(low: float, high: float | None, bound: str, name: str) -> None:
    """Raise ValueError if no positive number is between ``{name}_low`` and ``{name}_high``."""
    check_choice(f"the bound of {name}", bound, ("tanh", "softplus"))
    unbounded = high is None and bound == "softplus"
    if not 0.0 < low < (sys.float_info.max if unbounded else high or 0.0) < math.inf:
        raise ValueError(
            f"{name}_low must be positive and below {name}_high, got {low} and {high}. Both are "
            f"finite; {name}_high=None is no bound above, with 'softplus' only."
        )


def check_clip(clip_actions: tuple[float, float]) -> None:
    """Raise ValueError unless the argument ``clip_actions`` is inside of (-1, 1)."""
    low, high = clip_actions
    if not -1.0 < low < high < 1.0:
        raise ValueError(
            f"clip_actions must be two numbers inside (-1, 1), the lower first, got {clip_actions}."
            " At the edges log-probabilities are infinite; use (-0.999, 0.999) to clip less."
        )
