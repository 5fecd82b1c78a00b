"""Embeddings of observations, chosen by their specs."""

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
from torchrl_amago.modules.timestep.embeddings import CategoryEmbedding, EntryEmbedding
from torchrl_amago.modules.timestep.sequences import GoalEmbedding, TokenEmbedding
from torchrl_amago.modules.timestep.vision import ImageEmbedding

EntryOptions = Mapping[str, Any]

KINDS = ("vector", "image", "category", "tokens", "goals")


def default_kind(spec: TensorSpec) -> str | None:
    """Return the default kind of an entry, one of :data:`KINDS`, or None for an unknown spec.

    Example:
        >>> default_kind(Categorical(5)), default_kind(Unbounded((8, 8, 3)))
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
    """Return embeddings and shapes of vectors, the arguments of ``CombinedTimestepEncoder``.

    Args:
        specs: for each entry, in order, the spec of one step.
        entries: for some of them, arguments of their embedding, and ``"kind"``.

    Raises:
        ValueError: if an entry has a spec or kind that nothing here embeds, or isn't there.
    """
    masks = {options["mask_key"] for options in entries.values() if "mask_key" in options}
    embedded = {key: spec for key, spec in specs.items() if key not in masks}
    if unknown := set(entries) - set(embedded):
        raise ValueError(
            f"entries names {sorted(map(str, unknown))}, but what is embedded is {list(embedded)} "
            "(masks are not). Correct the name, or read the entry too (obs_keys)."
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
    num_dims = {"tokens": 1, "goals": 2}.get(kind, len(spec.shape))
    sizes = None if kind == "vector" else _sizes(spec)
    if len(spec.shape) == num_dims:
        if kind == "image":
            return ImageEmbedding(spec.shape, **options)
        if kind == "category" and sizes:
            return CategoryEmbedding(sizes, shape=spec.shape, **options)
        if kind == "tokens" and sizes:
            return TokenEmbedding(spec.shape[0], max(sizes), **options)
        if kind == "goals":
            options = {"num_tokens": max(sizes) if sizes else None, **options}
            return GoalEmbedding(*spec.shape, **options)
    raise ValueError(
        f"entry {key!r} can't be embedded as kind {kind!r}: kinds are {KINDS}; categories and "
        "tokens [L] need a Categorical or MultiCategorical spec, goals the shape [L, N], vectors "
        f"have no options. Got {type(spec).__name__} {tuple(spec.shape)} and {options}. Choose "
        "another kind, leave it out with obs_keys, or write an EntryEmbedding for it."
    )


def _sizes(spec: TensorSpec) -> list[int] | None:
    """Return the number of values of each component, None if the spec doesn't say."""
    if isinstance(spec, MultiCategorical):
        return spec.nvec.expand(spec.shape).reshape(-1).tolist()
    if isinstance(spec, Categorical) and not isinstance(spec, Binary):
        return [int(spec.space.n)] * spec.shape.numel()
    return None
