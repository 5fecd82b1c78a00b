"""Dropout with cheap random numbers on CPUs, where torch's own takes longer than a matrix product."""

from __future__ import annotations

import torch
from tensordict import is_batchedtensor
from torch import Tensor
from torch.nn import functional as F

from torchrl_amago._cpu import shared_dropout_bits

_LEVELS = 1 << 16  # one 64-bit draw decides about four features


def dropout(x: Tensor, p: float, training: bool) -> Tensor:
    """Zero features with probability `p`, scale the others so that the mean stays.

    As :func:`torch.nn.functional.dropout`, except that on CPUs `p` is rounded to 16 bits and the
    random numbers are others. Under `torch.compile` they are those of eager mode.

    Args:
        x: any shape, floating point.
        p: in [0, 1).
        training: return `x` as it is if False.

    Example:
        >>> out = dropout(torch.ones(1000), 0.5, training=True)
        >>> sorted(set(out.tolist()))
        [0.0, 2.0]
    """
    if not training or p == 0.0:
        return x
    if not shared_dropout_bits(x):
        return F.dropout(x, p)
    make = _mask_op if torch.compiler.is_compiling() else _mask
    return x * make(x.detach(), p)


def check_dropout(**probabilities: float) -> None:
    """Refuse what isn't a probability below 1.

    Args:
        probabilities: dropout rates by the name of their argument.

    Raises:
        ValueError: if one is out of range.
    """
    for name, p in probabilities.items():
        if not 0.0 <= p < 1.0:
            raise ValueError(
                f"{name} must be in [0, 1), got {p}. It is the probability of zeroing a feature; use 0 "
                "for none."
            )


def _mask(like: Tensor, p: float) -> Tensor:
    count, kind = -(-like.numel() // 4), {"dtype": torch.int64, "device": like.device}
    if is_batchedtensor(like):  # only this knows of vmap
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
