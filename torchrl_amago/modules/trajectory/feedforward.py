"""Trajectory encoders without memory, for agents that see only the present step.

Legend: N rows, T steps, I input features, D width.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from torchrl_amago._validation import check_counts
from torchrl_amago.modules._dropout import check_dropout, dropout
from torchrl_amago.modules._layers import make_activation, make_norm
from torchrl_amago.modules.trajectory.base import TrajectoryEncoder


class IdentityEncoder(TrajectoryEncoder):
    """Encoder whose state is the timestep's embedding.

    ``input_size`` is also the state's; for ``options`` see :class:`TrajectoryEncoder`.

    Example:
        >>> from tensordict import TensorDict
        >>> td = TensorDict(timestep=[[1.0, 2.0]], time_idx=[[0]], is_init=[[True]], batch_size=[1])
        >>> IdentityEncoder(2)(td)["state"]
        tensor([[1., 2.]])
    """

    has_memory = False

    def __init__(self, input_size: int, **options: Any) -> None:
        super().__init__(input_size, input_size, **options)

    def sequence(self, x_NTI: Tensor, positions_NT: Tensor, is_init_NT: Tensor | None) -> Tensor:
        return x_NTI

    def step(self, x_NI: Tensor, positions_N: Tensor, memory: None) -> Tensor:
        return x_NI


class FeedForwardBlock(nn.Module):
    """Two layers added to the stream; a norm, the activation and dropout follow each linear."""

    def __init__(self, d_model: int, d_ff: int, dropout: float, activation: str, norm: str) -> None:
        super().__init__()
        self.dropout = dropout
        self.ff_in = nn.Linear(d_model, d_ff)
        self.norm_in = make_norm(norm, d_ff)
        self.ff_out = nn.Linear(d_ff, d_model)
        self.norm_out = make_norm(norm, d_model)
        self.activation = make_activation(activation)

    def forward(self, x: Tensor, training: bool) -> Tensor:
        """Map `[..., D]` to the same shape."""
        hidden = dropout(self.activation(self.norm_in(self.ff_in(x))), self.dropout, training)
        out = dropout(self.activation(self.norm_out(self.ff_out(hidden))), self.dropout, training)
        return x + out


class FeedForwardEncoder(TrajectoryEncoder):
    """Residual feed-forward blocks as in a Transformer, without attention: the ablation of memory.

    Train it on the same slices as an encoder with memory, so that nothing else differs.

    Args:
        num_layers: number of blocks; may be 0.
        dropout: in the blocks, on the embedding and on the state.
        options: `d_model`, `d_ff`, `activation` and others: see :class:`TrajectoryEncoder`.

    Example:
        >>> import torch
        >>> FeedForwardEncoder(4, d_model=16).sequence(torch.zeros(3, 5, 4), None, None).shape
        torch.Size([3, 5, 16])
    """

    has_memory = False

    def __init__(
        self,
        input_size: int,
        *,
        d_model: int = 256,
        d_ff: int | None = None,
        num_layers: int = 1,
        dropout: float = 0.0,
        activation: str = "leaky_relu",
        norm: str = "none",
        out_norm: str = "layer",
        **options: Any,
    ) -> None:
        d_ff = 4 * d_model if d_ff is None else d_ff
        if num_layers:
            check_counts("Or use 0, for no blocks.", num_layers=num_layers)
        check_dropout(dropout=dropout)
        super().__init__(input_size, d_model, **options)
        self.dropout = dropout
        self.embed = nn.Linear(input_size, d_model)
        self.activation = make_activation(activation)
        block = (d_model, d_ff, dropout, activation, norm)
        self.blocks = nn.ModuleList(FeedForwardBlock(*block) for _ in range(num_layers))
        self.out = nn.Linear(d_model, d_model)
        self.out_norm = make_norm(out_norm, d_model)

    def sequence(self, x_NTI: Tensor, positions_NT: Tensor, is_init_NT: Tensor | None) -> Tensor:
        return self._encode(x_NTI, self.training)

    def step(self, x_NI: Tensor, positions_N: Tensor, memory: None) -> Tensor:
        return self._encode(x_NI, training=False)

    def _encode(self, x: Tensor, training: bool) -> Tensor:
        x = dropout(self.activation(self.embed(x)), self.dropout, training)
        for block in self.blocks:
            x = block(x, training)
        return dropout(self.out_norm(self.out(x)), self.dropout, training)
