"""Where policies' randomness comes from: torch's global generator, through these functions only.

Call them through the module (``noise.gumbel(...)``), so that whoever replaces one reaches all.
"""

from __future__ import annotations

import torch
from torch import Tensor


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
