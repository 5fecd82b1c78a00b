"""The timestep encoder for vectors: an MLP over everything that is observed."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor

from torchrl_amago.modules._input_norm import InputNorm
from torchrl_amago.modules._layers import MLP, make_norm
from torchrl_amago.modules.timestep.base import Shape, TimestepEncoder, flatten_and_join


class MLPTimestepEncoder(TimestepEncoder):
    """MLP over all entries, flattened and concatenated in the order given.

    In training (sequences, with gradient) the statistics of inputs are updated from real steps
    before they are used. Other arguments: see :class:`TimestepEncoder`.

    Args:
        normalize_inputs: shift and scale inputs by moving averages.
        auto_widen: make hidden and output size at least the number of inputs.

    Example:
        >>> encoder = MLPTimestepEncoder({"observation": (4,), "prev_reward": (1,)}, output_size=16)
        >>> encoder(observation=torch.zeros(2, 4), prev_reward=torch.zeros(2, 1)).shape
        torch.Size([2, 16])
    """

    def __init__(
        self,
        shapes: Mapping[NestedKey, Shape],
        *,
        hidden_size: int = 512,
        num_layers: int = 2,
        output_size: int = 256,
        activation: str = "leaky_relu",
        norm: str = "none",
        out_norm: str = "layer",
        normalize_inputs: bool = True,
        auto_widen: bool = False,
        **options: Any,
    ) -> None:
        size = sum(torch.Size(shape).numel() for shape in shapes.values())
        if auto_widen:
            hidden_size, output_size = max(hidden_size, size), max(output_size, size)
        super().__init__(shapes, output_size, **options)
        self.input_norm = InputNorm(size) if normalize_inputs else None
        self.mlp = MLP(size, hidden_size, num_layers, output_size, activation, norm)
        self.out_norm = make_norm(out_norm, output_size)

    def encode(self, inputs: list[Tensor], mask: Tensor | None) -> Tensor:
        x = flatten_and_join(inputs, self.shapes)
        if self.input_norm is not None:
            x = self.input_norm(x, mask, self.moves_statistics)
        return self.out_norm(self.mlp(x))
