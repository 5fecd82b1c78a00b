"""From the specs of observations to what embeds them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from tensordict import NestedKey
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    MultiCategorical,
    OneHot,
    TensorSpec,
    Unbounded,
)

from torchrl_amago.modules.timestep.base import Shape
from torchrl_amago.modules.timestep.embeddings import (
    CategoryEmbedding,
    EntryEmbedding,
    TokenEmbedding,
)
from torchrl_amago.modules.timestep.goals import GoalEmbedding
from torchrl_amago.modules.timestep.vision import ImageEmbedding

EntryOptions = Mapping[str, Any]

KINDS = ("vector", "image", "category", "tokens", "goals")


def kind_of(spec: TensorSpec) -> str | None:
    """What an entry is taken for if nobody says: one of :data:`KINDS`, None for nothing known.

    Example:
        >>> kind_of(Categorical(5)), kind_of(Bounded(0, 255, shape=(8, 8, 3), dtype=torch.uint8))
        ('category', 'image')
    """
    if isinstance(spec, OneHot | Binary) or spec.dtype == torch.bool:
        # A linear layer on zeros and ones is a table already.
        return "vector"
    if isinstance(spec, Categorical):
        return "category"
    if isinstance(spec, Bounded | Unbounded):
        return "image" if len(spec.shape) == 3 else "vector"
    return None


def embed_specs(
    specs: Mapping[NestedKey, TensorSpec], entries: Mapping[NestedKey, EntryOptions]
) -> tuple[dict[NestedKey, EntryEmbedding], dict[NestedKey, Shape]]:
    """Embeddings, and shapes of vectors: the first arguments of ``CombinedTimestepEncoder``.

    Args:
        specs: for each entry, in order, the spec of one step.
        entries: for some of them, arguments of their embedding, and ``"kind"`` to override the
            choice by spec.

    Raises:
        ValueError: if an entry has a spec that nothing here embeds, or isn't there.
    """
    if unknown := set(entries) - set(specs):
        raise ValueError(
            f"entries names {sorted(map(str, unknown))}, but what is read is {list(specs)}. "
            "Correct the name, or read the entry too (obs_keys)."
        )
    masks = {options["mask_key"] for options in entries.values() if "mask_key" in options}
    if both := masks & set(entries):
        raise ValueError(
            f"entries {sorted(map(str, both))} are masks of others (mask_key) and not embedded themselves, so "
            "that they have no options. Drop those."
        )
    embeddings, vectors = {}, {}
    for key, spec in specs.items():
        if key in masks:
            continue
        options = dict(entries.get(key, {}))
        kind = options.pop("kind", kind_of(spec))
        if kind == "vector" and options:
            raise ValueError(
                f"entry {key!r} is a vector, and vectors have no options of their own, got "
                f"{sorted(options)}. Set its 'kind' ({', '.join(KINDS)}), or drop them."
            )
        if kind == "vector":
            vectors[key] = tuple(spec.shape)
        else:
            embeddings[key] = _embedding(key, spec, kind, options)
    return embeddings, vectors


def _embedding(
    key: NestedKey, spec: TensorSpec, kind: str | None, options: dict[str, Any]
) -> EntryEmbedding:
    if kind is None:
        raise ValueError(
            f"don't know how to embed entry {key!r} with a spec {type(spec).__name__}. Leave it out with "
            "obs_keys, or write an EntryEmbedding for it and build a CombinedTimestepEncoder by hand."
        )
    if kind == "image":
        return ImageEmbedding(spec.shape, **options)
    if kind == "category":
        return CategoryEmbedding(_sizes(key, spec, kind), shape=spec.shape, **options)
    if kind == "tokens":
        _require_dimensions(key, spec, kind, 1)
        return TokenEmbedding(spec.shape[0], max(_sizes(key, spec, kind)), **options)
    if kind == "goals":
        _require_dimensions(key, spec, kind, 2)
        if isinstance(spec, Categorical) and not isinstance(spec, Binary):
            options = {"num_tokens": max(_sizes(key, spec, kind)), **options}
        return GoalEmbedding(*spec.shape, **options)
    raise ValueError(
        f"the kind of entry {key!r} must be one of {KINDS}, got {kind!r}. "
        "For another, build a CombinedTimestepEncoder with your own EntryEmbedding."
    )


def _sizes(key: NestedKey, spec: TensorSpec, kind: str) -> list[int]:
    """How many values each number of an entry may take."""
    if isinstance(spec, MultiCategorical):
        return spec.nvec.expand(spec.shape).reshape(-1).tolist()
    if isinstance(spec, Categorical):
        return [int(spec.space.n)] * spec.shape.numel()
    raise ValueError(
        f"entry {key!r} can only be of kind {kind!r} if its spec says how many values there are "
        f"(Categorical or MultiCategorical), got {type(spec).__name__}. Change the environment's "
        "spec, or choose another kind."
    )


def _require_dimensions(key: NestedKey, spec: TensorSpec, kind: str, number: int) -> None:
    if len(spec.shape) != number:
        wanted = {1: "[tokens]", 2: "[goals, numbers of a goal]"}[number]
        raise ValueError(
            f"entry {key!r} must have the shape {wanted} to be of kind {kind!r}, got "
            f"{tuple(spec.shape)}. Reshape it in the environment, or choose another kind."
        )
