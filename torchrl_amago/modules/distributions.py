"""Action distributions that torch and torchrl lack, with what the method needs of them."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributions import Categorical, OneHotCategorical
from torch.nn.functional import one_hot

# Bounds of the public AMAGO code; a probability never reaches 0, so that log-probabilities of
# stored actions stay finite and every action keeps being tried.
CLIP_LOW, CLIP_HIGH = 1e-3, 0.99


def clip_probabilities(probs: Tensor, low: float = CLIP_LOW, high: float = CLIP_HIGH) -> Tensor:
    """Clip probabilities to ``[low, high]`` and renormalise them.

    Args:
        probs: ``[..., A]``, float; a one-hot action works too and comes out softened.

    Returns:
        ``[..., A]``, summing to one; entries may leave ``[low, high]`` by the renormalisation.

    Example:
        >>> clip_probabilities(torch.tensor([1.0, 0.0, 0.0, 0.0, 0.0])).round(decimals=3)
        tensor([0.9960, 0.0010, 0.0010, 0.0010, 0.0010])
    """
    clipped = probs.clamp(low, high)
    return clipped / clipped.sum(-1, keepdim=True)


class ClippedCategorical(Categorical):
    """Categorical distribution whose probabilities are clipped and renormalised.

    Args:
        logits: ``[..., A]``, float, unnormalised log-probabilities.
        clip_low: lower bound of a probability before renormalising, in ``[0, 1/A)``.
        clip_high: upper bound of a probability before renormalising, in ``(0, 1]``.

    Example:
        >>> dist = ClippedCategorical(torch.tensor([10.0, 0.0]))
        >>> [round(p, 4) for p in dist.probs.tolist()], dist.mode.item()
        ([0.999, 0.001], 0)
    """

    def __init__(
        self, logits: Tensor, clip_low: float = CLIP_LOW, clip_high: float = CLIP_HIGH
    ) -> None:
        probs = clip_probabilities(logits.softmax(-1), clip_low, clip_high)
        super().__init__(probs=probs, validate_args=False)

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw actions, ``[*sample_shape, ...]``, int64."""
        # The first of A exponential clocks to ring: what torch.multinomial does for one draw, and
        # with the same numbers, but without its checks, which cost more than the draw itself.
        probs = self.probs.expand(*sample_shape, *self.probs.shape)
        return (probs / torch.empty_like(probs).exponential_()).argmax(-1)

    @property
    def deterministic_sample(self) -> Tensor:
        """The most probable action, ``[...]``, int64."""
        return self.probs.argmax(-1)


class ClippedOneHotCategorical(OneHotCategorical):
    """:class:`ClippedCategorical` for action spaces that are one-hot encoded.

    Args:
        logits: ``[..., A]``, float, unnormalised log-probabilities.
        clip_low: lower bound of a probability before renormalising.
        clip_high: upper bound of a probability before renormalising.
        dtype: of the actions; that of the environment's spec.

    Example:
        >>> ClippedOneHotCategorical(torch.tensor([0.0, 3.0])).deterministic_sample
        tensor([0, 1])
    """

    def __init__(
        self,
        logits: Tensor,
        clip_low: float = CLIP_LOW,
        clip_high: float = CLIP_HIGH,
        dtype: torch.dtype = torch.int64,
    ) -> None:
        probs = clip_probabilities(logits.softmax(-1), clip_low, clip_high)
        super().__init__(probs=probs, validate_args=False)
        self.dtype = dtype

    def sample(self, sample_shape: torch.Size = torch.Size()) -> Tensor:
        """Draw actions, ``[*sample_shape, ..., A]``."""
        return super().sample(sample_shape).to(self.dtype)

    @property
    def deterministic_sample(self) -> Tensor:
        """The most probable action, ``[..., A]``."""
        return one_hot(self.probs.argmax(-1), self.probs.shape[-1]).to(self.dtype)
