"""Critic ensembles: all members, discounts and (if discrete) actions in one batched pass.

Legend: B batch, T steps, C critics, G discounts, A action size, D features.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn

from torchrl_amago.modules.layers import make_activation


class EnsembleLinear(nn.Module):
    """One linear layer per ensemble member, as a single batched product.

    Args:
        num_members: C.
        in_features: size of the input.
        out_features: size of the output.

    Shapes:
        ``[N, in]`` (the same input for all members) or ``[C, N, in]`` -> ``[C, N, out]``.

    Example:
        >>> EnsembleLinear(4, 8, 3)(torch.zeros(5, 8)).shape
        torch.Size([4, 5, 3])
    """

    def __init__(self, num_members: int, in_features: int, out_features: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_members, in_features, out_features))
        self.bias = nn.Parameter(torch.empty(num_members, out_features))
        bound = 1.0 / math.sqrt(in_features)  # as torch.nn.Linear draws its own
        nn.init.uniform_(self.weight, -bound, bound)
        nn.init.uniform_(self.bias, -bound, bound)

    def forward(self, x: Tensor) -> Tensor:
        """Apply every member's layer."""
        if x.ndim == 2:
            x = x.expand(self.weight.shape[0], -1, -1)
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight)


class DiscreteCritic(nn.Module):
    """Ensemble of MLPs from a state to the value of every action under every discount.

    Args:
        state_size: D.
        num_actions: A.
        num_discounts: G.
        num_critics: C.
        hidden_size: width of the hidden layers.
        num_layers: number of hidden layers, at least 1.
        activation: name of the activation, see :func:`~torchrl_amago.modules.layers.make_activation`.
        dropout: rate after each hidden layer.

    Shapes:
        ``[*B, D]`` -> ``[*B, C, G, A]``.

    Raises:
        ValueError: if ``num_critics`` or ``num_layers`` is smaller than 1.

    Example:
        >>> DiscreteCritic(8, num_actions=5, num_discounts=7)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 4, 7, 5])
    """

    def __init__(
        self,
        state_size: int,
        num_actions: int,
        num_discounts: int,
        num_critics: int = 4,
        hidden_size: int = 256,
        num_layers: int = 2,
        activation: str = "leaky_relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if num_critics < 1 or num_layers < 1:
            raise ValueError(
                f"a critic ensemble needs num_critics >= 1 and num_layers >= 1, got {num_critics} "
                f"and {num_layers}. Use 4 and 2, the published sizes."
            )
        self.num_critics, self.num_discounts, self.num_actions = (
            num_critics,
            num_discounts,
            num_actions,
        )
        sizes = [state_size] + [hidden_size] * num_layers
        self.hidden = nn.ModuleList(
            EnsembleLinear(num_critics, size_in, size_out)
            for size_in, size_out in itertools.pairwise(sizes)
        )
        self.out = EnsembleLinear(num_critics, hidden_size, num_discounts * num_actions)
        self.activation = make_activation(activation)
        self.dropout = nn.Dropout(dropout)

    def forward(self, state: Tensor) -> Tensor:
        """Values of all actions."""
        batch = state.shape[:-1]
        hidden_CND = state.reshape(-1, state.shape[-1])
        for layer in self.hidden:
            hidden_CND = self.dropout(self.activation(layer(hidden_CND)))
        value_NCX = self.out(hidden_CND).transpose(0, 1)
        return value_NCX.reshape(*batch, self.num_critics, self.num_discounts, self.num_actions)
