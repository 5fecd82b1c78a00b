"""Tasks made from other packages' environments, each with an extra to install."""

from torchrl_amago.envs.libs.craftax import craftax_env
from torchrl_amago.envs.libs.gymnax import gymnax_env
from torchrl_amago.envs.libs.half_cheetah_vel import HalfCheetahVel
from torchrl_amago.envs.libs.jax_env import JaxEnv
from torchrl_amago.envs.libs.xland import trivial_ruleset, xland_env

__all__ = ["HalfCheetahVel", "JaxEnv", "craftax_env", "gymnax_env", "trivial_ruleset", "xland_env"]
