"""Timestep encoders for mixtures of entries, embedded by their specs, and for one image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, get_args

import torch
from tensordict import NestedKey
from torch import Tensor, nn
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    MultiCategorical,
    OneHot,
    TensorSpec,
    Unbounded,
)
from torchrl.modules.functional import symlog

from torchrl_amago._validation import check_choice
from torchrl_amago.modules._input_norm import InputNorm
from torchrl_amago.modules._layers import MLP, make_activation, make_norm
from torchrl_amago.modules.timestep.base import Shape, TimestepEncoder, flatten_and_join
from torchrl_amago.modules.timestep.embeddings import (
    CategoryEmbedding,
    EntryEmbedding,
    GoalEmbedding,
    TokenEmbedding,
)
from torchrl_amago.modules.timestep.grid import GridEmbedding
from torchrl_amago.modules.timestep.vision import ImageEmbedding

EntryOptions = Mapping[str, Any]
VectorScale = Literal["normalize", "symlog", "none"]

KINDS = ("vector", "image", "category", "grid", "tokens", "goals")
_OF_IMAGE = ("trunk", "trunk_options", "channels_first", "random_shift", "random_shift_fraction")


class CombinedTimestepEncoder(TimestepEncoder):
    """An embedding for each entry, all of them side by side through an MLP.

        out = out_norm(mlp(act(norm([embedding_1(x_1), ..., linear(scale(vectors))]))))

    :meth:`from_specs` chooses the embeddings by the entries' specs. Other arguments: see
    :class:`TimestepEncoder`.

    Args:
        embeddings: for each entry that isn't a vector, the module that embeds it.
        vectors: for each entry that is, the shape of one step; they are flattened and joined.
        vector_features: features of all vectors together.
        vector_scale: scale vectors by moving averages of mean and deviation (``normalize``), by
            symlog (arXiv 2301.04104, eq. 9), or not at all (``none``).
        num_layers: number of hidden layers; with 0 the features go through one linear layer.

    Example:
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
        self.vectors = nn.Linear(vector_size, vector_features) if vectors else None
        normalizes = vectors and vector_scale == "normalize"
        self.input_norm = InputNorm(vector_size) if normalizes else None
        size = sum(sizes) + (vector_features if vectors else 0)
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
        """Build the encoder from the spec of one step of each entry to read, in order.

        ``Categorical`` and ``MultiCategorical`` (``MultiDiscrete``) entries become categories with
        tables of the spec's sizes, those of three dimensions grids, numbers of three dimensions
        images, and all others (``OneHot``, ``Binary``, ``Bounded``, ``Unbounded``) vectors.

        ``entries`` has arguments of some entries' embeddings; ``"kind"`` among these overrides the
        choice by spec: one of :data:`KINDS`. A ``"grid"`` of ids that the spec says are bytes needs
        its ``"sizes"``, too.
        Raises ValueError if an entry has a spec or kind that none of these embeds, or isn't there.
        """
        return cls(*_embed_specs(specs, entries or {}), **options)

    def encode(self, inputs: list[Tensor], mask: Tensor | None) -> Tensor:
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
        pairs = zip(self.embeddings, inputs, strict=False)
        augmented = [embedding.augment(value, rows, num_rows) for embedding, value in pairs]
        return augmented + inputs[len(augmented) :]

    def _scaled_vectors(self, value_of: dict[NestedKey, Tensor], mask: Tensor | None) -> Tensor:
        values = [value_of[key].to(self.vectors.weight.dtype) for key in self.vector_shapes]
        x = flatten_and_join(values, list(self.vector_shapes.values()))
        if self.input_norm is not None:
            return self.input_norm(x, mask, self.moves_statistics)
        return symlog(x) if self.vector_scale == "symlog" else x


class CNNTimestepEncoder(CombinedTimestepEncoder):
    """:class:`CombinedTimestepEncoder` of one image, with AMAGO's sizes for pixels.

    All entries but the image are flattened, joined and scaled by symlog.

    Args:
        image_key: entry of the image; by default the only one of three dimensions.
        image_features: features of the image; ``vector_features`` of all other entries together.
        options: arguments of :class:`ImageEmbedding` and of :class:`CombinedTimestepEncoder`.

    Raises:
        ValueError: if there isn't one image, or it is smaller than the trunk needs.

    Example:
        >>> encoder = CNNTimestepEncoder({"pixels": (40, 40, 3), "prev_reward": (1,)})
        >>> encoder.out_keys, encoder.output_size
        (['timestep'], 256)
    """

    def __init__(
        self,
        shapes: Mapping[NestedKey, Shape],
        *,
        image_key: NestedKey | None = None,
        image_features: int = 256,
        vector_features: int = 12,
        output_size: int = 256,
        num_layers: int = 0,
        **options: Any,
    ) -> None:
        images = [key for key, shape in shapes.items() if len(shape) == 3]
        if image_key not in images and (image_key is not None or len(images) != 1):
            rule = "CNNTimestepEncoder needs one image, an entry of three dimensions"
            raise ValueError(f"{rule}, got {images} among {dict(shapes)}. Use image_key.")
        image_key = images[0] if image_key is None else image_key
        of_image = {name: options.pop(name) for name in _OF_IMAGE if name in options}
        if "activation" in options:
            of_image["activation"] = options["activation"]
        image = ImageEmbedding(shapes[image_key], output_size=image_features, **of_image)
        vectors = {key: shape for key, shape in shapes.items() if key != image_key}
        options = {"vector_scale": "symlog", "num_layers": num_layers, **options}
        sizes = {"vector_features": vector_features, "output_size": output_size}
        super().__init__({image_key: image}, vectors, **sizes, **options)

    @classmethod
    def from_specs(
        cls, specs: Mapping[NestedKey, TensorSpec], **options: Any
    ) -> CNNTimestepEncoder:
        """Build the encoder from specs, see :class:`TimestepEncoder`; none may be a category."""
        if categories := [k for k, x in specs.items() if default_kind(x) in ("category", "grid")]:
            rule = f"CNNTimestepEncoder reads an image and vectors, but {categories} are categories"
            raise ValueError(f"{rule}. Use the combined encoder, or leave them out with obs_keys.")
        return cls({key: tuple(spec.shape) for key, spec in specs.items()}, **options)


def default_kind(spec: TensorSpec) -> str | None:
    """Return the default kind of an entry, one of :data:`KINDS`, or None for an unknown spec."""
    if isinstance(spec, OneHot | Binary) or spec.dtype == torch.bool:
        # A linear layer on zeros and ones is a table already.
        return "vector"
    if isinstance(spec, Categorical):
        return "grid" if len(spec.shape) == 3 else "category"
    if isinstance(spec, Bounded | Unbounded):
        return "image" if len(spec.shape) == 3 else "vector"
    return None


def _embed_specs(
    specs: Mapping[NestedKey, TensorSpec], entries: Mapping[NestedKey, EntryOptions]
) -> tuple[dict[NestedKey, EntryEmbedding], dict[NestedKey, Shape]]:
    """Return embeddings and shapes of vectors, see :meth:`CombinedTimestepEncoder.from_specs`."""
    masks = {options["mask_key"] for options in entries.values() if "mask_key" in options}
    embedded = {key: spec for key, spec in specs.items() if key not in masks}
    if unknown := set(entries) - set(embedded):
        raise ValueError(
            f"entries names {sorted(map(str, unknown))}, but what is embedded is {list(embedded)} "
            "(masks are not)."
        )
    embeddings, vectors = {}, {}
    for key, spec in embedded.items():
        options = dict(entries.get(key, {}))
        kind = options.pop("kind", default_kind(spec))
        if kind == "vector" and not options:
            vectors[key] = tuple(spec.shape)
        else:
            embeddings[key] = _embedding(key, spec, kind, options)
    return embeddings, vectors


def _embedding(
    key: NestedKey, spec: TensorSpec, kind: str | None, options: dict[str, Any]
) -> EntryEmbedding:
    num_dims = {"tokens": 1, "goals": 2, "grid": 3}.get(kind, len(spec.shape))
    sizes = None if kind == "vector" else _sizes(spec)
    if len(spec.shape) == num_dims:
        if kind == "image":
            return ImageEmbedding(spec.shape, **options)
        if kind == "category" and sizes:
            return CategoryEmbedding(sizes, shape=spec.shape, **options)
        if kind == "grid" and (sizes or "sizes" in options):
            if "sizes" not in options:  # of each category, the largest of all cells
                options["sizes"] = torch.tensor(sizes).reshape(-1, spec.shape[-1]).amax(0).tolist()
            return GridEmbedding(spec.shape, **options)
        if kind == "tokens" and sizes:
            return TokenEmbedding(spec.shape[0], max(sizes), **options)
        if kind == "goals":
            options = {"num_tokens": max(sizes) if sizes else None, **options}
            return GoalEmbedding(*spec.shape, **options)
    got = f"Got {type(spec).__name__} {tuple(spec.shape)} and {options}. Or use obs_keys."
    raise ValueError(
        f"entry {key!r} can't be embedded as kind {kind!r}: kinds are {KINDS}; categories and "
        f"tokens [L] need a spec of categories, grids [H, W, C] that or sizes, goals the shape "
        f"[L, N], vectors no options. {got}"
    )


def _sizes(spec: TensorSpec) -> list[int] | None:
    """Return the number of values of each component, None if the spec doesn't say."""
    if isinstance(spec, MultiCategorical):
        return spec.nvec.expand(spec.shape).reshape(-1).tolist()
    if isinstance(spec, Categorical) and not isinstance(spec, Binary):
        return [int(spec.space.n)] * spec.shape.numel()
    return None
