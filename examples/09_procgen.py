"""Train on Procgen's generated levels: two attempts at each, the second with what the first saw.

    pip install "torchrl-amago[procgen]"       # and the system's Qt: apt install libqt5gui5
    python examples/09_procgen.py                                   # five games, easy
    python examples/09_procgen.py --games maze --mode memory --run-dir runs/maze
    python examples/09_procgen.py --debug                           # a test of the setup

Every row plays one game; a new trial draws one of its `num_levels` levels. Evaluation plays levels
that training never shows. For a GPU: `--num-envs 64 --d-model 256 --num-layers 3 --total-updates
500000` (untried). The run's folder gets `progress.csv`, curves, `trial.png`, `evaluation.npz`,
weights and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common import command_line
from domain import DomainArgs, train
from torchrl.envs import EnvBase

from torchrl_amago import make_trial_env
from torchrl_amago.envs import gymnasium_rows
from torchrl_amago.envs.libs import Procgen


@dataclass
class Args(DomainArgs):
    """Procgen, with AMAGO."""

    games: tuple[str, ...] = ("climber", "coinrun", "jumper", "ninja", "leaper")
    """Games, one for each row in turn."""
    mode: Literal["easy", "hard", "memory", "exploration", "extreme"] = "easy"
    """How hard levels are; not every game has each."""
    num_levels: int = 10_000
    """Levels of training; those of evaluation come after them."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/procgen")
    loss: str = "amago2"
    max_episode_steps: int = 500
    context_length: int = 128
    round_steps: int = 64
    timestep_encoder: Literal["combined"] = "combined"
    num_envs: int = 20
    batch_size: int = 16
    d_model: int = 128
    total_updates: int = 20_000
    anneal_frames: int = 500_000
    capacity: int = 100_000
    eval_interval: int = 2000
    eval_trials: int = 20

    @property
    def num_games(self) -> int:
        return len(self.games)

    def make_env(self, num_envs: int, test: bool = False, **options: Any) -> EnvBase:
        options |= dict(max_episode_steps=self.max_episode_steps, num_levels=self.num_levels)
        options |= dict(start_level=self.num_levels if test else 0)
        games = {name: lambda name=name: Procgen(name, self.mode, **options) for name in self.games}
        rows = gymnasium_rows(games, max(num_envs, len(games)))
        return make_trial_env(
            rows, episodes=self.episodes, repeat="options", options=Procgen.SAME_TASK
        )


if __name__ == "__main__":
    small = dict(max_episode_steps=20, num_envs=5, eval_trials=5, context_length=20)
    with command_line(Args, debug=small) as args:
        # Procgen's pictures have their channels first.
        image = {"observation": dict(channels_first=True, trunk="impala")}
        options = args.policy_options(positions="rotary")["timestep_options"]
        train(args, timestep_options={**options, "entries": image})
