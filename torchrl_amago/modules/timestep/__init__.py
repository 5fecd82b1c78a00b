"""Timestep encoders: each step alone, from observations and the previous step to one vector."""

from torchrl_amago.modules.timestep.base import TimestepEncoder
from torchrl_amago.modules.timestep.mlp import MLPTimestepEncoder

__all__ = ["MLPTimestepEncoder", "TimestepEncoder"]
