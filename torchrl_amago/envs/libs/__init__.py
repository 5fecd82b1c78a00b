"""Tasks made from other packages' environments; each needs an extra, and says which."""

from torchrl_amago.envs.libs.half_cheetah_vel import HalfCheetahVel

__all__ = ["HalfCheetahVel"]
