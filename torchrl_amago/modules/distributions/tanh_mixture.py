"""Mixtures of squashed Gaussians, for data with several good ways to act.

Legend: A action size, N modes.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, distributions

from torchrl_amago._validation import check_counts
from torchrl_amago.modules.distributions import _noise as noise
from torchrl_amago.modules.distributions.base import (
    NO_SHAPE,
    PolicyDistribution,
    VectorDistribution,
)
from torchrl_amago.modules.distributions.bounds import Bound, bounded, check_bounds
from torchrl_amago.modules.distributions.tanh_gaussian import log_tanh_slope


class SquashedMixture(VectorDistribution):
    """A mixture of N Gaussians over whole actions, squashed to (-1, 1) by tanh.

    Args:
        loc: ``[..., N, A]``, means before tanh.
        scale: ``[..., N, A]``, standard deviations before tanh.
        logits: ``[..., N]``, unnormalised log-probabilities of the modes.

    Example:
        >>> loc = torch.tensor([[-2.0], [2.0]])
        >>> dist = SquashedMixture(loc, torch.full_like(loc, 0.1), torch.tensor([0.0, 9.0]))
        >>> dist.log_prob(torch.tensor([0.95])) > dist.log_prob(torch.tensor([-0.95]))
        tensor(True)
    """

    arg_constraints: ClassVar[dict] = {}

    # How near to -1 and 1 actions are taken to be at most, and what keeps the slope of tanh there
    # from vanishing in their log-density: the public AMAGO code's.
    EDGE = 1e-6

    def __init__(self, loc: Tensor, scale: Tensor, logits: Tensor) -> None:
        super().__init__(loc.shape[:-2], loc.shape[-1:], validate_args=False)
        normal = distributions.Normal(loc, scale, validate_args=False)
        self.mixture = distributions.MixtureSameFamily(
            distributions.Categorical(logits=logits, validate_args=False),
            distributions.Independent(normal, 1, validate_args=False),
            validate_args=False,
        )

    def sample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        """Draw ``[*sample_shape, ..., A]``."""
        return self._unsquashed(sample_shape).tanh()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density ``[...]`` of actions."""
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
            loc, scale = (
                x.expand(*sample_shape, *x.shape).gather(-2, index).squeeze(-2)
                for x in (normal.loc, normal.scale)
            )
            return loc + scale * noise.standard_normal(loc.shape, loc)


@dataclass(frozen=True)
class TanhMixture(PolicyDistribution):
    """A mixture of squashed Gaussians, for data with several good ways to act; no ``rsample``.

    Parameters are the means of each mode in turn (N x A), as many numbers that become standard
    deviations, then N logits of the modes.

    Args:
        space: continuous actions.
        num_modes: N.
        std_low: lower bound of standard deviations.
        std_high: upper bound; None for none (``"softplus"`` only).
        std_bound: how numbers get between the bounds, :func:`tanh_bounded` or
            :func:`softplus_bounded`.

    Raises:
        ValueError: if the space doesn't fit, there is no mode, or bounds contradict one another.

    Example:
        >>> from torchrl.data import Bounded
        >>> from torchrl_amago.action_space import ActionSpace
        >>> policy_dist = TanhMixture(ActionSpace.from_spec(Bounded(-1.0, 1.0, shape=(2,))))
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
        check_bounds(self.std_low, self.std_high, self.std_bound, "std")

    @property
    def num_params(self) -> int:
        """Means and standard deviations of every mode, and the modes' logits."""
        return self.num_modes * (2 * self.space.size + 1)

    def _vectors(self, params: Tensor) -> SquashedMixture:
        each = self.num_modes * self.space.size
        raw_loc, raw_std, logits = params.split([each, each, self.num_modes], -1)
        loc = raw_loc.unflatten(-1, (self.num_modes, self.space.size))
        std = bounded(raw_std, self.std_bound, self.std_low, self.std_high).view_as(loc)
        return SquashedMixture(loc, std, logits)
