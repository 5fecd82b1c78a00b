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

    In training (sequences, with gradient) the running statistics of inputs are updated first, from real
    steps only, and then used.

    Args:
        shapes: for each entry of the tensordict, in order, the shape of one step.
        hidden_size: width of the hidden layers.
        num_layers: number of hidden layers, at least 1.
        output_size: D.
        activation: see :func:`~torchrl_amago.modules._layers.make_activation`.
        norm: norm of the hidden layers, see :func:`~torchrl_amago.modules._layers.make_norm`.
        out_norm: norm of the output.
        normalize_inputs: shift and scale inputs by moving averages.
        auto_widen: make hidden and output size at least the number of inputs.
        options: switches and keys of :class:`TimestepEncoder`.

    Raises:
        ValueError: if there are no entries.
        KeyError: if the tensordict lacks an entry.

    Example:
        >>> from tensordict import TensorDict
        >>> encoder = MLPTimestepEncoder({"observation": (4,), "prev_reward": (1,)}, output_size=16)
        >>> td = TensorDict(observation=torch.zeros(2, 3, 4), prev_reward=torch.zeros(2, 3, 1),
        ...                 batch_size=[2, 3])
        >>> encoder(td)["timestep"].shape
        torch.Size([2, 3, 16])
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
        input_size = sum(torch.Size(shape).numel() for shape in shapes.values())
        if auto_widen:
            hidden_size, output_size = max(hidden_size, input_size), max(output_size, input_size)
        super().__init__(shapes, output_size, **options)
        self.input_norm = InputNorm(input_size) if normalize_inputs else None
        self.mlp = MLP(
            input_size, hidden_size, num_layers, output_size, activation=activation, norm=norm
        )
        self.out_norm = make_norm(out_norm, output_size)

    def encode(self, inputs: list[Tensor], mask: Tensor | None) -> Tensor:
        """Flatten, concatenate, normalise, apply the MLP."""
        x = flatten_and_join(inputs, self.shapes)
        if self.input_norm is not None:
            if self.moves_statistics:
                self.input_norm.update(x.detach(), mask)
            x = self.input_norm(x)
        return self.out_norm(self.mlp(x))
