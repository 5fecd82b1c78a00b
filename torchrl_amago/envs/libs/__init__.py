"""Tasks made from other packages' environments, each with an extra to install."""

from torchrl_amago.envs.libs.dm_alchemy import DMAlchemy
from torchrl_amago.envs.libs.half_cheetah_vel import HalfCheetahVel

__all__ = ["DMAlchemy", "HalfCheetahVel"]
