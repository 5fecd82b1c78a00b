"""Actor head: from a state to the parameters of one action distribution per discount."""

from __future__ import annotations

from torch import Tensor, nn

from torchrl_amago.modules.layers import MLP


class Actor(nn.Module):
    """MLP from a state to distribution parameters for every discount.

    Args:
        state_size: D, size of the state.
        num_params: P, parameters of one action distribution (the number of actions if discrete).
        num_discounts: G.
        hidden_size: width of the hidden layers.
        num_layers: number of hidden layers, at least 1.
        activation: name of the activation, see :func:`~torchrl_amago.modules.layers.make_activation`.
        dropout: rate after each hidden layer.

    Shapes:
        ``[*B, D]`` -> ``[*B, G, P]``.

    Example:
        >>> import torch
        >>> Actor(8, num_params=5, num_discounts=7)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 7, 5])
    """

    def __init__(
        self,
        state_size: int,
        num_params: int,
        num_discounts: int,
        hidden_size: int = 256,
        num_layers: int = 2,
        activation: str = "leaky_relu",
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.num_params, self.num_discounts = num_params, num_discounts
        self.mlp = MLP(
            state_size,
            hidden_size,
            num_layers,
            num_discounts * num_params,
            activation=activation,
            dropout=dropout,
        )

    def forward(self, state: Tensor) -> Tensor:
        """Distribution parameters for every discount."""
        return self.mlp(state).unflatten(-1, (self.num_discounts, self.num_params))
