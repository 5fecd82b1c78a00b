"""The timestep encoder for images, vectors, categories, tokens and goals together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from tensordict import NestedKey
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.modules.functional import symlog

from torchrl_amago._validation import check_choice
from torchrl_amago.modules._input_norm import InputNorm
from torchrl_amago.modules._layers import MLP, make_activation, make_norm
from torchrl_amago.modules.timestep._specs import EntryOptions, embed_specs
from torchrl_amago.modules.timestep.base import Shape, TimestepEncoder, flatten_and_join
from torchrl_amago.modules.timestep.embeddings import EntryEmbedding

VectorScale = Literal["normalize", "symlog", "none"]


class CombinedTimestepEncoder(TimestepEncoder):
    """An embedding for each entry, all of them side by side through an MLP.

        out = out_norm(mlp(act(norm([embedding_1(x_1), ..., linear(scale(vectors))]))))

    :meth:`from_specs` (or ``make_policy(..., timestep_encoder="combined")``) chooses the embeddings
    by the entries' specs. Other arguments: see :class:`TimestepEncoder`.

    Args:
        embeddings: for each entry that isn't a vector, the module that embeds it, such as
            :class:`ImageEmbedding`, or your own :class:`EntryEmbedding`.
        vectors: for each entry that is (of any shape), the shape of one step; they are flattened
            and joined.
        vector_features: features of all vectors together.
        vector_scale: scale vectors by moving averages of mean and deviation (``normalize``), by
            symlog (arXiv 2301.04104, eq. 9), or not at all (``none``).
        num_layers: number of hidden layers; with 0 the features go through one linear layer.

    Example:
        >>> from torchrl_amago.modules.timestep import CategoryEmbedding
        >>> embeddings = {"cards": CategoryEmbedding([13, 4])}
        >>> encoder = CombinedTimestepEncoder(embeddings, {"prev_reward": (1,)}, output_size=16)
        >>> encoder(cards=torch.tensor([[12, 3]]), prev_reward=torch.zeros(1, 1)).shape
        torch.Size([1, 16])
    """

    casts_to_float = False

    def __init__(
        self,
        embeddings: Mapping[NestedKey, EntryEmbedding],
        vectors: Mapping[NestedKey, Shape],
        *,
        vector_features: int = 64,
        vector_scale: VectorScale = "normalize",
        hidden_size: int = 512,
        num_layers: int = 1,
        output_size: int = 256,
        activation: str = "leaky_relu",
        norm: str = "none",
        out_norm: str = "layer",
        **options: Any,
    ) -> None:
        check_choice("vector_scale", vector_scale, get_args(VectorScale))
        shapes = {key: embedding.shape for key, embedding in embeddings.items()} | dict(vectors)
        shapes |= {e.mask_key: e.shape[:1] for e in embeddings.values() if e.mask_key is not None}
        super().__init__(shapes, output_size, **options)
        self.vector_shapes, self.vector_scale = dict(vectors), vector_scale
        self.embeddings = nn.ModuleList(embeddings.values())
        sizes = [embedding.output_size for embedding in embeddings.values()]
        vector_size = sum(torch.Size(shape).numel() for shape in vectors.values())
        self.input_norm = self.vectors = None
        if vectors:
            self.vectors = nn.Linear(vector_size, vector_features)
            sizes.append(vector_features)
            if vector_scale == "normalize":
                self.input_norm = InputNorm(vector_size)
        size = sum(sizes)
        self.norm = make_norm(norm, size)
        self.activation = make_activation(activation)
        self.merge = nn.Linear(size, output_size)
        if num_layers:
            self.merge = MLP(size, hidden_size, num_layers, output_size, activation, norm)
        self.out_norm = make_norm(out_norm, output_size)

    @classmethod
    def from_specs(
        cls,
        specs: Mapping[NestedKey, TensorSpec],
        *,
        entries: Mapping[NestedKey, EntryOptions] | None = None,
        **options: Any,
    ) -> CombinedTimestepEncoder:
        """Build the encoder for the observations of an environment.

        ``Categorical`` and ``MultiCategorical`` (``MultiDiscrete``) entries become categories with
        tables of the spec's sizes, numbers of three dimensions images, and all others (``OneHot``,
        ``Binary``, ``Bounded``, ``Unbounded``) vectors.

        Args:
            specs: for each entry to read, in order, the spec of one step.
            entries: for some of them, arguments of their embedding; ``"kind"`` among these
                overrides the choice by spec: ``"vector"``, ``"image"``, ``"category"``,
                ``"tokens"`` or ``"goals"``.
            options: further arguments of the constructor.

        Raises:
            ValueError: if an entry has a spec or kind that none of these embeds, or isn't there.

        Example:
            >>> from torchrl.data import Bounded, Categorical
            >>> specs = {"words": Categorical(50, shape=(6,)), "position": Bounded(-1, 1, (2,))}
            >>> entries = {"words": {"kind": "tokens", "padding_token": 0}}
            >>> CombinedTimestepEncoder.from_specs(specs, entries=entries).embeddings[0].table
            Embedding(50, 32)
        """
        return cls(*embed_specs(specs, entries or {}), **options)

    def encode(self, inputs: list[Tensor], mask: Tensor | None) -> Tensor:
        """Embed every entry, join, merge."""
        value_of = dict(zip(self.in_keys, inputs, strict=True))
        features = []
        for key, embedding in zip(self.in_keys, self.embeddings, strict=False):
            # Masks are bool in the environment; in between, a buffer may have made them numbers.
            masks = [value_of[embedding.mask_key].bool()] if embedding.mask_key is not None else []
            features.append(embedding(value_of[key], *masks))
        if self.vectors is not None:
            features.append(self.vectors(self._scaled_vectors(value_of, mask)))
        return self.out_norm(self.merge(self.activation(self.norm(torch.cat(features, -1)))))

    def augment(self, inputs: list[Tensor], rows: Tensor, num_rows: int) -> list[Tensor]:
        """Augment each entry by its embedding."""
        pairs = zip(self.embeddings, inputs, strict=False)
        augmented = [embedding.augment(value, rows, num_rows) for embedding, value in pairs]
        return augmented + inputs[len(augmented) :]

    def _scaled_vectors(self, value_of: dict[NestedKey, Tensor], mask: Tensor | None) -> Tensor:
        values = [value_of[key].to(self.vectors.weight.dtype) for key in self.vector_shapes]
        x = flatten_and_join(values, list(self.vector_shapes.values()))
        if self.vector_scale == "symlog":
            return symlog(x)
        if self.input_norm is not None:
            if self.moves_statistics:
                self.input_norm.update(x.detach(), mask)
            x = self.input_norm(x)
        return x
