"""Transformer trajectory encoder, with pre-norm blocks that stay stable under the losses of RL.

Legend: N rows, T steps, M real steps of all rows, I input features, D width, H heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrl.modules import recurrent_mode

from torchrl_amago._cpu import compact_batches
from torchrl_amago._masking import Steps
from torchrl_amago._validation import check_choice
from torchrl_amago.modules._dropout import check_dropout, dropout
from torchrl_amago.modules._layers import SigmaReparamLinear, make_activation, make_norm
from torchrl_amago.modules._positions import rotate_by_position, sinusoidal_positions
from torchrl_amago.modules.trajectory.base import TrajectoryEncoder, check_heads, check_sizes
from torchrl_amago.modules.trajectory.kernels._attention_backends import (
    Backend,
    backend_attention,
    check_backend,
)
from torchrl_amago.modules.trajectory.kernels.attention import AttentionPattern
from torchrl_amago.modules.trajectory.memory import RingCache

# queries, keys and values [..., 3, H, head size] -> [..., H, head size]
Attend = Callable[[Tensor], Tensor]


def _project(layer: nn.Linear, x: Tensor, training: bool) -> Tensor:
    """Apply a linear layer in the given mode, not by its own `training` flag."""
    if isinstance(layer, SigmaReparamLinear):
        return layer(x, power_iteration=training)
    return layer(x)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream.

    With NormFormer's norms after the attention and inside the feed-forward, and its learned scale
    per head (arXiv 2110.09456, eq. 4-7), and sigma-reparametrised linears (arXiv 2303.06296).
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        dropout_ff: float,
        dropout_qkv: float,
        activation: str,
        norm: str,
        sigma_reparam: bool,
        normformer: bool,
        head_scaling: bool,
    ) -> None:
        super().__init__()
        linear = SigmaReparamLinear if sigma_reparam else nn.Linear
        extra_norm = norm if normformer else "none"
        self.num_heads = num_heads
        self.dropout_ff, self.dropout_qkv = dropout_ff, dropout_qkv
        self.norm_attention = make_norm(norm, d_model)
        self.qkv = linear(d_model, 3 * d_model, bias=False)
        self.head_scale = nn.Parameter(torch.ones(num_heads, 1)) if head_scaling else None
        self.attention_out = linear(d_model, d_model)
        self.norm_attention_out = make_norm(extra_norm, d_model)
        self.norm_ff = make_norm(norm, d_model)
        self.ff_in = linear(d_model, d_ff)
        self.activation = make_activation(activation)
        self.norm_ff_hidden = make_norm(extra_norm, d_ff)
        self.ff_out = linear(d_ff, d_model)

    def reset_parameters(self) -> None:
        """Reset the heads' scales; layers reset themselves."""
        if self.head_scale is not None:
            nn.init.ones_(self.head_scale)

    def forward(self, x: Tensor, attend: Attend, training: bool) -> Tensor:
        """Map `[..., D]` to the same shape, with attention by `attend`."""
        qkv = _project(self.qkv, self.norm_attention(x), training)
        qkv = dropout(qkv, self.dropout_qkv, training)
        heads = attend(qkv.unflatten(-1, (3, self.num_heads, -1)))
        if self.head_scale is not None:
            heads = heads * self.head_scale
        x = x + self.norm_attention_out(_project(self.attention_out, heads.flatten(-2), training))
        hidden = self.activation(_project(self.ff_in, self.norm_ff(x), training))
        out = _project(self.ff_out, self.norm_ff_hidden(hidden), training)
        return x + dropout(out, self.dropout_ff, training)


class TransformerEncoder(TrajectoryEncoder):
    """Causal Transformer over the steps of a trial (arXiv 2310.09971, Appendix A).

    Rollouts remember keys and values of the last `context_length` steps (or `window`, if given) in
    a ring. Up to there, steps equal a whole window. Past it they equal attention banded to as many
    steps in every layer: deeper layers saw older tokens, so some information outlives the window.

    Args:
        d_model: D, width, and size of the state; even.
        num_heads: divides `d_model`. On CPUs 16 features per head are much faster than 8.
        dropout_attn, dropout_qkv: rates for attention weights, and for queries, keys and values.
        positions: `fixed` sinusoids, `learned` table, or `rotary`.
        max_positions: size of the learned table: the longest trial's length plus 1, since losses
            also read the observation after the last step.
        beyond_positions: `raise` for steps beyond the learned table, or `clip` them to its last.
        sigma_reparam: use :class:`SigmaReparamLinear`, else `torch.nn.Linear`.
        normformer, head_scaling: use NormFormer's extra norms, and its learned scale per head.
        window: number of steps that a step sees, at most `context_length`. By default all before it
            in sequences and `context_length` in rollouts.
        num_sinks: see :class:`AttentionPattern`, as for `sink_bias` and `logit_clip`.
        attention: kernels for sequences. `sdpa` is torch's own and runs everywhere; `flash` is the
            package flash-attn (GPU, half precision, no sinks or clipping); `flex` is FlexAttention
            (it trains on GPUs only); `auto` takes `flash` where it can run, else `sdpa`.
        segments: `auto` separates trials that follow each other in a row of a sequence, `never`
            means that each row is a part of one trial, padded only on the right.
        options: `context_length`, `d_ff`, `num_layers` and others: see :class:`TrajectoryEncoder`.

    Raises:
        ImportError: if a backend is chosen by name and isn't installed.
        ValueError: for arguments out of range; in `forward`, if "never" meets steps after padding.

    Example:
        >>> encoder = TransformerEncoder(4, context_length=8, d_model=16, num_heads=2)
        >>> encoder.sequence(torch.zeros(3, 5, 4), torch.arange(5).expand(3, 5), None).shape
        torch.Size([3, 5, 16])
    """

    def __init__(
        self,
        input_size: int,
        *,
        context_length: int,
        d_model: int = 256,
        num_heads: int = 8,
        d_ff: int | None = None,
        num_layers: int = 3,
        dropout_ff: float = 0.05,
        dropout_emb: float = 0.05,
        dropout_attn: float = 0.0,
        dropout_qkv: float = 0.0,
        activation: str = "leaky_relu",
        norm: str = "layer",
        positions: Literal["fixed", "learned", "rotary"] = "fixed",
        max_positions: int | None = None,
        beyond_positions: Literal["raise", "clip"] = "raise",
        sigma_reparam: bool = True,
        normformer: bool = True,
        head_scaling: bool = True,
        window: int | None = None,
        num_sinks: int = 0,
        sink_bias: float = 0.0,
        logit_clip: float | None = None,
        attention: Backend = "auto",
        segments: Literal["auto", "never"] = "auto",
        **options: Any,
    ) -> None:
        d_ff = 4 * d_model if d_ff is None else d_ff
        check_sizes(num_layers=num_layers)
        check_heads(d_model, num_heads)
        _check_positions(positions, max_positions, beyond_positions, context_length)
        if d_model % 2 or (positions == "rotary" and d_model // num_heads % 2):
            raise ValueError(
                "d_model must be even, and d_model / num_heads with positions='rotary', got "
                f"{d_model} and num_heads={num_heads}: positions pair sine with cosine."
            )
        check_choice("segments", segments, ("auto", "never"))
        check_dropout(dropout_ff=dropout_ff, dropout_emb=dropout_emb)
        check_dropout(dropout_attn=dropout_attn, dropout_qkv=dropout_qkv)
        if window is not None and window > context_length:
            raise ValueError(
                f"window must be at most context_length, got window={window}, context_length="
                f"{context_length}. Rollouts keep context_length steps: raise it, or omit window."
            )
        super().__init__(input_size, d_model, context_length=context_length, **options)
        self._has_warned, self.num_heads = False, num_heads
        self.dropout_emb, self.dropout_attn = dropout_emb, dropout_attn
        self.pattern = AttentionPattern(window, num_sinks, sink_bias, logit_clip)
        check_backend(attention, self.pattern, dropout_attn)
        self.attention, self.segments = attention, segments
        self.positions, self.beyond_positions = positions, beyond_positions
        self.embed = nn.Linear(input_size, d_model)
        is_learned = positions == "learned"
        self.position_table = nn.Embedding(max_positions, d_model) if is_learned else None
        block = dict(dropout_ff=dropout_ff, dropout_qkv=dropout_qkv, activation=activation)
        block |= dict(sigma_reparam=sigma_reparam, normformer=normformer, head_scaling=head_scaling)
        self.blocks = nn.ModuleList(
            TransformerBlock(d_model, num_heads, d_ff, norm=norm, **block)
            for _ in range(num_layers)
        )
        self.norm = make_norm(norm, d_model)

    def check_mask(self, mask: Tensor) -> None:
        # Only a mask would hide padding from later steps, and "never" builds none.
        if self.segments == "never" and (mask[..., 1:, :] & ~mask[..., :-1, :]).any():
            raise ValueError(
                "segments='never' needs rows that are padded on the right, got real steps after "
                "padding. Make the buffer with padding='right', or use segments='auto'."
            )

    def sequence(
        self, x_NTI: Tensor, positions_NT: Tensor, is_init_NT: Tensor | None, mask_NT=None
    ) -> Tensor:
        steps, seen = None, (positions_NT, None if self.segments == "never" else is_init_NT)
        if mask_NT is not None and compact_batches(mask_NT) and not mask_NT.all():
            # All but attention reads the real steps alone, as one row of M.
            steps = Steps(mask_NT)
            x_NTI, positions_NT = (steps.select(z)[None] for z in (x_NTI, positions_NT))
        attend = partial(self._attend_window, steps, *seen)
        x_NTD = dropout(self._embed(x_NTI, positions_NT), self.dropout_emb, self.training)
        for block in self.blocks:
            x_NTD = block(x_NTD, attend, self.training)
        x_NTD = self.norm(x_NTD)
        return x_NTD if steps is None else steps.restore(x_NTD[0])

    def step(self, x_NI: Tensor, positions_N: Tensor, memory: RingCache) -> Tensor:
        x_ND = self._embed(x_NI, positions_N)
        memory.mark_sinks(positions_N)
        for layer, block in enumerate(self.blocks):
            attend = partial(self._attend_memory, positions_N, memory, layer)
            x_ND = block(x_ND, attend, training=False)
        return self.norm(x_ND)

    def new_memory(self, num_rows: int, device: torch.device, dtype: torch.dtype) -> RingCache:
        sizes = (len(self.blocks), num_rows, self.num_heads, self.output_size // self.num_heads)
        context, sinks = self.pattern.window or self.context_length, self.pattern.num_sinks
        return RingCache(*sizes, context, device, dtype, sinks, self.pattern.sink_bias)

    def _embed(self, x: Tensor, positions: Tensor) -> Tensor:
        x = self.embed(x)
        if self.positions == "fixed":
            wide = torch.promote_types(x.dtype, torch.float32)
            return x + sinusoidal_positions(positions, self.output_size, wide).to(x.dtype)
        if self.positions == "learned":
            if self.beyond_positions == "clip":
                positions = positions.clamp(max=self.position_table.num_embeddings - 1)
            return x + self.position_table(positions)
        return x

    def check_positions(self, positions: Tensor) -> None:
        is_limited = self.positions == "learned" and self.beyond_positions == "raise"
        if is_limited and positions.max() >= (size := self.position_table.num_embeddings):
            raise ValueError(
                f"learned positions end at max_positions={size}, got time index "
                f"{int(positions.max())}. Make max_positions the longest trial's length plus 1, or "
                "choose beyond_positions='clip' or other positions."
            )
        # Losses read one step beyond a slice; time indices tell long trials from rows of several.
        is_unbounded = recurrent_mode() and self.pattern.window is None and not self._has_warned
        is_long = is_unbounded and positions.shape[-2] > self.context_length + 1
        if is_long and positions.max() > self.context_length:
            self._has_warned = True
            warnings.warn(
                f"sequences of {positions.shape[-2]} steps see all before them, rollouts only the "
                f"last context_length={self.context_length}, so that states differ from there on. "
                f"Set window={self.context_length}, raise context_length or sample shorter slices.",
                stacklevel=2,
            )

    def _attend_window(
        self, steps: Steps | None, positions_NT: Tensor, is_init_NT: Tensor | None, qkv: Tensor
    ) -> Tensor:
        qkv_NT3HD = qkv if steps is None else steps.restore(qkv[0])
        q, k, v = (z_NTHD.transpose(1, 2) for z_NTHD in qkv_NT3HD.unbind(2))
        if self.positions == "rotary":
            q, k = rotate_by_position(q, positions_NT), rotate_by_position(k, positions_NT)
        rate = self.dropout_attn if self.training else 0.0
        seen = (self.pattern, positions_NT, is_init_NT)
        out_NTHD = backend_attention(self.attention, q, k, v, *seen, rate).transpose(1, 2)
        return out_NTHD if steps is None else steps.select(out_NTHD)[None]

    def _attend_memory(
        self, positions_N: Tensor, memory: RingCache, layer: int, qkv_N3HD: Tensor
    ) -> Tensor:
        q, k, v = qkv_N3HD.unbind(1)
        if self.positions == "rotary":
            rotate = partial(rotate_by_position, positions_BT=positions_N.unsqueeze(1))
            q, k = (rotate(z_NHD.unsqueeze(2)).squeeze(2) for z_NHD in (q, k))
        memory.write(layer, k, v)
        return memory.attend(layer, q, self.pattern.logit_clip).to(q.dtype)


def _check_positions(
    positions: str, max_positions: int | None, beyond_positions: str, context_length: int
) -> None:
    check_choice("positions", positions, ("fixed", "learned", "rotary"))
    check_choice("beyond_positions", beyond_positions, ("raise", "clip"))
    can_clip = beyond_positions == "clip"
    fits = max_positions is None and not can_clip
    if positions == "learned":
        fits = max_positions is not None and (can_clip or max_positions > context_length)
    if not fits:
        raise ValueError(
            "positions='learned', and no other, needs max_positions above "
            f"context_length={context_length}, or any with beyond_positions='clip'; got positions="
            f"{positions!r}, max_positions={max_positions}, beyond_positions={beyond_positions!r}. "
            "Make it the longest trial's length plus 1."
        )
