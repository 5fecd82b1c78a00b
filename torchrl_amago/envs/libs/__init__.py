"""Environments of other packages, in batches, and tasks made of them."""

from torchrl_amago.envs.libs.craftax import craftax_env
from torchrl_amago.envs.libs.gymnasium_rows import ReseedEpisodes, gymnasium_rows
from torchrl_amago.envs.libs.gymnax import gymnax_env
from torchrl_amago.envs.libs.half_cheetah_vel import HalfCheetahVel
from torchrl_amago.envs.libs.jax_env import JaxEnv
from torchrl_amago.envs.libs.xland import trivial_ruleset, xland_env

__all__ = [
    "HalfCheetahVel",
    "JaxEnv",
    "ReseedEpisodes",
    "craftax_env",
    "gymnasium_rows",
    "gymnax_env",
    "trivial_ruleset",
    "xland_env",
]
