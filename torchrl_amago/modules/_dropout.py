"""Dropout with cheap random numbers on CPUs: torch's own takes longer than a matrix product."""

from __future__ import annotations

import torch
from tensordict import is_batchedtensor
from torch import Tensor
from torch.nn import functional as F

from torchrl_amago._cpu import shared_dropout_bits

_LEVELS = 1 << 16  # one 64-bit draw decides about four features


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero features with probability `p` and scale the others so that the mean stays.

    On CPUs `p` is rounded to 16 bits, and random numbers differ from
    :func:`torch.nn.functional.dropout`'s. Compiled code draws the same as eager code.
    """
    if not training or p == 0.0:
        return x
    if not shared_dropout_bits(x):
        return F.dropout(x, p)
    make = _mask_op if torch.compiler.is_compiling() else _mask
    return x * make(x.detach(), p)


def check_dropout(**probabilities: float) -> None:
    """Raise ValueError for dropout rates outside of [0, 1), by the name of their argument."""
    for name, p in probabilities.items():
        if not 0.0 <= p < 1.0:
            raise ValueError(f"{name} must be in [0, 1), got {p}. Use 0 for no dropout.")


def _mask(like: Tensor, p: float) -> Tensor:
    count, kind = -(-like.numel() // 4), {"dtype": torch.int64, "device": like.device}
    if is_batchedtensor(like):  # `random_` has no rule for vmap
        bits = torch.randint(-(2**63), 2**63 - 1, (count,), **kind)
    else:
        bits = torch.empty(count, **kind).random_(-(2**63), None)
    dropped = min(round(p * _LEVELS), _LEVELS - 1)
    keep = bits.view(torch.int16)[: like.numel()] >= dropped - _LEVELS // 2
    scale = torch.tensor(_LEVELS / (_LEVELS - dropped), dtype=like.dtype, device=like.device)
    return (keep * scale).view(like.shape)


# Opaque to the compiler, whose own generator is slow on CPUs.
_mask_op = torch.library.custom_op(
    "torchrl_amago::dropout_mask",
    _mask,
    mutates_args=(),
    schema="(Tensor like, float p) -> Tensor",
    tags=(torch.Tag.nondeterministic_seeded,),
)


@_mask_op.register_fake
def _(like: Tensor, p: float) -> Tensor:
    return torch.empty_like(like, memory_format=torch.contiguous_format)
