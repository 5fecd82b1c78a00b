"""The timestep encoder for vectors: an MLP over everything that is observed."""

from __future__ import annotations

import torch
from tensordict import NestedKey
from torch import Tensor
from torchrl.modules import recurrent_mode

from torchrl_amago import keys
from torchrl_amago.modules.layers import MLP, InputNorm, make_norm
from torchrl_amago.modules.timestep.base import TimestepEncoder


class MLPTimestepEncoder(TimestepEncoder):
    """MLP over all entries, flattened and concatenated in the order given.

    In training (sequence mode) the running statistics of the inputs are updated first, from real
    steps only, and then used.

    Args:
        shapes: for each entry of the tensordict, in order, the shape of one step.
        hidden_size: width of the hidden layers.
        num_layers: number of hidden layers, at least 1.
        output_size: D.
        activation: see :func:`~torchrl_amago.modules.layers.make_activation`.
        norm: norm of the hidden layers, see :func:`~torchrl_amago.modules.layers.make_norm`.
        out_norm: norm of the output.
        normalize_inputs: shift and scale inputs by moving averages.
        auto_widen: make hidden and output size at least the number of inputs.
        out_key: entry to write.
        mask_key: entry that is True on real steps.

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
        shapes: dict[NestedKey, tuple[int, ...]],
        *,
        hidden_size: int = 512,
        num_layers: int = 2,
        output_size: int = 256,
        activation: str = "leaky_relu",
        norm: str = "none",
        out_norm: str = "layer",
        normalize_inputs: bool = True,
        auto_widen: bool = False,
        out_key: NestedKey = keys.TIMESTEP,
        mask_key: NestedKey = keys.MASK,
    ) -> None:
        if not shapes:
            raise ValueError(
                "MLPTimestepEncoder needs at least one entry to read, got shapes={}. "
                "Pass {'observation': (size,)} or use make_policy."
            )
        input_size = sum(torch.Size(shape).numel() for shape in shapes.values())
        if auto_widen:
            hidden_size, output_size = max(hidden_size, input_size), max(output_size, input_size)
        super().__init__(
            list(shapes), [len(s) for s in shapes.values()], output_size, out_key, mask_key
        )
        self.shapes = [tuple(shape) for shape in shapes.values()]
        self.input_norm = InputNorm(input_size) if normalize_inputs else None
        self.mlp = MLP(
            input_size, hidden_size, num_layers, output_size, activation=activation, norm=norm
        )
        self.out_norm = make_norm(out_norm, output_size)

    def encode(self, inputs: list[Tensor], mask: Tensor | None) -> Tensor:
        """Flatten, concatenate, normalise, apply the MLP."""
        for key, shape, value in zip(self.in_keys, self.shapes, inputs, strict=True):
            if tuple(value.shape[value.ndim - len(shape) :]) != shape:
                raise ValueError(
                    f"entry {key!r} must end in {shape} for each step, got {tuple(value.shape)}. "
                    "The environment's specs differ from those the encoder was built with."
                )
        flat = [
            x.flatten(x.ndim - dims) if dims else x.unsqueeze(-1)
            for x, dims in zip(inputs, self.event_dims, strict=True)
        ]
        x = torch.cat(flat, -1)
        if self.input_norm is not None:
            if self.training and recurrent_mode():
                self.input_norm.update(x.detach(), mask)
            x = self.input_norm(x)
        return self.out_norm(self.mlp(x))
