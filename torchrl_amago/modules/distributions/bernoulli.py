"""Independent bits, for actions that switch several things on or off at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, distributions

from torchrl_amago._validation import check_choice
from torchrl_amago.modules.distributions import _noise as noise
from torchrl_amago.modules.distributions.base import (
    NO_SHAPE,
    PolicyDistribution,
    VectorDistribution,
)


class Bits(VectorDistribution):
    """Independent bits ``[..., A]``, zeros and ones; the entropy is exact.

    ``logits`` are log-odds of a 1; -inf forbids it.
    """

    #: Log-probability, about, of a forbidden 1 in the data: one mustn't make a mean infinite.
    LOWEST_LOGIT = -20.0

    def __init__(self, logits: Tensor, reduce: Literal["sum", "mean"] = "mean") -> None:
        super().__init__(logits)
        self.reduce = reduce
        # A forbidden bit's infinite log-odds would make products with 0 NaN.
        finite = logits.clamp_min(self.LOWEST_LOGIT)
        self.bits = distributions.Bernoulli(logits=finite, validate_args=False)
        self._is_forbidden = logits == -torch.inf

    @property
    def probs(self) -> Tensor:
        """Probability of a 1, ``[..., A]``; exactly 0 where it is forbidden."""
        return self.bits.probs.masked_fill(self._is_forbidden, 0.0)

    def sample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        shape = torch.Size([*sample_shape, *self.probs.shape])
        return (noise.uniform(shape, self.probs) < self.probs).to(self.probs.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        log_prob = self.bits.log_prob(value)
        return log_prob.sum(-1) if self.reduce == "sum" else log_prob.mean(-1)

    def entropy(self) -> Tensor:
        return self.bits.entropy().sum(-1)

    @property
    def deterministic_sample(self) -> Tensor:
        """The more probable value of each bit, ``[..., A]``."""
        return (self.bits.logits > 0).to(self.bits.logits.dtype)


@dataclass(frozen=True)
class Bernoulli(PolicyDistribution):
    """Independent bits, for multi-binary actions; parameters are log-odds.

    Args:
        reduce: ``"sum"`` makes ``log_prob`` the log-probability of the whole action. ``"mean"``
            averages over bits, as the public AMAGO code does, so that the actor's loss doesn't grow
            with their number. The entropy is that of the whole action in both cases.

    Example:
        >>> from torchrl.data import Binary
        >>> from torchrl_amago.action_space import ActionSpace
        >>> policy_dist = Bernoulli(ActionSpace.from_spec(Binary(3)), reduce="sum")
        >>> policy_dist(torch.zeros(3)).log_prob(torch.ones(3)).exp()
        tensor(0.1250)
    """

    reduce: Literal["sum", "mean"] = "mean"

    kinds = ("multi_binary",)
    differentiable, params_per_number = False, 1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_choice("reduce", self.reduce, ("sum", "mean"))

    def _vectors(self, params: Tensor) -> Bits:
        return Bits(params, self.reduce)
