"""Random draws of policies, all from torch's global generator.

Parameters that aren't finite spoil the draws of their own row only: nothing here looks at all rows,
which would also make a GPU wait. Beta distributions draw by torch's own function. Call these
through the module (``noise.gumbel(...)``), so that replacing one reaches all.
"""

from __future__ import annotations

import torch
from torch import Tensor


def uniform(shape: torch.Size, like: Tensor) -> Tensor:
    """Draw from U[0, 1), with the dtype and device of ``like``."""
    return torch.rand(shape, dtype=like.dtype, device=like.device)


def standard_normal(shape: torch.Size, like: Tensor) -> Tensor:
    """Draw from N(0, 1), with the dtype and device of ``like``."""
    return torch.randn(shape, dtype=like.dtype, device=like.device)


def exponential(shape: torch.Size, like: Tensor) -> Tensor:
    """Draw from Exp(1), with the dtype and device of ``like``; never zero."""
    # Zero has a chance of 2^-24 on some platforms: 0 / 0 would then draw what has probability 0.
    tiny = torch.finfo(like.dtype).tiny
    return torch.empty(shape, dtype=like.dtype, device=like.device).exponential_().clamp_min_(tiny)


def gumbel(shape: torch.Size, like: Tensor) -> Tensor:
    """Draw from the standard Gumbel distribution, with the dtype and device of ``like``."""
    return -exponential(shape, like).log()


def categorical(weights: Tensor, sample_shape: torch.Size) -> Tensor:
    """Draw indices ``[*sample_shape, ...]``, int64, with weights ``[..., A]`` of at least 0."""
    # The first of A exponential clocks to ring: what torch.multinomial does for one draw, and with
    # the same numbers, but without its checks, which cost more than the draw itself.
    shape = torch.Size([*sample_shape, *weights.shape])
    return (weights / exponential(shape, weights)).argmax(-1)
