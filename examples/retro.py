"""Train one agent on several games and levels of old consoles.

    pip install "torchrl-amago[retro]"
    python examples/retro.py                                  # Airstriker, whose ROM is free
    python examples/retro.py --games SuperMarioBros-Nes-v0 --levels Level1-1 Level2-1
    python examples/retro.py --debug                          # a test of the setup

Every row is an emulator in a process of its own, and plays one game; a new trial draws one of its
levels. Other games need ROMs that you own: `python -m stable_retro.import FOLDER`. For a GPU:
`--num-envs 32 --d-model 256 --total-updates 500000` (untried). The run's folder gets
`progress.csv`, curves, `trial.png`, `evaluation.npz`, weights and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

from common import command_line
from domain import DomainArgs, train
from torchrl.envs import EnvBase

from torchrl_amago import make_trial_env
from torchrl_amago.envs import gymnasium_rows
from torchrl_amago.envs.libs import Retro


@dataclass
class Args(DomainArgs):
    """Console games, with AMAGO."""

    games: tuple[str, ...] = ("Airstriker-Genesis-v0",)
    """Names of games, one for each row in turn. Their numbers of actions must be equal."""
    levels: tuple[str, ...] = ()
    """Levels of each game; default the first one's own."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/retro")
    loss: str = "amago2"
    max_episode_steps: int = 500
    round_steps: int = 64
    timestep_encoder: Literal["combined"] = "combined"
    num_envs: int = 4
    batch_size: int = 16
    d_model: int = 128
    total_updates: int = 10_000
    anneal_frames: int = 200_000
    capacity: int = 50_000
    eval_interval: int = 1000
    eval_trials: int = 8

    def make_env(self, num_envs: int, test: bool = False, **options: Any) -> EnvBase:
        options |= dict(max_episode_steps=self.max_episode_steps)
        games = {name: partial(Retro, name, self.levels, **options) for name in self.games}
        rows = gymnasium_rows(games, min(num_envs, max(4, len(games))), processes=True)
        return make_trial_env(
            rows, episodes=self.episodes, repeat="options", options=Retro.SAME_TASK
        )


if __name__ == "__main__":
    small = dict(max_episode_steps=20, num_envs=2, eval_trials=2, context_length=20)
    with command_line(Args, debug=small) as args:
        train(args)
