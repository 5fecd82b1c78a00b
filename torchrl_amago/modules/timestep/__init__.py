"""Timestep encoders: each step alone, from observations and the previous step to one vector."""

from torchrl_amago.modules.timestep.base import TimestepEncoder, flatten_and_join
from torchrl_amago.modules.timestep.combined import CNNTimestepEncoder, CombinedTimestepEncoder
from torchrl_amago.modules.timestep.embeddings import (
    CategoryEmbedding,
    EntryEmbedding,
    GoalEmbedding,
    TokenEmbedding,
)
from torchrl_amago.modules.timestep.grid import GridEmbedding
from torchrl_amago.modules.timestep.make import (
    TIMESTEP_ENCODERS,
    make_timestep_encoder,
    observation_specs,
)
from torchrl_amago.modules.timestep.mlp import MLPTimestepEncoder
from torchrl_amago.modules.timestep.vision import (
    TRUNKS,
    ConvTrunk,
    ImageEmbedding,
    ImpalaTrunk,
    sample_shifts,
    shift_images,
)

__all__ = [
    "TIMESTEP_ENCODERS", "TRUNKS", "CNNTimestepEncoder", "CategoryEmbedding",
    "CombinedTimestepEncoder", "ConvTrunk", "EntryEmbedding", "GoalEmbedding", "GridEmbedding",
    "ImageEmbedding", "ImpalaTrunk", "MLPTimestepEncoder", "TimestepEncoder", "TokenEmbedding",
    "flatten_and_join", "make_timestep_encoder", "observation_specs", "sample_shifts",
    "shift_images",
]  # fmt: skip
