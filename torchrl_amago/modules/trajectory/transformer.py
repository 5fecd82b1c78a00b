"""Transformer trajectory encoder: pre-norm blocks that stay stable under the losses of RL.

Legend: B batch, T steps, I input features, D width, H heads.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torchrl.modules import recurrent_mode

from torchrl_amago.modules._dropout import check_dropout, dropout
from torchrl_amago.modules._layers import (
    SigmaReparamLinear,
    make_activation,
    make_norm,
)
from torchrl_amago.modules._positions import rotate_by_position, sinusoidal_positions
from torchrl_amago.modules.trajectory.base import (
    TrajectoryEncoder,
    check_heads,
    check_sizes,
    starts_within_rows,
)
from torchrl_amago.modules.trajectory.kernels.attention import AttentionPattern
from torchrl_amago.modules.trajectory.kernels.attention_backends import (
    Backend,
    backend_attention,
    check_backend,
)
from torchrl_amago.modules.trajectory.memory.ring_cache import RingCache

# (query, key, value), each [..., H, head size] -> [..., H, head size]
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def _project(layer: nn.Linear, x: Tensor, training: bool) -> Tensor:
    """Apply a linear layer in the given mode, whatever the layer's own `training` flag says."""
    if isinstance(layer, SigmaReparamLinear):
        return layer(x, power_iteration=training)
    return layer(x)


class TransformerBlock(nn.Module):
    """Attention and feed-forward, each behind a norm and added to the stream.

    With NormFormer's norms after the attention and inside the feed-forward, and its learned scale
    per head (arXiv 2110.09456, eq. 4-7), and sigma-reparametrised linears (arXiv 2303.06296).

    Args:
        d_model: D, width of the stream.
        num_heads: H.
        d_ff: width of the feed-forward's hidden layer.
        dropout_ff: on the feed-forward's output.
        dropout_qkv: on queries, keys and values.
        activation: see :func:`~torchrl_amago.modules._layers.make_activation`.
        norm: see :func:`~torchrl_amago.modules._layers.make_norm`.
        sigma_reparam: use :class:`SigmaReparamLinear`, else `torch.nn.Linear`.
        normformer: use NormFormer's two extra norms.
        head_scaling: use NormFormer's scale per head.
    """

    def __init__(
        self,
        d_model: int,
        num_heads: int,
        d_ff: int,
        *,
        dropout_ff: float = 0.0,
        dropout_qkv: float = 0.0,
        activation: str = "leaky_relu",
        norm: str = "layer",
        sigma_reparam: bool = True,
        normformer: bool = True,
        head_scaling: bool = True,
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
        """Scale all heads by 1 again; layers reset themselves."""
        if self.head_scale is not None:
            nn.init.ones_(self.head_scale)

    def forward(self, x: Tensor, attend: Attend, training: bool) -> Tensor:
        """Map `[..., D]` to the same shape; what `...` sees of each other is up to `attend`."""
        qkv = _project(self.qkv, self.norm_attention(x), training)
        qkv = dropout(qkv, self.dropout_qkv, training)
        seen = attend(*qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(-3))
        if self.head_scale is not None:
            seen = seen * self.head_scale
        x = x + self.norm_attention_out(_project(self.attention_out, seen.flatten(-2), training))
        hidden = self.activation(_project(self.ff_in, self.norm_ff(x), training))
        out = _project(self.ff_out, self.norm_ff_hidden(hidden), training)
        return x + dropout(out, self.dropout_ff, training)


class TransformerEncoder(TrajectoryEncoder):
    """Causal Transformer over the steps of a trial (arXiv 2310.09971, Appendix A).

    Rollouts remember keys and values of the last `context_length` steps (or `window`, if given) in a
    ring. Up to there, steps equal a whole window. Past it they equal attention banded to as many
    steps in every layer: deeper layers saw older tokens, so some information outlives the window.

    Args:
        input_size: I, features of a timestep embedding.
        context_length: how many steps a rollout's step sees, itself included.
        d_model: D, width, and size of the state; even.
        num_heads: attention heads; divides `d_model`. On CPUs 16 or more features per head are
            much faster than 8.
        d_ff: width of the feed-forward's hidden layers; default `4 * d_model`.
        num_layers: number of blocks.
        dropout_ff: on feed-forwards' outputs.
        dropout_emb: on embeddings, positions included.
        dropout_attn: on attention weights.
        dropout_qkv: on queries, keys and values.
        activation: see :func:`~torchrl_amago.modules._layers.make_activation`.
        norm: see :func:`~torchrl_amago.modules._layers.make_norm`.
        positions: `fixed` sinusoids, `learned` table, or `rotary`.
        max_positions: size of the learned table; the longest trial's length and 1, since losses also read
            what the last step led to.
        beyond_positions: what a learned table does with later steps: `raise`, or `clip` to its last.
        sigma_reparam: sigma-reparametrised linears, see :class:`SigmaReparamLinear`.
        normformer: NormFormer's extra norms.
        head_scaling: NormFormer's learned scale per head.
        window: how many steps a step sees, at most `context_length`. By default all before it in
            sequences and `context_length` in rollouts.
        num_sinks: how many first steps of a trial stay visible beyond the window.
        sink_bias: added to the attention scores of those.
        logit_clip: bound on attention scores, before the softmax.
        attention: kernels for sequences. `sdpa` is torch's own and runs everywhere; `flash` is the
            package flash-attn (GPU, half precision, no sinks or clipping); `flex` is FlexAttention
            (it trains on GPUs only); `auto` takes `flash` where it can run, else `sdpa`.
        segments: `auto` keeps trials apart that follow each other in a row of a sequence (found by
            `is_init`; under `torch.compile` the mask for it is always built), `never` says that
            each row is a part of one trial, with padding on the right alone.
        options: see :class:`TrajectoryEncoder`.

    Raises:
        ImportError: if a backend is asked for by name and isn't installed.
        ValueError: if a number is out of its range or a name unknown; from `forward`, if steps come
            after padding under `segments="never"` (not looked for under `torch.compile`).

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.modules import set_recurrent_mode
        >>> encoder = TransformerEncoder(4, context_length=8, d_model=16, num_heads=2, num_layers=1)
        >>> td = TensorDict(timestep=torch.zeros(3, 5, 4), is_init=torch.zeros(3, 5, 1).bool(),
        ...                 time_idx=torch.arange(5).expand(3, 5).unsqueeze(-1), batch_size=[3, 5])
        >>> with set_recurrent_mode(True):
        ...     encoder(td)["state"].shape
        torch.Size([3, 5, 16])
        >>> encoder(td[:, 0])["state"].shape
        torch.Size([3, 16])
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
        check_heads(d_model, num_heads)
        check_sizes(num_layers=num_layers)
        _check_window(window, context_length)
        _check_names(positions, max_positions, beyond_positions, segments)
        if (
            positions == "learned"
            and beyond_positions == "raise"
            and max_positions <= context_length
        ):
            raise ValueError(
                f"max_positions must be above context_length={context_length}, got {max_positions}: a trial "
                "of so many steps shows one observation more. Make max_positions the longest trial's length "
                "plus 1, or choose beyond_positions='clip', positions='fixed' or positions='rotary'."
            )
        check_dropout(
            dropout_ff=dropout_ff,
            dropout_emb=dropout_emb,
            dropout_attn=dropout_attn,
            dropout_qkv=dropout_qkv,
        )
        if d_model % 2:
            raise ValueError(
                f"d_model must be even, got {d_model}: positions are pairs of sine and cosine. Add 1 to "
                "it."
            )
        if positions == "rotary" and d_model // num_heads % 2:
            raise ValueError(
                f"positions='rotary' needs an even number of features per head, got d_model={d_model} "
                f"over num_heads={num_heads}. Change one of them, or use positions='fixed'."
            )
        super().__init__(input_size, d_model, context_length=context_length, **options)
        self._has_warned = False
        self.num_heads = num_heads
        self.dropout_emb, self.dropout_attn = dropout_emb, dropout_attn
        self.pattern = AttentionPattern(window, num_sinks, sink_bias, logit_clip)
        check_backend(attention, self.pattern, dropout_attn)
        self.attention, self.segments = attention, segments
        self.positions, self.beyond_positions = positions, beyond_positions
        self.embed = nn.Linear(input_size, d_model)
        self.position_table = (
            nn.Embedding(max_positions, d_model) if positions == "learned" else None
        )
        self.blocks = nn.ModuleList(
            TransformerBlock(
                d_model,
                num_heads,
                d_ff,
                dropout_ff=dropout_ff,
                dropout_qkv=dropout_qkv,
                activation=activation,
                norm=norm,
                sigma_reparam=sigma_reparam,
                normformer=normformer,
                head_scaling=head_scaling,
            )
            for _ in range(num_layers)
        )
        self.norm = make_norm(norm, d_model)

    def check_mask(self, mask: Tensor) -> None:
        if self.segments != "never":
            return
        # What real steps would see of the padding is only hidden by a mask, which "never" does without.
        if (mask[..., 1:, :] & ~mask[..., :-1, :]).any():
            raise ValueError(
                "segments='never' needs rows that are padded on the right, got real steps after padding. "
                "Make the buffer with padding='right', or use segments='auto'."
            )

    def sequence(self, x_NTI: Tensor, positions_NT: Tensor, is_init_NT: Tensor | None) -> Tensor:
        x_NTD = dropout(self._embed(x_NTI, positions_NT), self.dropout_emb, self.training)
        is_init_NT = None if self.segments == "never" else starts_within_rows(is_init_NT)
        attend = partial(self._attend_window, positions_NT, is_init_NT)
        for block in self.blocks:
            x_NTD = block(x_NTD, attend, self.training)
        return self.norm(x_NTD)

    def step(self, x_NI: Tensor, positions_N: Tensor, memory: RingCache) -> Tensor:
        x_ND = self._embed(x_NI, positions_N)
        memory.show(positions_N)
        for layer, block in enumerate(self.blocks):
            attend = partial(self._attend_memory, positions_N, memory, layer)
            x_ND = block(x_ND, attend, training=False)
        return self.norm(x_ND)

    def new_memory(self, num_rows: int, device: torch.device, dtype: torch.dtype) -> RingCache:
        head_size = self.output_size // self.num_heads
        return RingCache(
            len(self.blocks),
            num_rows,
            self.num_heads,
            head_size,
            self.pattern.window or self.context_length,
            device,
            dtype,
            num_sinks=self.pattern.num_sinks,
            sink_bias=self.pattern.sink_bias,
        )

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
        is_table = self.positions == "learned" and self.beyond_positions == "raise"
        size = self.position_table.num_embeddings if is_table else None
        if is_table and positions.numel() and positions.max() >= size:
            raise ValueError(
                f"learned positions end at max_positions={size}, got time index "
                f"{int(positions.max())}. Make max_positions the longest trial's length plus 1, or choose "
                "beyond_positions='clip', positions='fixed' or positions='rotary'."
            )
        self._warn_of_long_sequences(positions)

    def _warn_of_long_sequences(self, positions: Tensor) -> None:
        # Losses read one step beyond a slice; time indices tell long trials from rows of several short ones.
        unbounded = recurrent_mode() and self.pattern.window is None and not self._has_warned
        if not unbounded or positions.shape[-2] <= self.context_length + 1:
            return
        if positions.max() > self.context_length:
            self._has_warned = True
            warnings.warn(
                f"sequences of {positions.shape[-2]} steps see all before them, rollouts the last "
                f"context_length={self.context_length} alone, so that states differ from there on. Set "
                f"window={self.context_length}, raise context_length, or sample shorter slices.",
                stacklevel=2,
            )

    def _attend_window(
        self, positions_NT: Tensor, is_init_NT: Tensor | None, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        q, k, v = (z_NTHD.transpose(1, 2) for z_NTHD in (q, k, v))
        if self.positions == "rotary":
            q, k = rotate_by_position(q, positions_NT), rotate_by_position(k, positions_NT)
        seen_NHTD = backend_attention(
            self.attention,
            q,
            k,
            v,
            self.pattern,
            positions_BT=positions_NT,
            is_init_BT=is_init_NT,
            dropout=self.dropout_attn if self.training else 0.0,
        )
        return seen_NHTD.transpose(1, 2)

    def _attend_memory(
        self, positions_N: Tensor, memory: RingCache, layer: int, q: Tensor, k: Tensor, v: Tensor
    ) -> Tensor:
        if self.positions == "rotary":
            q, k = (
                rotate_by_position(z_NHD.unsqueeze(2), positions_N.unsqueeze(1)).squeeze(2)
                for z_NHD in (q, k)
            )
        memory.write(layer, k, v)
        return memory.attend(layer, q, self.pattern.logit_clip).to(q.dtype)


def _check_window(window: int | None, context_length: int) -> None:
    if window is not None and window > context_length:
        raise ValueError(
            f"window must be at most context_length, got window={window}, "
            f"context_length={context_length}. Rollouts keep context_length steps: raise it, or leave "
            "window out."
        )


def _check_names(
    positions: str, max_positions: int | None, beyond_positions: str, segments: str
) -> None:
    for name, value, allowed in (
        ("positions", positions, ("fixed", "learned", "rotary")),
        ("beyond_positions", beyond_positions, ("raise", "clip")),
        ("segments", segments, ("auto", "never")),
    ):
        if value not in allowed:
            raise ValueError(
                f"{name} must be one of {allowed}, got {value!r}. See TransformerEncoder's arguments."
            )
    if (positions == "learned") != (max_positions is not None):
        raise ValueError(
            f"max_positions goes with positions='learned' and only with it, got "
            f"positions={positions!r}, max_positions={max_positions}. It is the size of the table."
        )
    if beyond_positions == "clip" and positions != "learned":
        raise ValueError(
            f"beyond_positions='clip' goes with positions='learned' and only with it, got "
            f"positions={positions!r}. Leave it out: other positions have no end."
        )
