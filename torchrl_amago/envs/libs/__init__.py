"""Environments of other packages, in batches, and tasks made of them."""

from torchrl_amago.envs.libs.dm_alchemy import DMAlchemy
from torchrl_amago.envs.libs.gymnasium_rows import ReseedEpisodes, gymnasium_rows
from torchrl_amago.envs.libs.half_cheetah_vel import HalfCheetahVel

__all__ = ["DMAlchemy", "HalfCheetahVel", "ReseedEpisodes", "gymnasium_rows"]
