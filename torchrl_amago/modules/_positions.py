"""Position embeddings: fixed and rotary.

Legend: B batch, H heads, T steps, D features of a head.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from torchrl_amago.modules._layers import at_least_float32


def sinusoidal_positions(
    positions: Tensor, size: int, dtype: torch.dtype = torch.float32
) -> Tensor:
    """Compute fixed position embeddings (arXiv 1706.03762, section 3.5).

        out[..., 2i] = sin(p / 10000^(2i/size)),    out[..., 2i+1] = cos(p / 10000^(2i/size))

    Positions are integers `[...]` from 0, the result is `[..., size]`, computed in `dtype`.
    """
    if size % 2:
        raise ValueError(f"sinusoidal positions need an even size, got {size}.")
    even = torch.arange(0, size, 2, device=positions.device, dtype=dtype)
    angle = positions.unsqueeze(-1) * torch.exp(even * (-math.log(10000.0) / size))
    return torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)


def rotate_by_position(x_BHTD: Tensor, positions_BT: Tensor, base: float = 10000.0) -> Tensor:
    """Rotate by position (RoPE, arXiv 2104.09864, eq. 34): D is even, and its halves are paired."""
    size = x_BHTD.shape[-1]
    wide_BHTD = at_least_float32(x_BHTD)
    even = torch.arange(0, size, 2, device=x_BHTD.device, dtype=wide_BHTD.dtype)
    angle = positions_BT[:, None, :, None] / base ** (even / size)
    cos, sin = angle.cos(), angle.sin()
    first, second = wide_BHTD.chunk(2, -1)
    rotated = torch.cat((first * cos - second * sin, first * sin + second * cos), -1)
    return rotated.to(x_BHTD.dtype)
