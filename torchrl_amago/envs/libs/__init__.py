"""Tasks made from other packages' environments, each with an extra to install."""

from torchrl_amago.envs.libs.half_cheetah_vel import HalfCheetahVel
from torchrl_amago.envs.libs.inverted_actuators import InvertedActuators
from torchrl_amago.envs.libs.meta_world import MetaWorld
from torchrl_amago.envs.libs.procgen import Procgen

__all__ = ["HalfCheetahVel", "InvertedActuators", "MetaWorld", "Procgen"]
