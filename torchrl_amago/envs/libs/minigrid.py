"""MiniGrid and BabyAI: grids as categories, missions as tokens."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from torchrl_amago.envs.libs._extras import check_known, import_extra
from torchrl_amago.envs.libs.text import TextToTokens, Vocabulary

_WORDS = """
    , a after and at avoid ball behind blue box door end fetch find from front get go goal green
    grey hallway in key lava left matching must near next object of on open opening pick purple put
    reach red right room rooms square the then to traverse unlock up use yellow you your
"""
#: All words of the missions of MiniGrid 3 and BabyAI.
MISSION_WORDS = tuple(_WORDS.split())

#: Numbers of values of a cell's object, colour and state (of a door; or direction of an agent).
CELL_SIZES = (11, 6, 4)


class MiniGrid(gym.ObservationWrapper):
    """Any environment of MiniGrid or BabyAI (arXiv 2306.13831), by its id.

    Observations are ``image``, what the agent sees, ids ``[7, 7, 3]`` of object, colour and state,
    which a ``combined`` timestep encoder embeds as a grid; ``direction``, an id; and ``mission``,
    tokens ``[max_words]``: ``entries={"mission": {"kind": "tokens", "padding_token": 0}}``.
    Actions are one of 7. Success is a reward of up to 1, less the longer it takes, that ends the
    episode.

    The level depends on the reset's seed, and on nothing else: in trials of ``repeat="seed"``, the
    default, the agent tries the same level again.

    Args:
        env_id: such as ``"BabyAI-GoToRedBallNoDists-v0"``.
        max_words: length of the longest mission; 16 words hold the simpler ones, 48 all.
        options: further arguments of ``gymnasium.make``, such as ``max_steps`` or ``render_mode``.

    Raises:
        ImportError: if MiniGrid isn't installed.
        ValueError: for an unknown id.
        FileNotFoundError: for the ids with ``WFC``.

    Example:
        >>> MiniGrid("BabyAI-GoToRedBall-v0").action_space  # doctest: +SKIP
        Discrete(7)
    """

    def __init__(self, env_id: str, *, max_words: int = 16, **options: Any) -> None:
        minigrid = import_extra("minigrid", "minigrid")  # registers the ids
        known = [i for i in gym.registry if i.startswith(("MiniGrid-", "BabyAI-"))]
        check_known("env_id", env_id, known)
        patterns = Path(minigrid.__file__).parent / "envs/wfc/patterns"
        if "WFC" in env_id and not patterns.exists():
            raise FileNotFoundError(f"PyPI's minigrid lacks {patterns}, its repository has it.")
        env = gym.make(env_id, **options)
        env = TextToTokens(env, Vocabulary(MISSION_WORDS, max_words), keys=["mission"])
        super().__init__(env)
        entries = dict(env.observation_space.spaces)
        shape = entries["image"].shape
        cells = np.broadcast_to(CELL_SIZES, shape).copy()
        entries["image"] = gym.spaces.MultiDiscrete(cells)
        self.observation_space = gym.spaces.Dict(entries)
        # A plain space: the environment's own is an enumeration.
        self.action_space = gym.spaces.Discrete(int(env.action_space.n))

    def reset(self, **options: Any) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode at the level that the seed decides."""
        with contextlib.redirect_stdout(io.StringIO()):  # levels that BabyAI drew and rejected
            return super().reset(**options)

    def observation(self, observation: dict[str, Any]) -> dict[str, np.ndarray]:
        """Give ids a dtype that can't be mistaken for pixels."""
        image, direction = observation["image"].astype(np.int64), observation["direction"]
        return {**observation, "image": image, "direction": np.int64(direction)}
