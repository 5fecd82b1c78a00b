"""Beta distributions, stretched to [-1, 1]: bounded without squashing.

Legend: A action size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, distributions

from torchrl_amago.modules.distributions._bounds import (
    CLIP_ACTIONS,
    Bound,
    bounded,
    check_bounds,
    check_clip,
)
from torchrl_amago.modules.distributions.base import (
    NO_SHAPE,
    PolicyDistribution,
    VectorDistribution,
)

_LOG_2 = math.log(2.0)


class StretchedBeta(VectorDistribution):
    """Independent Beta distributions ``[..., A]``, stretched from [0, 1] to [-1, 1].

    ``alpha`` are concentrations towards 1, ``beta`` towards -1. The entropy is exact.
    """

    has_rsample = True

    def __init__(
        self, alpha: Tensor, beta: Tensor, clip_actions: tuple[float, float] = CLIP_ACTIONS
    ) -> None:
        super().__init__(alpha)
        self.clip_actions = clip_actions
        self.unit = distributions.Beta(alpha, beta, validate_args=False)

    def rsample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        return 2.0 * self.unit.rsample(sample_shape) - 1.0

    def log_prob(self, value: Tensor) -> Tensor:
        unit = 0.5 * (value.clamp(*self.clip_actions) + 1.0)
        return (self.unit.log_prob(unit) - _LOG_2).sum(-1)

    def entropy(self) -> Tensor:
        return (self.unit.entropy() + _LOG_2).sum(-1)

    @property
    def deterministic_sample(self) -> Tensor:
        return 2.0 * self.unit.mean - 1.0


@dataclass(frozen=True)
class Beta(PolicyDistribution):
    """A Beta distribution for each number of a continuous action (Chou et al. 2017, ICML).

    Parameters are A numbers that become alpha, then A that become beta. Both above 1 keep the
    density in one hump that vanishes at the edges.

    Args:
        alpha_low: lower bound of alpha, as ``beta_low`` of beta.
        alpha_high: upper bound of alpha, as ``beta_high`` of beta; None for none (``"softplus"``
            only).
        concentration_bound: map of the numbers into the bounds, :func:`tanh_bounded` or
            :func:`softplus_bounded`.
        clip_actions: bounds that actions are clipped to before ``log_prob``.

    Example:
        >>> from torchrl.data import Bounded
        >>> from torchrl_amago.action_space import ActionSpace
        >>> policy_dist = Beta(ActionSpace.from_spec(Bounded(-1.0, 1.0, shape=(2,))))
        >>> policy_dist(torch.zeros(4)).deterministic_sample
        tensor([0., 0.])
    """

    alpha_low: float = 1.0001
    alpha_high: float | None = None
    beta_low: float = 1.0001
    beta_high: float | None = None
    concentration_bound: Bound = "softplus"
    clip_actions: tuple[float, float] = CLIP_ACTIONS

    kinds = ("continuous",)
    differentiable, params_per_number = True, 2

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self.alpha_low, self.alpha_high, self.concentration_bound, "alpha")
        check_bounds(self.beta_low, self.beta_high, self.concentration_bound, "beta")
        check_clip(self.clip_actions)

    def _vectors(self, params: Tensor) -> StretchedBeta:
        raw_alpha, raw_beta = params.chunk(2, -1)
        alpha = bounded(raw_alpha, self.concentration_bound, self.alpha_low, self.alpha_high)
        beta = bounded(raw_beta, self.concentration_bound, self.beta_low, self.beta_high)
        return StretchedBeta(alpha, beta, self.clip_actions)
