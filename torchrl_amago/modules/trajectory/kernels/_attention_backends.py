"""Other kernels for `window_attention`: FlexAttention and flash-attn, for GPUs.

Legend: B batch, T steps, H heads, D features of one head, N = B * T.
"""

from __future__ import annotations

import importlib.util
from functools import cache
from typing import Literal, get_args

import torch
from tensordict import is_batchedtensor
from torch import Tensor
from torch.nn import functional as F

from torchrl_amago._validation import check_choice
from torchrl_amago.modules.trajectory.kernels.attention import (
    AttentionPattern,
    ScoreBias,
    window_attention,
)

Backend = Literal["auto", "sdpa", "flex", "flash"]


def check_backend(backend: Backend, pattern: AttentionPattern, dropout: float) -> None:
    """Raise for a backend that is unknown, isn't installed or lacks an option."""
    check_choice("attention", backend, get_args(Backend))
    if backend == "flash" and not _is_installed():
        raise ImportError(
            "attention='flash' needs the package flash-attn. Install torchrl_amago[flash] on a "
            "machine with a GPU, or use attention='auto'."
        )
    if backend == "flash" and not _flash_fits(pattern):
        raise ValueError("attention='flash' has neither sinks nor logit_clip. Use 'sdpa' for them.")
    if backend == "flex" and dropout:
        raise ValueError(f"attention='flex' has no dropout_attn, got {dropout}. Use 'sdpa' for it.")


def backend_attention(
    backend: Backend,
    q_BHTD: Tensor,
    k_BHTD: Tensor,
    v_BHTD: Tensor,
    pattern: AttentionPattern,
    positions_BT: Tensor | None = None,
    is_init_BT: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Compute :func:`window_attention` by the chosen backend, or by the one that fits."""
    qkv = (q_BHTD, k_BHTD, v_BHTD)
    if backend == "flex":
        return _flex_attention(*qkv, ScoreBias(pattern, positions_BT, is_init_BT, like=q_BHTD))
    if backend == "flash" or (backend == "auto" and _flash_can_run(q_BHTD, pattern)):
        return _flash_attention(qkv, pattern, is_init_BT, dropout)
    return window_attention(*qkv, pattern, positions_BT, is_init_BT, dropout)


@cache
def _is_installed() -> bool:
    return importlib.util.find_spec("flash_attn") is not None


def _flash_fits(pattern: AttentionPattern) -> bool:
    return not pattern.num_sinks and pattern.logit_clip is None


def _flash_can_run(q: Tensor, pattern: AttentionPattern) -> bool:
    return (
        q.device.type == "cuda"
        and q.dtype in (torch.float16, torch.bfloat16)
        and q.shape[-1] <= 256
        and not is_batchedtensor(q)
        and _flash_fits(pattern)
        and _is_installed()
        and torch.cuda.get_device_capability(q.device) >= (8, 0)
    )


def _flash_attention(
    qkv: tuple[Tensor, ...], pattern: AttentionPattern, is_init_BT: Tensor | None, dropout: float
) -> Tensor:
    from flash_attn import flash_attn_func, flash_attn_varlen_func

    before = -1 if pattern.window is None else pattern.window - 1
    options = {"dropout_p": dropout, "causal": True, "window_size": (before, 0)}
    q, k, v = (z_BHTD.transpose(1, 2) for z_BHTD in qkv)
    if is_init_BT is None:
        return flash_attn_func(q, k, v, **options).transpose(1, 2)
    # Each trial as a sequence of its own, in any row.
    starts_BT = is_init_BT.clone()
    starts_BT[:, 0] = True
    start_M = starts_BT.flatten().nonzero().squeeze(1).int()
    bounds = F.pad(start_M, (0, 1), value=starts_BT.numel())
    longest = int(bounds.diff().max())
    qkv_NHD = (z.flatten(0, 1) for z in (q, k, v))
    out_NHD = flash_attn_varlen_func(*qkv_NHD, bounds, bounds, longest, longest, **options)
    return out_NHD.view(q.shape).transpose(1, 2)


@cache
def _compiled_flex(device_type: str):
    from torch.nn.attention.flex_attention import flex_attention

    # Without compilation FlexAttention holds all scores. Its CPU kernel takes no symbolic sizes.
    return torch.compile(flex_attention, dynamic=None if device_type == "cuda" else False)


def _flex_attention(q_BHTD: Tensor, k_BHTD: Tensor, v_BHTD: Tensor, bias: ScoreBias) -> Tensor:
    from torch.nn.attention.flex_attention import create_block_mask

    batch, _, num_steps, _ = q_BHTD.shape
    pattern, trial_BT, sink_BT = bias.pattern, bias.trial_BT, bias.sink_BT
    window = num_steps if pattern.window is None else pattern.window

    def visible(b, h, i, j):
        near = i - j < window
        if sink_BT is not None:
            near = near | sink_BT[b, j]
        if trial_BT is not None:
            near = near & (trial_BT[b, i] == trial_BT[b, j])
        return near & (i >= j)

    def change(score, b, h, i, j):
        if pattern.sink_bias:
            score = torch.where(sink_BT[b, j], score + pattern.sink_bias, score)
        if pattern.logit_clip is not None:
            score = score.clamp(-pattern.logit_clip, pattern.logit_clip)
        return score

    rows = batch if trial_BT is not None or sink_BT is not None else None
    mask = create_block_mask(visible, rows, None, num_steps, num_steps, device=q_BHTD.device)
    is_changed = pattern.sink_bias or pattern.logit_clip is not None
    options = {"score_mod": change if is_changed else None, "block_mask": mask}
    return _compiled_flex(q_BHTD.device.type)(q_BHTD, k_BHTD, v_BHTD, **options)
