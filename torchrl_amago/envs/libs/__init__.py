"""Tasks made from other packages' environments, each with an extra to install."""

from torchrl_amago.envs.libs.half_cheetah_vel import HalfCheetahVel
from torchrl_amago.envs.libs.inverted_actuators import InvertedActuators
from torchrl_amago.envs.libs.meta_world import MetaWorld

__all__ = ["HalfCheetahVel", "InvertedActuators", "MetaWorld"]
