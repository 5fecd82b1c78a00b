"""Embedding of goals: a set or sequence of them, some of which may be absent.

Legend: *M steps, L goals, N numbers of a goal, E features of a token.
"""

from __future__ import annotations

import math

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from torchrl_amago.modules.timestep.embeddings import EntryEmbedding, SequencePool, check_range


class GoalEmbedding(EntryEmbedding):
    """L goals of N numbers or tokens each, pooled by :class:`SequencePool`.

    A mask or a padding value marks goals that are absent: reached, or never set. Other arguments:
    see :class:`EntryEmbedding`.

    Args:
        num_goals: L, maximal number of goals at a time.
        goal_size: N.
        num_tokens: None if goals are vectors of floats; else the N numbers are tokens below it.
        ordered: False if goals may be reached in any order.
        padding: a goal whose numbers all equal this is absent; None for none. NaN works in the
            embedding, but :class:`~torchrl_amago.trainers.AMAGOTrainer` refuses batches with NaN.

    Raises:
        ValueError: when called, if a token is out of range.

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
        sizes = dict(hidden_size=hidden_size, output_size=output_size)
        self.pool = SequencePool(num_goals, size, **sizes, ordered=ordered, activation=activation)

    def forward(self, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embed ``[*M, L, N]``; ``mask`` is True on present goals (default: all)."""
        if not value.is_floating_point():
            value = value.long()  # bytes would take -1 for 255
        present_ML = self._present(value) if mask is None else mask & self._present(value)
        if self.table is None:
            return self.pool(value.to(self.pool.hidden.weight.dtype), present_ML)
        token_MLN = value.long().masked_fill(~present_ML.unsqueeze(-1), 0)
        check_range(token_MLN, self.num_tokens, "a goal's token")
        return self.pool(self.table(token_MLN).flatten(-2), present_ML)

    def _present(self, value: Tensor) -> Tensor:
        if self.padding is None:
            return torch.ones_like(value[..., 0], dtype=torch.bool)
        missing = value.isnan() if math.isnan(self.padding) else value == self.padding
        return ~missing.all(-1)
