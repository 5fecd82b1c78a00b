"""Recurrent trajectory encoders: GRU and LSTM, with a state of constant size.

The weights are in TorchRL's own `GRU` and `LSTM`, which `torch.compile` accepts, unlike torch.nn's.
Sequences run in `kernels.rnn` instead of their loops over steps, with the same numbers.

Legend: N rows, T steps, I input features, H hidden features, D state features.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torchrl.modules.tensordict_module.rnn import GRU, LSTM

from torchrl_amago.modules._layers import make_norm
from torchrl_amago.modules.trajectory.base import TrajectoryEncoder, check_sizes
from torchrl_amago.modules.trajectory.kernels.rnn import Cell, recurrence
from torchrl_amago.modules.trajectory.memory import StateMemory


class _RecurrentEncoder(TrajectoryEncoder):
    """Recurrent network over the steps of a trial, a linear layer, a norm."""

    network: type[nn.RNNBase]
    cell: Cell

    def __init__(
        self,
        input_size: int,
        *,
        d_model: int = 256,
        hidden_size: int | None = None,
        num_layers: int = 2,
        out_norm: str = "layer",
        longest_memory: int | None = None,
        **options: Any,
    ) -> None:
        hidden_size = d_model if hidden_size is None else hidden_size
        check_sizes(num_layers=num_layers)
        if longest_memory is not None and not 2 <= longest_memory < math.inf:
            raise ValueError(f"longest_memory must be at least 2, got {longest_memory} steps.")
        super().__init__(input_size, d_model, **options)
        self.rnn = self.network(input_size, hidden_size, num_layers, batch_first=True)
        self.out = nn.Linear(hidden_size, d_model)
        self.out_norm = make_norm(out_norm, d_model)
        self.longest_memory = longest_memory
        self.reset_parameters()

    @torch.no_grad()
    def reset_parameters(self) -> None:
        """Draw the gates' biases for 1 to `longest_memory` steps, if it is given."""
        if self.longest_memory is None:
            return
        for _, _, *biases in self.rnn.all_weights:
            bias_in, bias_hidden = (z.unflatten(0, (-1, self.rnn.hidden_size)) for z in biases)
            keep = torch.empty_like(bias_in[1]).uniform_(1, self.longest_memory - 1).log()
            bias_in[1], bias_hidden[1] = keep, 0.0
            if self.cell == "lstm":  # it writes as much as it forgets
                bias_in[0], bias_hidden[0] = -keep, 0.0

    def sequence(self, x_NTI: Tensor, positions_NT: Tensor, is_init_NT: Tensor | None) -> Tensor:
        x = x_NTI.transpose(0, 1)
        is_init_TN = None if is_init_NT is None else is_init_NT.t()
        for weights in self.rnn.all_weights:
            x = recurrence(self.cell, x, is_init_TN, weights)
        return self.out_norm(self.out(x)).transpose(0, 1)

    def step(self, x_NI: Tensor, positions_N: Tensor, memory: StateMemory) -> Tensor:
        x = x_NI.to(self.rnn.weight_ih_l0.dtype)
        for stored, weights in zip(memory.layers, self.rnn.all_weights, strict=True):
            state = [h_NH.to(weights[0].dtype) for h_NH in stored]
            with torch.autocast(x.device.type, enabled=False):  # it would round the state
                if self.cell == "gru":
                    new = [torch.gru_cell(x, *state, *weights)]
                else:
                    new = torch.lstm_cell(x, state, *weights)
            for h_NH, new_NH in zip(stored, new, strict=True):
                h_NH.copy_(new_NH)
            x = new[0]
        return self.out_norm(self.out(x))

    def new_memory(self, num_rows: int, device: torch.device, dtype: torch.dtype) -> StateMemory:
        layer = [(self.rnn.hidden_size,)] * (1 if self.cell == "gru" else 2)
        return StateMemory(num_rows, [layer] * self.rnn.num_layers, device, dtype)


class GRUEncoder(_RecurrentEncoder):
    """Gated recurrent unit (arXiv 1406.1078) over the steps of a trial, a linear layer, a norm.

    Its memory has constant size and sees the whole trial. The time of sequences is linear in their
    length, but step after step.

    Args:
        hidden_size: H, width of the recurrent layers; default `d_model`.
        longest_memory: greatest number of steps that units remember over before training. Gates'
            biases are drawn for 1 to `longest_memory` steps (arXiv 1804.11188, eq. 16). Default:
            torch's initialisation, with which memory fades over few steps.
        options: `d_model`, `num_layers`, `out_norm` and others: see :class:`TrajectoryEncoder`.

    Example:
        >>> GRUEncoder(4, d_model=16).sequence(torch.zeros(3, 5, 4), None, None).shape
        torch.Size([3, 5, 16])
    """

    network = GRU
    cell = "gru"


class LSTMEncoder(_RecurrentEncoder):
    """Long short-term memory (Hochreiter & Schmidhuber 1997), a linear layer, a norm.

    On CPUs it is faster than a GRU: oneDNN has a kernel for it. Arguments: see :class:`GRUEncoder`.

    Example:
        >>> LSTMEncoder(4, d_model=16).sequence(torch.zeros(3, 5, 4), None, None).shape
        torch.Size([3, 5, 16])
    """

    network = LSTM
    cell = "lstm"
