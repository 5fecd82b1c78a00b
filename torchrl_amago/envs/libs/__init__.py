"""Environments of other packages, in batches, and tasks made of them."""

from torchrl_amago.envs.libs.craftax import craftax_env
from torchrl_amago.envs.libs.crafter import CrafterInstructions
from torchrl_amago.envs.libs.dm_alchemy import DMAlchemy
from torchrl_amago.envs.libs.gymnasium_rows import ReseedEpisodes, gymnasium_rows
from torchrl_amago.envs.libs.gymnax import gymnax_env
from torchrl_amago.envs.libs.half_cheetah_vel import HalfCheetahVel
from torchrl_amago.envs.libs.inverted_actuators import InvertedActuators
from torchrl_amago.envs.libs.jax_env import JaxEnv
from torchrl_amago.envs.libs.meta_world import MetaWorld
from torchrl_amago.envs.libs.minigrid import MiniGrid
from torchrl_amago.envs.libs.multi_domain import MultiDomain
from torchrl_amago.envs.libs.procgen import Procgen
from torchrl_amago.envs.libs.retro import Retro
from torchrl_amago.envs.libs.showdown import ShowdownServer
from torchrl_amago.envs.libs.text import TextToTokens, Vocabulary
from torchrl_amago.envs.libs.xland import trivial_ruleset, xland_env

__all__ = [
    "CrafterInstructions",
    "DMAlchemy",
    "HalfCheetahVel",
    "InvertedActuators",
    "JaxEnv",
    "MetaWorld",
    "MiniGrid",
    "MultiDomain",
    "Procgen",
    "ReseedEpisodes",
    "Retro",
    "ShowdownServer",
    "TextToTokens",
    "Vocabulary",
    "craftax_env",
    "gymnasium_rows",
    "gymnax_env",
    "trivial_ruleset",
    "xland_env",
]
