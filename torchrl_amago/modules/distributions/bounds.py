"""Bounds: of standard deviations and concentrations, and of actions before their log-probability."""

from __future__ import annotations

import math
from typing import Literal

from torch import Tensor
from torch.nn.functional import softplus

Bound = Literal["tanh", "softplus"]

# At the very edge the density of an action, or its gradient, has no bound: the log-probability of
# a stored action is that of one a little inside. Bounds of the public AMAGO code.
CLIP_ACTIONS = (-0.99, 0.99)


def tanh_bounded(x: Tensor, low: float, high: float) -> Tensor:
    """Map to (low, high), evenly in the logarithm: ``low^(1 - u) high^u``, u = (tanh(x) + 1) / 2.

    Args:
        x: any shape, float.
        low: above 0.
        high: above ``low``.

    Example:
        >>> import torch
        >>> tanh_bounded(torch.tensor([-9.0, 0.0, 9.0]), 0.25, 4.0)
        tensor([0.2500, 1.0000, 4.0000])
    """
    log_low, log_high = math.log(low), math.log(high)
    return (log_low + 0.5 * (log_high - log_low) * (x.tanh() + 1.0)).exp()


def softplus_bounded(x: Tensor, low: float, high: float | None = None) -> Tensor:
    """Map to (low, high]: ``min(low + log(1 + exp(x)), high)``; no bound above if ``high`` is None.

    Args:
        x: any shape, float.
        low: at least 0.
        high: above ``low``; where it holds, the gradient is zero.

    Example:
        >>> import torch
        >>> softplus_bounded(torch.tensor([-99.0, 0.0, 99.0]), 0.5, 4.0)
        tensor([0.5000, 1.1931, 4.0000])
    """
    return (softplus(x) + low).clamp_max(math.inf if high is None else high)


def bounded(x: Tensor, bound: Bound, low: float, high: float | None) -> Tensor:
    """Either of the above by name, any shape.

    Example:
        >>> import torch
        >>> bounded(torch.zeros(1), "tanh", 0.25, 4.0)
        tensor([1.])
    """
    return tanh_bounded(x, low, high) if bound == "tanh" else softplus_bounded(x, low, high)


def check_bounds(low: float, high: float | None, bound: str, name: str) -> None:
    """Refuse bounds that hold no positive number.

    Args:
        low: what is above it.
        high: what is below it, or None.
        bound: how numbers get between them.
        name: what is bounded, for the message: ``{name}_low`` and ``{name}_high`` are arguments.

    Raises:
        ValueError: naming the arguments.
    """
    if bound not in ("tanh", "softplus"):
        raise ValueError(
            f"{name} must be bounded by 'tanh' (between both bounds) or 'softplus' (above the lower "
            f"one), got {bound!r}."
        )
    if not (0.0 < low < math.inf) or (high is not None and not low < high < math.inf):
        raise ValueError(
            f"{name}_low must be positive and below {name}_high, got {low} and {high}. Both are finite; "
            f"{name}_high=None with 'softplus' is no bound above."
        )
    if bound == "tanh" and high is None:
        raise ValueError(
            f"'tanh' needs a finite {name}_high, got None. Give one, or use 'softplus'."
        )


def check_clip(clip_actions: tuple[float, float]) -> None:
    """Refuse bounds that aren't inside of (-1, 1).

    Raises:
        ValueError: naming the argument ``clip_actions``.
    """
    low, high = clip_actions
    if not -1.0 < low < high < 1.0:
        raise ValueError(
            f"clip_actions must be two numbers inside (-1, 1), the lower first, got {clip_actions}. "
            "At the edges log-probabilities are infinite; use (-0.999, 0.999) to clip less."
        )
