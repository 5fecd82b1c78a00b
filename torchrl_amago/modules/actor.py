"""Actor heads: from a state to the parameters of one action distribution per discount.

Legend: B batch, G discounts, P distribution parameters, I input features.
"""

from __future__ import annotations

import abc
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule, dispatch
from torch import Tensor, nn

from torchrl_amago._cpu import is_traced
from torchrl_amago._validation import check_counts
from torchrl_amago.action_space import split_parts
from torchrl_amago.modules._layers import MLP, make_activation, make_norm
from torchrl_amago.modules._settings import Configurable


class ActorHead(Configurable, nn.Module, abc.ABC):
    """Base of all actor heads, with their further inputs and the mask of allowed actions.

    A subclass builds a network that reads :attr:`input_size` features, and applies it in
    :meth:`head`.

    Args:
        num_params: P, parameters of one action distribution (the number of actions if discrete).
        observation_sizes: number of elements of each observation that is read besides the state.
        masks_actions: read a mask of the allowed actions.
        mask_parts: numbers of choices of the action's parts, each of which must be allowed one.
            Default one part; none for bits, all of which may be forbidden.

    Example:
        >>> class Sum(ActorHead):
        ...     def head(self, x):
        ...         return x.sum(-1, keepdim=True).expand(*x.shape[:-1], self.output_size)
        >>> actor = Sum(8, num_params=5, num_discounts=7, observation_sizes=[6])
        >>> actor(torch.zeros(4, 8), torch.zeros(4, 2, 3)).shape
        torch.Size([4, 7, 5])
    """

    def __init__(
        self,
        state_size: int,
        num_params: int,
        num_discounts: int,
        *,
        observation_sizes: Sequence[int] = (),
        masks_actions: bool = False,
        mask_parts: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        for size in observation_sizes:
            check_counts("Leave out observations without numbers.", observation_sizes=size)
        self.state_size, self.num_params, self.num_discounts = state_size, num_params, num_discounts
        self.observation_sizes, self.masks_actions = tuple(observation_sizes), masks_actions
        self.mask_parts = mask_parts
        self.input_size = state_size + sum(observation_sizes)
        self.output_size = num_discounts * num_params

    @abc.abstractmethod
    def head(self, x: Tensor) -> Tensor:
        """Map state and observations ``[*B, input_size]`` to parameters ``[*B, output_size]``."""

    def forward(self, state: Tensor, *inputs: Tensor) -> Tensor:
        """Compute the distribution parameters of every discount, ``[*B, G, P]``.

        Args:
            state: ``[*B, state_size]``, float.
            inputs: observations ``[*B, ...]`` of any dtype, in the order of `observation_sizes`;
                then, if `masks_actions`, the action mask ``[*B, P]``, see :func:`forbid`.
        """
        num_observations = len(self.observation_sizes)
        if len(inputs) != (needed := num_observations + self.masks_actions):
            raise ValueError(
                f"an actor with observation_sizes={self.observation_sizes} and masks_actions="
                f"{self.masks_actions} reads {needed} tensors after the state, got {len(inputs)}."
            )
        x = self._join(state, inputs[:num_observations])
        params_BGP = self.head(x).unflatten(-1, (self.num_discounts, self.num_params))
        return forbid(params_BGP, inputs[-1], self.mask_parts) if self.masks_actions else params_BGP

    def _join(self, state: Tensor, observations: Sequence[Tensor]) -> Tensor:
        batch, flat = state.shape[:-1], [state]
        for size, observation in zip(self.observation_sizes, observations, strict=True):
            event = observation.shape[len(batch) :]
            if observation.shape[: len(batch)] != batch or event.numel() != size:
                raise ValueError(
                    f"an observation for the actor must hold {size} numbers for each state of a "
                    f"batch of {tuple(batch)}, got the shape {tuple(observation.shape)}."
                )
            flat.append(observation.reshape(*batch, size).to(state.dtype))
        return torch.cat(flat, -1) if observations else state


class ActorModule(TensorDictModule):
    """An actor head in a tensordict; `in_keys` are the head's inputs in order.

    Example:
        >>> actor = ActorModule(Actor(8, 5, 7), in_keys=["state"], out_keys=["action_params"])
        >>> actor(state=torch.zeros(2, 8)).shape
        torch.Size([2, 7, 5])
    """

    # TensorDictModule's own forward looks for an optional package at each call, which takes longer
    # than a small head.
    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        inputs = [tensordict[key] for key in self.in_keys]
        return tensordict.set(self.out_keys[0], self.module(*inputs))


def forbid(params_BGP: Tensor, mask_BP: Tensor, mask_parts: Sequence[int] | None = None) -> Tensor:
    """Set parameters of forbidden actions to -inf, for every discount.

    The mask is bool, True where an action is allowed. Raises ValueError if it doesn't fit, or if a
    row allows nothing in one of `mask_parts` (unchecked in compiled code).
    """
    expected = (*params_BGP.shape[:-2], params_BGP.shape[-1])
    if mask_BP.dtype != torch.bool or mask_BP.shape != expected:
        raise ValueError(
            f"an action mask must be bool of shape {tuple(expected)}, got {mask_BP.dtype} of shape "
            f"{tuple(mask_BP.shape)}. It holds True for every allowed action, at every step."
        )
    parts = (mask_BP.shape[-1],) if mask_parts is None else tuple(mask_parts)
    split = split_parts(mask_BP, parts) if parts and not is_traced(mask_BP) else ()
    if not all(part_BP.any(-1).all() for part_BP in split):
        raise ValueError(
            "an action mask must allow at least one action in each row, and in each part of an "
            "action, got a row of only False. Fix the environment; fill padding's mask with True."
        )
    return params_BGP.masked_fill(~mask_BP.unsqueeze(-2), float("-inf"))


class Actor(ActorHead):
    """MLP from a state to distribution parameters for every discount.

    Args:
        hidden_size: width of the hidden layers.
        num_layers: number of hidden layers, at least 1.
        activation: see :class:`~torchrl_amago.modules.TimestepEncoder`, as for norms.
        dropout: rate after each hidden layer.
        options: other arguments, see :class:`ActorHead`.

    Example:
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
        **options: Any,
    ) -> None:
        super().__init__(state_size, num_params, num_discounts, **options)
        sizes = (self.input_size, hidden_size, num_layers, self.output_size)
        self.mlp = MLP(*sizes, activation=activation, dropout=dropout)

    def head(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class ResidualActor(ActorHead):
    """Residual blocks from a state to distribution parameters (BRO, arXiv 2405.16158, Section 3).

        x = mlp(state)
        x = x + norm(linear(activation(norm(linear(x)))))      num_blocks times
        parameters = linear(x)

    Args:
        feature_size, residual_size: width between the blocks, and inside of a block.
        num_blocks: number of blocks, at least 1.
        norm: name of the norm in the blocks.
        dropout: rate inside of the first MLP.
        options: other arguments, see :class:`Actor` and :class:`ActorHead`.

    Example:
        >>> ResidualActor(8, num_params=5, num_discounts=7)(torch.zeros(2, 3, 8)).shape
        torch.Size([2, 3, 7, 5])
    """

    def __init__(
        self,
        state_size: int,
        num_params: int,
        num_discounts: int,
        feature_size: int = 256,
        residual_size: int = 512,
        num_blocks: int = 2,
        activation: str = "leaky_relu",
        norm: str = "layer",
        dropout: float = 0.0,
        **options: Any,
    ) -> None:
        super().__init__(state_size, num_params, num_discounts, **options)
        sizes = (self.input_size, feature_size, 1, feature_size)
        self.embed = MLP(*sizes, activation=activation, dropout=dropout)
        self.blocks = nn.ModuleList(
            nn.Sequential(
                nn.Linear(feature_size, residual_size),
                make_norm(norm, residual_size),
                make_activation(activation),
                nn.Linear(residual_size, feature_size),
                make_norm(norm, feature_size),
            )
            for _ in range(num_blocks)
        )
        self.out = nn.Linear(feature_size, self.output_size)

    def head(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = x + block(x)
        return self.out(x)
