"""Distributions over numbers in [-1, 1]: Gaussians squashed by tanh, mixtures of them, Betas.

Legend: A action size, N modes.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, distributions
from torch.nn.functional import softplus

from torchrl_amago._validation import check_choice, check_counts
from torchrl_amago.modules.distributions import _noise as noise
from torchrl_amago.modules.distributions.base import (
    NO_SHAPE,
    PolicyDistribution,
    VectorDistribution,
)

Bound = Literal["tanh", "softplus"]

# At the very edge the density of an action, or its gradient, has no bound: the log-probability of
# a stored action is that of one a little inside. Bounds of the public AMAGO code.
CLIP_ACTIONS = (-0.99, 0.99)
_LOG_2 = math.log(2.0)


def tanh_bounded(x: Tensor, low: float, high: float) -> Tensor:
    """Map to (low, high), evenly in the logarithm: ``low^(1 - u) high^u``, u = (tanh x + 1) / 2."""
    log_low, log_high = math.log(low), math.log(high)
    return (log_low + 0.5 * (log_high - log_low) * (x.tanh() + 1.0)).exp()


def softplus_bounded(x: Tensor, low: float, high: float | None = None) -> Tensor:
    """Map to (low, high]: ``min(low + log(1 + exp(x)), high)``; None is no upper bound."""
    return (softplus(x) + low).clamp_max(math.inf if high is None else high)


def _bounded(x: Tensor, bound: Bound, low: float, high: float | None) -> Tensor:
    return tanh_bounded(x, low, high) if bound == "tanh" else softplus_bounded(x, low, high)


def _check_bounds(low: float, high: float | None, bound: str, name: str) -> None:
    check_choice(f"the bound of {name}", bound, ("tanh", "softplus"))
    unbounded = high is None and bound == "softplus"
    if not 0.0 < low < (sys.float_info.max if unbounded else high or 0.0) < math.inf:
        raise ValueError(
            f"{name}_low must be positive and below {name}_high, got {low} and {high}. Both are "
            f"finite; {name}_high=None is no bound above, with 'softplus' only."
        )


def _check_clip(clip_actions: tuple[float, float]) -> None:
    low, high = clip_actions
    if not -1.0 < low < high < 1.0:
        raise ValueError(
            f"clip_actions must be two numbers inside (-1, 1), the lower first, got {clip_actions}."
            " At the edges log-probabilities are infinite; use (-0.999, 0.999) to clip less."
        )


def log_tanh_slope(x: Tensor) -> Tensor:
    """Compute ``log(1 - tanh(x)^2)`` without cancellation, any shape."""
    return 2.0 * (_LOG_2 - x - softplus(-2.0 * x))


class SquashedNormal(VectorDistribution):
    """Independent Gaussians ``[..., A]`` of mean ``loc``, squashed to (-1, 1) by tanh.

    TorchRL's ``TanhNormal`` is the same but for the clipping, and slow to build at every step.
    """

    has_rsample = True

    def __init__(
        self, loc: Tensor, scale: Tensor, clip_actions: tuple[float, float] = CLIP_ACTIONS
    ) -> None:
        super().__init__(loc)
        self.loc, self.scale, self.clip_actions = loc, scale, clip_actions

    def rsample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        return self._unsquashed(sample_shape).tanh()

    def log_prob(self, value: Tensor) -> Tensor:
        return self._log_prob_of_unsquashed(value.clamp(*self.clip_actions).atanh())

    def entropy(self) -> Tensor:
        """Entropy ``[...]``, nats, estimated from one sample, with gradient; nothing is clipped."""
        return -self._log_prob_of_unsquashed(self._unsquashed(NO_SHAPE))

    @property
    def deterministic_sample(self) -> Tensor:
        """``tanh(loc)``, the median, ``[..., A]``."""
        return self.loc.tanh()

    def _unsquashed(self, sample_shape: torch.Size) -> Tensor:
        shape = torch.Size([*sample_shape, *self.loc.shape])
        return self.loc + self.scale * noise.standard_normal(shape, self.loc)

    def _log_prob_of_unsquashed(self, x: Tensor) -> Tensor:
        normal = distributions.Normal(self.loc, self.scale, validate_args=False)
        return (normal.log_prob(x) - log_tanh_slope(x)).sum(-1)


@dataclass(frozen=True)
class TanhGaussian(PolicyDistribution):
    """A squashed Gaussian for each number of a continuous action (arXiv 1801.01290, Appendix C).

    Parameters are A means before tanh, then A numbers that become standard deviations.

    Args:
        std_low: lower bound of standard deviations.
        std_high: upper bound; None for none (``"softplus"`` only).
        std_bound: map into the bounds, :func:`tanh_bounded` or :func:`softplus_bounded`.
        clip_actions: bounds that actions are clipped to before ``log_prob``.

    Example:
        >>> from torchrl_amago.action_space import ActionSpace
        >>> policy_dist = TanhGaussian(ActionSpace("continuous", shape=(2,), dtype=torch.float32))
        >>> policy_dist(torch.zeros(3, 4)).rsample().shape
        torch.Size([3, 2])
    """

    std_low: float = math.exp(-5.0)
    std_high: float | None = math.exp(2.0)
    std_bound: Bound = "tanh"
    clip_actions: tuple[float, float] = CLIP_ACTIONS

    kinds = ("continuous",)
    differentiable, params_per_number = True, 2

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_bounds(self.std_low, self.std_high, self.std_bound, "std")
        _check_clip(self.clip_actions)

    def _vectors(self, params: Tensor) -> SquashedNormal:
        loc, raw_std = params.chunk(2, -1)
        std = _bounded(raw_std, self.std_bound, self.std_low, self.std_high)
        return SquashedNormal(loc, std, self.clip_actions)


class SquashedMixture(VectorDistribution):
    """Mixture of N Gaussians ``[..., N, A]`` over actions, squashed by tanh; no ``rsample``."""

    #: Smallest distance from -1 and 1 in ``log_prob``, and lower bound of tanh's slope there; from
    #: the public AMAGO code.
    EDGE = 1e-6

    def __init__(self, loc: Tensor, scale: Tensor, logits: Tensor) -> None:
        super().__init__(loc[..., 0, :])
        normal = distributions.Normal(loc, scale, validate_args=False)
        self.mixture = distributions.MixtureSameFamily(
            distributions.Categorical(logits=logits, validate_args=False),
            distributions.Independent(normal, 1, validate_args=False),
            validate_args=False,
        )

    def sample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        return self._unsquashed(sample_shape).tanh()

    def log_prob(self, value: Tensor) -> Tensor:
        above, below = (1.0 + value).clamp_min(self.EDGE), (1.0 - value).clamp_min(self.EDGE)
        log_slope = (1.0 - value.square() + self.EDGE).log()
        return self.mixture.log_prob(0.5 * (above / below).log()) - log_slope.sum(-1)

    def entropy(self) -> Tensor:
        """Entropy ``[...]``, nats, estimated from one sample; its gradient is not the entropy's."""
        x = self._unsquashed(NO_SHAPE)
        return log_tanh_slope(x).sum(-1) - self.mixture.log_prob(x)

    @property
    def deterministic_sample(self) -> Tensor:
        """Tanh of the mixture's mean before tanh, ``[..., A]``; between modes, if they differ."""
        return self.mixture.mean.tanh()

    def _unsquashed(self, sample_shape: torch.Size) -> Tensor:
        normal = self.mixture.component_distribution.base_dist
        with torch.no_grad():
            mode = noise.categorical(self.mixture.mixture_distribution.probs, sample_shape)
            index = mode[..., None, None].expand(*mode.shape, 1, *self.event_shape)
            expanded = (x.expand(*sample_shape, *x.shape) for x in (normal.loc, normal.scale))
            loc, scale = (x.gather(-2, index).squeeze(-2) for x in expanded)
            return loc + scale * noise.standard_normal(loc.shape, loc)


@dataclass(frozen=True)
class TanhMixture(PolicyDistribution):
    """A mixture of squashed Gaussians, for data with several good ways to act; no ``rsample``.

    Parameters are the means of each mode in turn (N x A), as many numbers that become standard
    deviations, then N logits of the modes. ``num_modes`` is N; others: see :class:`TanhGaussian`.

    Example:
        >>> from torchrl_amago.action_space import ActionSpace
        >>> policy_dist = TanhMixture(ActionSpace("continuous", shape=(2,), dtype=torch.float32))
        >>> policy_dist.num_params, policy_dist(torch.zeros(25)).sample().shape
        (25, torch.Size([2]))
    """

    num_modes: int = 5
    std_low: float = 1e-4
    std_high: float | None = None
    std_bound: Bound = "softplus"

    kinds = ("continuous",)
    differentiable = False

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts("It is the number of Gaussians that are mixed.", num_modes=self.num_modes)
        _check_bounds(self.std_low, self.std_high, self.std_bound, "std")

    @property
    def num_params(self) -> int:
        """Means and standard deviations of every mode, and the modes' logits."""
        return self.num_modes * (2 * self.space.size + 1)

    def _vectors(self, params: Tensor) -> SquashedMixture:
        each = self.num_modes * self.space.size
        raw_loc, raw_std, logits = params.split([each, each, self.num_modes], -1)
        loc = raw_loc.unflatten(-1, (self.num_modes, self.space.size))
        std = _bounded(raw_std, self.std_bound, self.std_low, self.std_high).view_as(loc)
        return SquashedMixture(loc, std, logits)


class StretchedBeta(VectorDistribution):
    """Independent Betas ``[..., A]`` on [-1, 1], alpha towards 1; the entropy is exact."""

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

    Parameters are A numbers that become alpha, then A that become beta; above 1 the density is one
    hump. ``alpha_low``, ``alpha_high``, ``beta_low``, ``beta_high`` and ``concentration_bound`` are
    as the bounds of :class:`TanhGaussian`.

    Example:
        >>> from torchrl_amago.action_space import ActionSpace
        >>> policy_dist = Beta(ActionSpace("continuous", shape=(2,), dtype=torch.float32))
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
        _check_bounds(self.alpha_low, self.alpha_high, self.concentration_bound, "alpha")
        _check_bounds(self.beta_low, self.beta_high, self.concentration_bound, "beta")
        _check_clip(self.clip_actions)

    def _vectors(self, params: Tensor) -> StretchedBeta:
        raw_alpha, raw_beta = params.chunk(2, -1)
        alpha = _bounded(raw_alpha, self.concentration_bound, self.alpha_low, self.alpha_high)
        beta = _bounded(raw_beta, self.concentration_bound, self.beta_low, self.beta_high)
        return StretchedBeta(alpha, beta, self.clip_actions)
