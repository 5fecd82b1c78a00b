"""Distributions over categories and bits; -inf forbids one, all others keep a probability.

Legend: A length of the action vector (categories of all parts together).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, distributions
from torch.distributions import Categorical, Distribution

from torchrl_amago._validation import check_choice, check_positive
from torchrl_amago.action_space import join_parts, one_hot_parts, split_parts
from torchrl_amago.modules.distributions import _noise as noise
from torchrl_amago.modules.distributions.base import (
    NO_SHAPE,
    PolicyDistribution,
    VectorDistribution,
)

# Bounds of the public AMAGO code; a probability never reaches 0, so that log-probabilities of
# stored actions stay finite and every action keeps being tried.
CLIP_LOW, CLIP_HIGH = 1e-3, 0.99


def clip_probabilities(
    probs: Tensor, low: float = CLIP_LOW, high: float = CLIP_HIGH, forbidden: Tensor | None = None
) -> Tensor:
    """Clip probabilities (or a one-hot) ``[..., A]`` to ``[low, high]`` and renormalise them.

    Forbidden categories, bool ``[..., A]``, get exactly 0, without gradient, and don't count in the
    clipping. Entries may leave ``[low, high]`` by the renormalisation.
    """
    clipped = probs.clamp(low, high)
    if forbidden is not None:
        clipped = clipped.masked_fill(forbidden, 0.0)
    return clipped / clipped.sum(-1, keepdim=True)


def clipped_softmax(logits: Tensor, low: float = CLIP_LOW, high: float = CLIP_HIGH) -> Tensor:
    """Compute clipped probabilities of logits ``[..., A]``; -inf forbids a category."""
    return clip_probabilities(logits.softmax(-1), low, high, forbidden=logits == -torch.inf)


class ClippedCategorical(Categorical):
    """Categorical distribution whose probabilities are clipped and renormalised.

    The log-probability of a forbidden action is that of the smallest number (about -16), so that
    one in the data doesn't make a mean infinite.

    Args:
        logits: ``[..., A]``, float, unnormalised log-probabilities; -inf forbids an action.
        clip_low, clip_high: bounds before renormalising, in ``[0, 1/A)`` and ``(0, 1]``.

    Example:
        >>> dist = ClippedCategorical(torch.tensor([10.0, 0.0]))
        >>> [round(p, 4) for p in dist.probs.tolist()], dist.mode.item()
        ([0.999, 0.001], 0)
    """

    def __init__(
        self, logits: Tensor, clip_low: float = CLIP_LOW, clip_high: float = CLIP_HIGH
    ) -> None:
        probs = clipped_softmax(logits, clip_low, clip_high)
        super().__init__(probs=probs, validate_args=False)

    def sample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        return noise.categorical(self.probs, sample_shape)

    @property
    def deterministic_sample(self) -> Tensor:
        return self.probs.argmax(-1)

    # An index has no mean: a greedy action is the same by any name.
    mean = deterministic_sample


class OneHotParts(VectorDistribution):
    """Independent choices, one for each part of an action, as one vector of one-hots ``[..., A]``.

    ``rsample`` is a straight-through Gumbel sample (arXiv 1611.01144, Section 2.2): a one-hot, with
    the gradient of the softmax that it is the argmax of. The entropy is exact.
    """

    has_rsample = True

    def __init__(
        self,
        logits: Tensor,
        sizes: Sequence[int],
        clip_low: float = CLIP_LOW,
        clip_high: float = CLIP_HIGH,
        temperature: float = 0.5,
    ) -> None:
        super().__init__(logits)
        self.sizes, self.temperature = tuple(sizes), temperature
        split = split_parts(logits, self.sizes)
        self.parts = [ClippedCategorical(part, clip_low, clip_high) for part in split]

    @property
    def probs(self) -> Tensor:
        """Probability of every category, ``[..., A]``; those of each part sum to one."""
        return join_parts([part.probs for part in self.parts])

    def sample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        return self._vector([part.sample(sample_shape) for part in self.parts])

    def rsample(self, sample_shape: torch.Size = NO_SHAPE) -> Tensor:
        draws = [_straight_through(part, self.temperature, sample_shape) for part in self.parts]
        return join_parts(draws)

    def log_prob(self, value: Tensor) -> Tensor:
        """Log-probability ``[...]`` of vectors, softened ones too: the largest entry counts."""
        pairs = zip(self.parts, split_parts(value, self.sizes), strict=True)
        log_probs = [part.log_prob(one_hot.argmax(-1)) for part, one_hot in pairs]
        return sum(log_probs[1:], log_probs[0])

    def entropy(self) -> Tensor:
        entropies = [part.entropy() for part in self.parts]
        return sum(entropies[1:], entropies[0])

    @property
    def deterministic_sample(self) -> Tensor:
        return self._vector([part.deterministic_sample for part in self.parts])

    def _vector(self, indices: list[Tensor]) -> Tensor:
        vector = one_hot_parts(torch.stack(indices, -1), self.sizes)
        return vector.to(self.parts[0].probs.dtype)


def _straight_through(
    part: ClippedCategorical, temperature: float, sample_shape: torch.Size
) -> Tensor:
    # Where log(0) has a gradient it is 0 / 0, so that the zero is replaced on both sides of it.
    is_forbidden = part.probs == 0
    logits = part.probs.masked_fill(is_forbidden, 1.0).log().masked_fill(is_forbidden, -torch.inf)
    shape = torch.Size([*sample_shape, *logits.shape])
    soft = ((logits + noise.gumbel(shape, logits)) / temperature).softmax(-1)
    hard = torch.zeros_like(soft).scatter_(-1, soft.argmax(-1, keepdim=True), 1.0)
    return hard - soft.detach() + soft


@dataclass(frozen=True)
class Discrete(PolicyDistribution):
    """Clipped categorical choices: one for a discrete action, independent ones for several parts.

    Parameters are logits, for every category of every part.

    Args:
        clip_low: as ``clip_high``, see :class:`ClippedCategorical`.
        temperature: of the softmax that gives gradients to ``rsample``. Lower ones give gradients
            nearer to those of a one-hot, and of higher variance.

    Example:
        >>> from torchrl.data import MultiCategorical
        >>> from torchrl_amago.action_space import ActionSpace
        >>> policy_dist = Discrete(ActionSpace.from_spec(MultiCategorical([2, 3])))
        >>> policy_dist.stored(torch.tensor([9.0, 0.0, 0.0, 0.0, 9.0])).deterministic_sample
        tensor([0, 2])
    """

    clip_low: float = CLIP_LOW
    clip_high: float = CLIP_HIGH
    temperature: float = 0.5

    kinds = ("discrete", "multi_discrete")
    differentiable, params_per_number = True, 1

    def __post_init__(self) -> None:
        super().__post_init__()
        largest = max(self.space.sizes)
        if not (0.0 <= self.clip_low < 1.0 / largest and self.clip_low < self.clip_high <= 1.0):
            raise ValueError(
                f"clip_low must be in [0, 1/{largest}) for {largest} categories and clip_high in "
                f"(clip_low, 1], got {self.clip_low} and {self.clip_high}; 0 and 1 don't clip."
            )
        check_positive(temperature=self.temperature)

    def _vectors(self, params: Tensor) -> OneHotParts:
        options = (self.clip_low, self.clip_high, self.temperature)
        return OneHotParts(params, self.space.sizes, *options)

    def stored(self, params: Tensor) -> Distribution:
        if self.space.shape != () or self.space.dtype != torch.int64:
            return super().stored(params)
        # The way over one-hot vectors would cost as much as the draw.
        return ClippedCategorical(self._checked(params), self.clip_low, self.clip_high)

    def clip_action(self, vector: Tensor, policy: OneHotParts) -> Tensor:
        """Clip the one-hot of each part as probabilities of the allowed categories are."""
        # The category taken stays, even if the policy's mask forbids it.
        forbidden = (policy.probs[..., 0, :] == 0) & (vector == 0)
        split = (split_parts(x, self.space.sizes) for x in (vector, forbidden))
        clip = (self.clip_low, self.clip_high)
        parts = [clip_probabilities(part, *clip, mask) for part, mask in zip(*split, strict=True)]
        return join_parts(parts)


class Bits(VectorDistribution):
    """Independent bits ``[..., A]`` by log-odds of a 1 (-inf forbids it); the entropy is exact."""

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
            with their number. The entropy is that of the whole action.

    Example:
        >>> from torchrl_amago.action_space import ActionSpace
        >>> space = ActionSpace("multi_binary", shape=(3,), dtype=torch.int8)
        >>> policy_dist = Bernoulli(space, reduce="sum")
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
