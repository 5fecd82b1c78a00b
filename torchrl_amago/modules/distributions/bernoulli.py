"""Independent bits, for actions that switch several things on or off at once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor, distributions

from torchrl_amago.modules.distributions import _noise as noise
from torchrl_amago.modules.distributions.base import (
    NO_SHAPE,
    PolicyDistribution,
    VectorDistribution,
)


class Bits(VectorDistribution):
    """Independent bits as one vector of zeros and ones.

    Args:
        logits: ``[..., A]``, float, log-odds of a 1; -inf forbids it.
        reduce: whether ``log_prob`` is the ``"sum"`` over bits, the log-probability of the whole
            action, or their ``"mean"``. The entropy is that of the whole action in both cases.

    Example:
        >>> Bits(torch.tensor([9.0, -9.0])).deterministic_sample
        tensor([1., 0.])
    """

    arg_constraints: ClassVar[dict] = {}
    #: Log-probability, about, of a forbidden 1 in the data: one mustn't make a mean infinite.
    LOWEST_LOGIT = -20.0

    def __init__(self, logits: Tensor, reduce: Literal["sum", "mean"] = "mean") -> None:
        super().__init__(logits.shape[:-1], logits.shape[-1:], validate_args=False)
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
        """Draw ``[*sample_shape, ..., A]``, zeros and ones."""
        shape = torch.Size([*sample_shape, *self.probs.shape])
        return (noise.uniform(shape, self.probs) < self.probs).to(self.probs.dtype)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability ``[...]``, summed or averaged over bits."""
        log_prob = self.bits.log_prob(value)
        return log_prob.sum(-1) if self.reduce == "sum" else log_prob.mean(-1)

    def entropy(self) -> Tensor:
        """Entropy ``[...]``, nats, exact."""
        return self.bits.entropy().sum(-1)

    @property
    def deterministic_sample(self) -> Tensor:
        """The more probable value of each bit, ``[..., A]``."""
        return (self.bits.logits > 0).to(self.bits.logits.dtype)


@dataclass(frozen=True)
class Bernoulli(PolicyDistribution):
    """Independent bits; parameters are log-odds.

    Args:
        space: multi-binary actions.
        reduce: ``"sum"`` makes ``log_prob`` the log-probability of the whole action; ``"mean"``
            averages over bits, as the public AMAGO code does, so that the actor's loss doesn't grow
            with their number.

    Raises:
        ValueError: if the space doesn't fit, or ``reduce`` is neither.

    Example:
        >>> from torchrl.data import Binary
        >>> from torchrl_amago.action_space import ActionSpace
        >>> policy_dist = Bernoulli(ActionSpace.from_spec(Binary(3)), reduce="sum")
        >>> policy_dist(torch.zeros(3)).log_prob(torch.ones(3)).exp()
        tensor(0.1250)
    """

    reduce: Literal["sum", "mean"] = "mean"

    kinds = ("multi_binary",)
    differentiable = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reduce not in ("sum", "mean"):
            raise ValueError(
                f"reduce must be 'sum' or 'mean', got {self.reduce!r}. It is how log-probabilities "
                "of single bits become that of an action."
            )

    @property
    def num_params(self) -> int:
        """The log-odds of each bit."""
        return self.space.size

    def _vectors(self, params: Tensor) -> Bits:
        return Bits(params, self.reduce)
