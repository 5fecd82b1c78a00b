"""Embeddings of single entries: categories, and sequences of tokens, each to a vector of features.

Legend: *M steps, L elements of a sequence, K components of a category, E features of an element,
F features.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from tensordict import NestedKey
from torch import Tensor, nn

from torchrl_amago._masking import is_traced
from torchrl_amago.modules._layers import make_activation
from torchrl_amago.modules._settings import Configurable


class EntryEmbedding(Configurable, nn.Module):
    """Base of what turns one entry of a step into features; a part of the combined encoder.

    To write your own, implement ``forward(value)``: ``[*M, *shape] -> [*M, F]``, of the dtype that
    the tensordict has. With a ``mask_key`` it is called with the elements' mask as well.

    Args:
        shape: shape of one step's entry.
        output_size: F.
        mask_key: entry, bool ``[*M, L]``, that says which elements of a sequence are there.

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
        self.shape = tuple(shape)
        self.output_size = output_size
        self.mask_key = mask_key

    def augment(self, value: Tensor, rows: Tensor, num_rows: int) -> Tensor:
        """Change values at random in training, see :meth:`TimestepEncoder.augment`."""
        return value


def check_range(index: Tensor, sizes: Sequence[int] | int, what: str) -> None:
    """Refuse numbers outside of ``[0, size)`` where that costs next to nothing.

    That is on a CPU, outside of ``torch.compile`` and ``torch.vmap``; elsewhere the look-up itself fails, with a message
    that says less.

    Raises:
        ValueError: if there is one.
    """
    if index.device.type != "cpu" or is_traced(index):
        return
    if ((index < 0) | (index >= torch.tensor(sizes))).any():
        raise ValueError(
            f"{what} must be in [0, size) with size {sizes}, got values from "
            f"{int(index.min())} to {int(index.max())}. The environment writes what its spec rules "
            "out: correct the spec, or shift the values."
        )


class CategoryEmbedding(EntryEmbedding):
    """One table of vectors per component (``Categorical``, ``MultiDiscrete``), side by side.

    Args:
        sizes: for each of the K components, how many values it may take.
        shape: shape of one step's entry, K numbers altogether; default ``[K]``.
        embedding_size: E, features of each component; F is K x E.

    Raises:
        ValueError: if sizes and shape do not go together; when called, if a value is out of range.

    Example:
        >>> embedding = CategoryEmbedding([3, 5], embedding_size=4)
        >>> embedding(torch.tensor([[2, 4]])).shape, embedding.table.num_embeddings
        (torch.Size([1, 8]), 8)
    """

    def __init__(
        self,
        sizes: Sequence[int],
        *,
        shape: Sequence[int] | None = None,
        embedding_size: int = 16,
    ) -> None:
        shape = (len(sizes),) if shape is None else tuple(shape)
        if torch.Size(shape).numel() != len(sizes) or min(sizes, default=0) < 1:
            raise ValueError(
                "sizes must hold one positive number for each component of an entry of shape "
                f"{shape}, got {list(sizes)}. Build the embedding from the environment's spec "
                "(CombinedTimestepEncoder.from_specs)."
            )
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


class SequencePool(Configurable, nn.Module):
    """From a set or sequence of elements to features: what is there, on average.

        h_l = act(W x_l + p_l),    out = V [mean of h_l over the elements that are there; their share]

    The position ``p_l`` comes in before the nonlinearity, so that order survives the mean. With
    ``ordered=False`` there is none, and elements may be permuted.

    Args:
        length: L, most elements.
        input_size: E, features of an element.
        hidden_size: width of h.
        output_size: F.
        ordered: whether the order of elements matters.
        activation: see :func:`~torchrl_amago.modules._layers.make_activation`.

    Example:
        >>> pool = SequencePool(3, 2, hidden_size=8, output_size=4, ordered=False)
        >>> x_1LE, there_1L = torch.randn(1, 3, 2), torch.tensor([[True, True, False]])
        >>> same = pool(x_1LE, there_1L) - pool(x_1LE[:, [1, 0, 2]], there_1L)
        >>> bool((same.abs() < 1e-6).all())
        True
    """

    def __init__(
        self,
        length: int,
        input_size: int,
        *,
        hidden_size: int,
        output_size: int,
        ordered: bool,
        activation: str = "leaky_relu",
    ) -> None:
        super().__init__()
        self.hidden = nn.Linear(input_size, hidden_size)
        self.position = nn.Parameter(torch.empty(length, hidden_size)) if ordered else None
        self.reset_parameters()
        self.activation = make_activation(activation)
        self.out = nn.Linear(hidden_size + 1, output_size)

    def reset_parameters(self) -> None:
        """Draw positions anew; layers reset themselves."""
        if self.position is not None:
            nn.init.normal_(self.position, std=0.02)

    def forward(self, x_MLE: Tensor, there_ML: Tensor) -> Tensor:
        """Pool; what lies under False has no influence, NaN included."""
        there_ML1 = there_ML.unsqueeze(-1)
        hidden_MLH = self.hidden(torch.where(there_ML1, x_MLE, 0.0))
        if self.position is not None:
            hidden_MLH = hidden_MLH + self.position
        total_MH = torch.where(there_ML1, self.activation(hidden_MLH), 0.0).sum(-2)
        count_M1 = there_ML.sum(-1, keepdim=True).to(total_MH.dtype)
        fraction_M1 = count_M1 / there_ML.shape[-1]
        return self.out(torch.cat((total_MH / count_M1.clamp(min=1), fraction_M1), -1))


class TokenEmbedding(EntryEmbedding):
    """A sequence of tokens: looked up in one table, given positions, pooled by :class:`SequencePool`.

    Args:
        length: L, tokens in a step's entry.
        num_tokens: size of the vocabulary.
        embedding_size: E, features of a token.
        hidden_size: width before pooling.
        output_size: F.
        padding_token: token that fills up short sequences, which isn't looked at; None for none.
        ordered: whether the order of tokens matters.
        mask_key: entry that is True on real tokens, ``[*M, L]``.
        activation: see :func:`~torchrl_amago.modules._layers.make_activation`.

    Raises:
        ValueError: when called, if a token is out of range.

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
        hidden_size: int = 64,
        output_size: int = 64,
        padding_token: int | None = None,
        ordered: bool = True,
        mask_key: NestedKey | None = None,
        activation: str = "leaky_relu",
    ) -> None:
        super().__init__((length,), output_size, mask_key)
        self.num_tokens, self.padding_token = num_tokens, padding_token
        self.table = nn.Embedding(num_tokens, embedding_size)
        self.pool = SequencePool(
            length,
            embedding_size,
            hidden_size=hidden_size,
            output_size=output_size,
            ordered=ordered,
            activation=activation,
        )

    def forward(self, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Embed integers ``[*M, L]``; ``mask`` is True on real tokens (default: all)."""
        token_ML = value.long()  # bytes would take -1 for 255
        there_ML = torch.ones_like(value, dtype=torch.bool) if mask is None else mask
        if self.padding_token is not None:
            there_ML = there_ML & (token_ML != self.padding_token)
        # Padding may be a number that is no token.
        token_ML = token_ML.masked_fill(~there_ML, 0)
        check_range(token_ML, self.num_tokens, "a token")
        return self.pool(self.table(token_ML), there_ML)
