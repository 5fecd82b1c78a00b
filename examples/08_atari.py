"""Train one agent on several Atari games, without telling it which one it plays.

    pip install "torchrl-amago[atari]"
    python examples/08_atari.py                                    # Pong, Boxing, Breakout, Gopher
    python examples/08_atari.py --games Pong --run-dir runs/pong
    python examples/08_atari.py --debug                            # a test of the setup

Every row of the batch plays one game, all of them with the full set of 18 actions and sticky
actions (arXiv 1709.06009). A trial is one life or game of at most `max_episode_steps` steps of four
frames. For a GPU: `--num-envs 64 --d-model 256 --num-layers 3 --total-updates 500000` (untried).
The run's folder gets `progress.csv`, curves, `trial.png`, `evaluation.npz`, weights, checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from common import command_line
from domain import DomainArgs, train
from torchrl.envs import EnvBase

from torchrl_amago import make_trial_env
from torchrl_amago.envs import gymnasium_rows


@dataclass
class Args(DomainArgs):
    """Atari, with AMAGO."""

    games: tuple[str, ...] = ("Pong", "Boxing", "Breakout", "Gopher")
    """Names of games, without `ALE/` and `-v5`."""
    frame_skip: int = 4
    """Frames of a step."""
    sticky: float = 0.25
    """Probability that a frame repeats the action before."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/atari")
    loss: str = "amago2"
    episodes: int = 1
    max_episode_steps: int = 2000
    context_length: int = 64
    round_steps: int = 64
    timestep_encoder: Literal["combined"] = "combined"
    num_envs: int = 8
    batch_size: int = 16
    d_model: int = 128
    total_updates: int = 20_000
    anneal_frames: int = 500_000
    capacity: int = 100_000
    eval_interval: int = 2000
    eval_trials: int = 16

    def make_one(self, game: str, **options: Any) -> gym.Env:
        try:
            import ale_py
        except ImportError as error:
            raise ValueError('install the extra: pip install "torchrl-amago[atari]"') from error
        gym.register_envs(ale_py)
        options |= dict(frameskip=1, repeat_action_probability=self.sticky, full_action_space=True)
        try:
            env = gym.make(f"ALE/{game}-v5", **options)
        except gym.error.Error as error:
            raise ValueError(f"--games: {error}") from error
        env = gym.wrappers.AtariPreprocessing(
            env, frame_skip=self.frame_skip, grayscale_newaxis=True
        )
        env = gym.wrappers.TransformReward(env, np.sign)
        return gym.wrappers.TimeLimit(env, self.max_episode_steps)

    @property
    def num_games(self) -> int:
        return len(self.games)

    def make_env(self, num_envs: int, test: bool = False, **options: Any) -> EnvBase:
        games = {name: lambda name=name: self.make_one(name, **options) for name in self.games}
        rows = gymnasium_rows(games, max(num_envs, len(games)))
        return make_trial_env(rows, episodes=self.episodes, show_progress=self.episodes > 1)


if __name__ == "__main__":
    small = dict(max_episode_steps=20, num_envs=4, eval_trials=4, context_length=20)
    with command_line(Args, debug=small) as args:
        train(args)
