"""The timestep encoder for everything at once: images, vectors, categories, tokens and goals."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import torch
from tensordict import NestedKey
from torch import Tensor, nn
from torchrl.data import TensorSpec
from torchrl.modules.functional import symlog

from torchrl_amago.modules._input_norm import InputNorm
from torchrl_amago.modules._layers import MLP, make_activation, make_norm
from torchrl_amago.modules.timestep._specs import EntryOptions, embed_specs
from torchrl_amago.modules.timestep.base import Shape, TimestepEncoder, flatten_and_join
from torchrl_amago.modules.timestep.embeddings import EntryEmbedding

VectorScale = Literal["normalize", "symlog", "none"]


class CombinedTimestepEncoder(TimestepEncoder):
    """Each entry to features of its own, all of them side by side through an MLP.

        out = out_norm(mlp(act(norm([embedding_1(x_1), ..., linear(scale(vectors))]))))

    :meth:`from_specs` (or ``make_policy(..., timestep_encoder="combined")``) chooses what becomes of
    each entry by its spec.

    Args:
        embeddings: for each entry that isn't a vector, the module that embeds it, such as
            :class:`ImageEmbedding`, :class:`CategoryEmbedding`, :class:`TokenEmbedding`,
            :class:`GoalEmbedding`, or your own :class:`EntryEmbedding`.
        vectors: for each entry that is (of any shape), the shape of one step; they are flattened and
            joined.
        vector_features: features of all vectors together.
        vector_scale: how vectors are brought to scale: by moving averages of mean and deviation
            (``normalize``), by symlog (arXiv 2301.04104, eq. 9), or not at all (``none``).
        hidden_size: width of the hidden layers.
        num_layers: number of hidden layers; with 0 the features go through one linear layer.
        output_size: D.
        activation: see :func:`~torchrl_amago.modules._layers.make_activation`.
        norm: norm of the features and hidden layers, see
            :func:`~torchrl_amago.modules._layers.make_norm`.
        out_norm: norm of the output.
        options: switches and keys of :class:`TimestepEncoder`.

    Raises:
        ValueError: if there are no entries, an entry appears twice, or an option is unknown.
        KeyError: if the tensordict lacks an entry.

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl_amago.modules.timestep import CategoryEmbedding
        >>> encoder = CombinedTimestepEncoder(
        ...     {"cards": CategoryEmbedding([13, 4])}, {"prev_reward": (1,)}, output_size=16)
        >>> td = TensorDict(cards=[[12, 3], [0, 1]], prev_reward=torch.zeros(2, 1), batch_size=[2])
        >>> encoder(td)["timestep"].shape
        torch.Size([2, 16])
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
        if vector_scale not in ("normalize", "symlog", "none"):
            raise ValueError(
                f"vector_scale must be 'normalize', 'symlog' or 'none', got {vector_scale!r}. "
                "'normalize' fits vectors of any scale."
            )
        if twice := set(embeddings) & set(vectors):
            raise ValueError(
                f"{sorted(map(str, twice))} is among both embeddings and vectors. "
                "Name each entry once."
            )
        shapes = {key: embedding.shape for key, embedding in embeddings.items()} | dict(vectors)
        shapes |= {e.mask_key: e.shape[:1] for e in embeddings.values() if e.mask_key is not None}
        super().__init__(shapes, output_size, **options)
        self.vector_keys = list(vectors)
        self.vector_scale = vector_scale
        self.embeddings = nn.ModuleList(embeddings.values())
        sizes = [embedding.output_size for embedding in embeddings.values()]
        vector_size = sum(torch.Size(shape).numel() for shape in vectors.values())
        self.input_norm = self.vectors = None
        if vectors:
            self.vectors = nn.Linear(vector_size, vector_features)
            sizes.append(vector_features)
            if vector_scale == "normalize":
                self.input_norm = InputNorm(vector_size)
        names = [*embeddings, *(["the vectors"] if vectors else [])]
        made_of = (
            f"{' + '.join(map(str, sizes))} = {sum(sizes)} for the entries {names} (by output_size of "
            "an embedding, and vector_features)"
        )
        self.norm = make_norm(norm, sum(sizes), made_of)
        self.activation = make_activation(activation)
        self.merge = (
            MLP(sum(sizes), hidden_size, num_layers, output_size, activation=activation, norm=norm)
            if num_layers
            else nn.Linear(sum(sizes), output_size)
        )
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
        tables of the spec's sizes, numbers of three dimensions become images, and all else
        (``OneHot``, ``Binary``, ``Bounded``, ``Unbounded`` and their like) vectors.

        Args:
            specs: for each entry to read, in order, the spec of one step.
            entries: for some of them, arguments of their embedding; ``"kind"`` among these
                overrides the choice by spec: ``"vector"``, ``"image"``, ``"category"``,
                ``"tokens"`` or ``"goals"``.
            options: further arguments of the constructor.

        Raises:
            ValueError: if an entry has a spec that none of these embeds, or isn't there.

        Example:
            >>> from torchrl.data import Bounded, Categorical
            >>> specs = {
            ...     "instruction": Categorical(50, shape=(6,)),
            ...     "position": Bounded(-1, 1, shape=(2,)),
            ... }
            >>> entries = {"instruction": {"kind": "tokens", "padding_token": 0}}
            >>> encoder = CombinedTimestepEncoder.from_specs(specs, entries=entries)
            >>> encoder.embeddings[0].table
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
        """Let every embedding augment its entry."""
        augmented = [
            embedding.augment(value, rows, num_rows)
            for embedding, value in zip(self.embeddings, inputs, strict=False)
        ]
        return augmented + inputs[len(augmented) :]

    def _scaled_vectors(self, value_of: dict[NestedKey, Tensor], mask: Tensor | None) -> Tensor:
        dtype = self.vectors.weight.dtype
        values = [value_of[key].to(dtype) for key in self.vector_keys]
        first = len(self.embeddings)
        x = flatten_and_join(values, self.shapes[first : first + len(values)])
        if self.vector_scale == "symlog":
            return symlog(x)
        if self.input_norm is not None:
            if self.moves_statistics:
                self.input_norm.update(x.detach(), mask)
            x = self.input_norm(x)
        return x
