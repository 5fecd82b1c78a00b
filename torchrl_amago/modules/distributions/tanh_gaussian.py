"""Squashed Gaussians: the usual policy on [-1, 1].

Legend: A action size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, distributions
from torch.nn.functional import softplus

from torchrl_amago.modules.distributions import _noise as noise
from torchrl_amago.modules.distributions.base import (
    NO_SHAPE,
    PolicyDistribution,
    VectorDistribution,
)
from torchrl_amago.modules.distributions.bounds import (
    CLIP_ACTIONS,
    Bound,
    bounded,
    check_bounds,
    check_clip,
)


def log_tanh_slope(x: Tensor) -> Tensor:
    """``log(1 - tanh(x)^2)`` without cancellation, any shape.

    Example:
        >>> log_tanh_slope(torch.tensor([0.0, 50.0]))
        tensor([  0.0000, -98.6137])
    """
    return 2.0 * (math.log(2.0) - x - softplus(-2.0 * x))


class SquashedNormal(VectorDistribution):
    """Independent Gaussians, squashed to (-1, 1) by tanh.

    TorchRL's ``TanhNormal`` is the same function but for the clipping; building one at every step
    of a rollout costs more than all else here.

    Args:
        loc: ``[..., A]``, means before tanh.
        scale: ``[..., A]``, standard deviations before tanh.
        clip_actions: bounds that actions are clipped to before ``log_prob``.

    Example:
        >>> dist = SquashedNormal(torch.tensor([0.0, 9.0]), torch.tensor([0.1, 0.1]))
        >>> dist.deterministic_sample
        tensor([0.0000, 1.0000])
    """

    has_rsample = True
    arg_constraints: ClassVar[dict] = {}

    def __init__(
        self, loc: Tensor, scale: Tensor, clip_actions: tuple[float, float] = CLIP_ACTIONS
    ) -> None:
        super().__init__(loc.shape[:-1], loc.shape[-1:], validate_args=False)
        self.loc, self.scale, self.clip_actions = loc, scale, clip_actions

    def sample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        """Draw ``[*sample_shape, ..., A]``."""
        with torch.no_grad():
            return self.rsample(sample_shape)

    def rsample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        """Draw ``[*sample_shape, ..., A]`` with gradient: ``tanh(loc + scale * noise)``."""
        return self._unsquashed(sample_shape).tanh()

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-density ``[...]`` of actions, clipped."""
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
    """A squashed Gaussian for each number of the action (arXiv 1801.01290, Appendix C).

    Parameters are A means before tanh, then A numbers that become standard deviations.

    Args:
        space: continuous actions.
        std_low: lower bound of standard deviations.
        std_high: upper bound; None for none (``"softplus"`` only).
        std_bound: how numbers get between the bounds, :func:`tanh_bounded` or
            :func:`softplus_bounded`.
        clip_actions: bounds that actions are clipped to before ``log_prob``.

    Raises:
        ValueError: if the space doesn't fit, or bounds contradict one another.

    Example:
        >>> from torchrl.data import Bounded
        >>> from torchrl_amago.action_space import ActionSpace
        >>> policy_dist = TanhGaussian(ActionSpace.from_spec(Bounded(-1.0, 1.0, shape=(2,))))
        >>> policy_dist(torch.zeros(3, 4)).rsample().shape
        torch.Size([3, 2])
    """

    std_low: float = math.exp(-5.0)
    std_high: float | None = math.exp(2.0)
    std_bound: Bound = "tanh"
    clip_actions: tuple[float, float] = CLIP_ACTIONS

    kinds = ("continuous",)
    differentiable = True

    def __post_init__(self) -> None:
        super().__post_init__()
        check_bounds(self.std_low, self.std_high, self.std_bound, "std")
        check_clip(self.clip_actions)

    @property
    def num_params(self) -> int:
        """Mean and standard deviation of each number."""
        return 2 * self.space.size

    def _vectors(self, params: Tensor) -> SquashedNormal:
        loc, raw_std = params.chunk(2, -1)
        std = bounded(raw_std, self.std_bound, self.std_low, self.std_high)
        return SquashedNormal(loc, std, self.clip_actions)
