"""Environments of other packages, in batches, and tasks made of them."""

from torchrl_amago.envs.libs.gymnasium_rows import ReseedEpisodes, gymnasium_rows
from torchrl_amago.envs.libs.half_cheetah_vel import HalfCheetahVel

__all__ = ["HalfCheetahVel", "ReseedEpisodes", "gymnasium_rows"]
