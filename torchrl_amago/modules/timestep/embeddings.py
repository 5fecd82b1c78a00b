"""Embeddings of single entries, each to a vector of features: categories, goals, tokens.

Legend: *M steps, K components of a category, L goals or tokens, N numbers of a goal, E features of
a component or token, H hidden features, F features.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from torchrl_amago._cpu import is_traced
from torchrl_amago.modules._layers import make_activation
from torchrl_amago.modules._settings import Configurable


class EntryEmbedding(Configurable, nn.Module):
    """Base of the embeddings of one entry, parts of the combined encoder.

    To write your own, implement ``forward(value)``: ``[*M, *shape] -> [*M, F]``. The value has the
    tensordict's dtype. ``mask_key`` names an entry, bool ``[*M, L]``, True on the elements of a
    sequence that are present, which is a second argument.

    Example:
        >>> class Thermometer(EntryEmbedding):
        ...     def forward(self, value):
        ...         return (value.unsqueeze(-1) > torch.linspace(-1.0, 1.0, 5)).float()
        >>> Thermometer(shape=(), output_size=5)(torch.tensor([0.2]))
        tensor([[1., 1., 1., 0., 0.]])
    """

    def __init__(
        self, shape: Sequence[int], output_size: int, mask_key: NestedKey | None = None
    ) -> None:
        super().__init__()
        self.shape, self.output_size, self.mask_key = tuple(shape), output_size, mask_key

    def augment(self, value: Tensor, rows: Tensor, num_rows: int) -> Tensor:
        """Change values at random in training, see :meth:`TimestepEncoder.augment`."""
        return value


def check_range(index: Tensor, sizes: Sequence[int] | int, name: str) -> None:
    """Raise ValueError for numbers outside of ``[0, size)``, on a CPU and untraced."""
    # Elsewhere the check would wait for the device; there the look-up itself fails, less clearly.
    if index.device.type != "cpu" or is_traced(index):
        return
    if ((index < 0) | (index >= torch.tensor(sizes))).any():
        got = f"got values from {int(index.min())} to {int(index.max())}"
        raise ValueError(f"{name} must be in [0, size) with size {sizes}, {got}.")


class CategoryEmbedding(EntryEmbedding):
    """One table of vectors per component (``Categorical``, ``MultiDiscrete``), side by side.

    Args:
        sizes: number of values of each of the K components; others raise ValueError when called.
        shape: shape of one step's entry, K numbers altogether; default ``[K]``.
        embedding_size: E, features of each component; F is K x E.

    Example:
        >>> CategoryEmbedding([3, 5], embedding_size=4)(torch.tensor([[2, 4]])).shape
        torch.Size([1, 8])
    """

    def __init__(
        self, sizes: Sequence[int], *, shape: Sequence[int] | None = None, embedding_size: int = 16
    ) -> None:
        shape = (len(sizes),) if shape is None else tuple(shape)
        super().__init__(shape, len(sizes) * embedding_size)
        # One table for all, each component in its own rows: one look-up however many they are.
        self.table = nn.Embedding(sum(sizes), embedding_size)
        self._sizes = list(sizes)
        self.register_buffer("sizes", torch.tensor(sizes))
        self.register_buffer("first_row", self.sizes.cumsum(0) - self.sizes)

    def forward(self, value: Tensor) -> Tensor:
        """Embed integers ``[*M, *shape]``."""
        batch = value.shape[: value.ndim - len(self.shape)]
        index_MK = value.long().reshape(*batch, len(self._sizes))
        check_range(index_MK, self._sizes, "a category")
        # Out of range must be no row at all, rather than another component's.
        is_inside = (index_MK >= 0) & (index_MK < self.sizes)
        row_MK = torch.where(is_inside, index_MK + self.first_row, self.table.num_embeddings)
        return self.table(row_MK).flatten(-2)


class GoalEmbedding(EntryEmbedding):
    """L goals of N numbers or tokens each, pooled by a mean of nonlinear features.

        h_l = act(W x_l + p_l),    out = V [mean of h_l over present goals; fraction present]

    The position ``p_l`` comes before the nonlinearity, so that order survives the mean. A mask or a
    padding value marks goals that are absent: reached, or never set. They have no influence.

    Args:
        num_goals, goal_size, embedding_size, hidden_size, output_size: L, N, E, H and F.
        num_tokens: None if goals are vectors of floats; else the N numbers are tokens below it
            (others raise ValueError when called).
        ordered: False for no position: goals may be reached in any order.
        padding: a goal whose numbers all equal this, NaN too, is absent; None for none.
        mask_key: entry that is True on present goals, ``[*M, L]``.
        activation: see :class:`TimestepEncoder`.

    Example:
        >>> embedding = GoalEmbedding(num_goals=3, goal_size=2, output_size=8, padding=-1.0)
        >>> embedding(torch.tensor([[[0.5, 0.2], [0.1, 0.9], [-1.0, -1.0]]])).shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        num_goals: int,
        goal_size: int,
        *,
        num_tokens: int | None = None,
        embedding_size: int = 16,
        hidden_size: int = 64,
        output_size: int = 64,
        ordered: bool = True,
        padding: float | None = None,
        mask_key: NestedKey | None = None,
        activation: str = "leaky_relu",
    ) -> None:
        super().__init__((num_goals, goal_size), output_size, mask_key)
        self.num_tokens, self.padding = num_tokens, padding
        self.table = None if num_tokens is None else nn.Embedding(num_tokens, embedding_size)
        size = goal_size * (1 if num_tokens is None else embedding_size)
        self.hidden = nn.Linear(size, hidden_size)
        self.position = nn.Parameter(torch.empty(num_goals, hidden_size)) if ordered else None
        self.reset_parameters()
        self.activation = make_activation(activation)
        self.out = nn.Linear(hidden_size + 1, output_size)

    def reset_parameters(self) -> None:
        """Draw new positions; layers reset themselves."""
        if self.position is not None:
            nn.init.normal_(self.position, std=0.02)

    def forward(self, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embed ``[*M, L, N]``; ``mask`` is True on present goals (default: all)."""
        if not value.is_floating_point():
            value = value.long()  # bytes would take -1 for 255
        present_ML = self._present(value) if mask is None else mask & self._present(value)
        present_ML1 = present_ML.unsqueeze(-1)
        if self.table is None:
            x_MLE = torch.where(present_ML1, value.to(self.hidden.weight.dtype), 0.0)
        else:
            token_MLN = value.long().masked_fill(~present_ML1, 0)  # padding may be no token
            check_range(token_MLN, self.num_tokens, "a token")
            x_MLE = torch.where(present_ML1, self.table(token_MLN).flatten(-2), 0.0)
        hidden_MLH = self.hidden(x_MLE)
        if self.position is not None:
            hidden_MLH = hidden_MLH + self.position
        total_MH = torch.where(present_ML1, self.activation(hidden_MLH), 0.0).sum(-2)
        count_M1 = present_ML.sum(-1, keepdim=True).to(total_MH.dtype)
        mean_MH, fraction_M1 = total_MH / count_M1.clamp(min=1), count_M1 / present_ML.shape[-1]
        return self.out(torch.cat((mean_MH, fraction_M1), -1))

    def _present(self, value: Tensor) -> Tensor:
        if self.padding is None:
            return torch.ones_like(value[..., 0], dtype=torch.bool)
        missing = value.isnan() if math.isnan(self.padding) else value == self.padding
        return ~missing.all(-1)


class TokenEmbedding(GoalEmbedding):
    """A sequence of tokens: looked up in one table, pooled as goals are.

    Args:
        length, num_tokens: L, tokens in a step's entry, and the size of the vocabulary.
        padding_token: token that fills up short sequences, which counts as absent; None for none.
        options: other arguments of :class:`GoalEmbedding`.

    Example:
        >>> embedding = TokenEmbedding(5, num_tokens=100, output_size=8, padding_token=0)
        >>> embedding(torch.tensor([[17, 4, 99, 0, 0]])).shape
        torch.Size([1, 8])
    """

    def __init__(
        self,
        length: int,
        num_tokens: int,
        *,
        embedding_size: int = 32,
        padding_token: int | None = None,
        **options: Any,
    ) -> None:
        tokens = dict(num_tokens=num_tokens, embedding_size=embedding_size, padding=padding_token)
        super().__init__(length, 1, **tokens, **options)
        self.shape = (length,)

    def forward(self, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embed integers ``[*M, L]``; ``mask`` is True on real tokens (default: all)."""
        return super().forward(value.unsqueeze(-1), mask)
