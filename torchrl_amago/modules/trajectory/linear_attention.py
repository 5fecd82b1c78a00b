"""Gated linear attention encoder: attention's matrix products, a recurrence's constant memory.

Legend: N rows, T steps, I input features, D width, H heads, F features of one head; `*` stands for
N or N, T.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torchrl_amago.modules._dropout import check_dropout, dropout
from torchrl_amago.modules._layers import MLP, RMSNorm, StreamEmbedding, at_least_float32, make_norm
from torchrl_amago.modules.trajectory.base import TrajectoryEncoder, check_heads, check_sizes
from torchrl_amago.modules.trajectory.kernels import gated_scan as kernels
from torchrl_amago.modules.trajectory.memory import StateMemory

# Steps over which heads forget at initialisation, from the last head to the first. A memory that no
# head holds at first is hardly ever learned.
_TIME_CONSTANTS = (8.0, 4096.0)


class GatedLinearAttention(nn.Module):
    """Linear attention with a data-dependent decay and write strength per head.

        S[t] = decay[t] S[t-1] + write[t] k[t] v[t]^T,    out[t] = S[t]^T q[t]
        output = out_proj(rms_norm(out) silu(gate))

    The scalar-decay case of arXiv 2312.06635 (section 4), also the form of Mamba-2 (2405.21060),
    with keys of length 1 and the sigmoid write strength of gated DeltaNet (2412.06464). No
    convolution: in RL a timestep already holds the action and reward that led to it.
    """

    def __init__(self, d_model: int, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkvg = nn.Linear(d_model, 4 * d_model, bias=False)
        self.gates = nn.Linear(d_model, 2 * num_heads)
        # An eps near the size of a single write: a smaller one would amplify the rounding of steps
        # that a head doesn't recall.
        self.norm = RMSNorm(d_model // num_heads, eps=1e-3)
        self.out_proj = nn.Linear(d_model, d_model, bias=False)
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Spread the heads' time constants; layers reset themselves."""
        slow, fast = math.log(_TIME_CONSTANTS[1]), math.log(_TIME_CONSTANTS[0])
        time_constant_H = torch.linspace(slow, fast, self.num_heads).exp()
        # sigmoid(bias) = exp(-1 / time constant); write strengths start at 1/2.
        self.gates.bias[: self.num_heads] = -torch.expm1(1.0 / time_constant_H).log()
        self.gates.bias[self.num_heads :] = 0.0

    def forward(
        self, x: Tensor, is_init_NT: Tensor | None = None, state_NHFF: Tensor | None = None
    ) -> Tensor:
        """Mix sequences `[N, T, D]`, with gradient, or take one step `[N, D]` into the state."""
        q, k, v, gate = self.qkvg(x).unflatten(-1, (4, self.num_heads, -1)).unbind(-3)
        # Not under autocast: over a thousand steps a decay's rounding adds up.
        with torch.autocast(x.device.type, enabled=False):
            gates = self.gates(x.to(self.gates.weight.dtype))
        decay, write = at_least_float32(gates).chunk(2, -1)
        v = v * write.sigmoid().unsqueeze(-1).to(v.dtype)
        inputs = (q, F.normalize(k, dim=-1).to(v.dtype), v, F.logsigmoid(decay))
        if state_NHFF is None:
            out = kernels.gated_linear_attention(*inputs, is_init_NT)
        else:
            out = kernels.gated_linear_attention_step(*inputs, state_NHFF)
        return self.out_proj((self.norm(out) * F.silu(gate)).to(gate.dtype).flatten(-2))


class LinearAttentionBlock(nn.Module):
    """Gated linear attention and feed-forward, each behind a norm and added to the stream."""

    def __init__(
        self, d_model: int, num_heads: int, d_ff: int, dropout_ff: float, activation: str, norm: str
    ) -> None:
        super().__init__()
        self.dropout_ff = dropout_ff
        self.norm_attention = make_norm(norm, d_model)
        self.attention = GatedLinearAttention(d_model, num_heads)
        self.norm_ff = make_norm(norm, d_model)
        self.ff = MLP(d_model, d_ff, 1, d_model, activation)

    def forward(
        self, x: Tensor, is_init_NT: Tensor | None = None, state_NHFF: Tensor | None = None
    ) -> Tensor:
        """Map sequences `[N, T, D]`, or one step `[N, D]` as in evaluation, into the state."""
        x = x + self.attention(self.norm_attention(x), is_init_NT, state_NHFF)
        is_training = self.training and state_NHFF is None
        return x + dropout(self.ff(self.norm_ff(x)), self.dropout_ff, is_training)


class GatedLinearAttentionEncoder(TrajectoryEncoder):
    """Gated linear attention over the steps of a trial: the cheap choice for long contexts.

    Training costs matrix products, linear in the number of steps; a rollout's step costs the same
    at any time. Its memory (:class:`StateMemory`) has `d_model**2 / num_heads` numbers per layer
    and environment, which also limits its recall.

    Args:
        num_heads: heads, each with its own decay; divides `d_model`. Fewer heads remember more.
        options: `d_model`, `d_ff`, `num_layers` and others: see :class:`TrajectoryEncoder`.

    Example:
        >>> encoder = GatedLinearAttentionEncoder(4, d_model=16)
        >>> encoder.sequence(torch.zeros(3, 5, 4), None, None).shape
        torch.Size([3, 5, 16])
    """

    def __init__(
        self,
        input_size: int,
        *,
        d_model: int = 256,
        num_heads: int = 8,
        d_ff: int | None = None,
        num_layers: int = 3,
        dropout_ff: float = 0.05,
        dropout_emb: float = 0.05,
        activation: str = "leaky_relu",
        norm: str = "layer",
        **options: Any,
    ) -> None:
        d_ff = 4 * d_model if d_ff is None else d_ff
        check_heads(d_model, num_heads)
        check_sizes(num_layers=num_layers)
        super().__init__(input_size, d_model, **options)
        check_dropout(dropout_ff=dropout_ff, dropout_emb=dropout_emb)
        self.num_heads, self.dropout_emb = num_heads, dropout_emb
        self.embed = StreamEmbedding(input_size, d_model)
        block = (d_model, num_heads, d_ff, dropout_ff, activation, norm)
        self.blocks = nn.ModuleList(LinearAttentionBlock(*block) for _ in range(num_layers))
        self.norm = make_norm(norm, d_model)

    def sequence(self, x_NTI: Tensor, positions_NT: Tensor, is_init_NT: Tensor | None) -> Tensor:
        x_NTD = dropout(self.embed(x_NTI), self.dropout_emb, self.training)
        for block in self.blocks:
            x_NTD = block(x_NTD, is_init_NT)
        return self.norm(x_NTD)

    def step(self, x_NI: Tensor, positions_N: Tensor, memory: StateMemory) -> Tensor:
        x_ND = self.embed(x_NI)
        for block, (state_NHFF,) in zip(self.blocks, memory.layers, strict=True):
            x_ND = block(x_ND, state_NHFF=state_NHFF)
        return self.norm(x_ND)

    def new_memory(self, num_rows: int, device: torch.device, dtype: torch.dtype) -> StateMemory:
        size = self.output_size // self.num_heads
        shapes = [[(self.num_heads, size, size)] for _ in self.blocks]
        return StateMemory(num_rows, shapes, device, dtype)
