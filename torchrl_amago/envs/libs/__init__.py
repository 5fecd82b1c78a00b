"""Tasks made from other packages' environments, each with an extra to install."""

from torchrl_amago.envs.libs.half_cheetah_vel import HalfCheetahVel

__all__ = ["HalfCheetahVel"]
