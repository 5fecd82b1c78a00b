"""Train on BabyAI and MiniGrid: missions in words, grids of categories.

    pip install "torchrl-amago[minigrid]"
    python examples/10_babyai.py                                   # GoToRedBallNoDists
    python examples/10_babyai.py --episodes 2 --env-ids BabyAI-GoToLocal-v0 BabyAI-PickupLoc-v0 \
        BabyAI-OpenDoor-v0 --run-dir runs/several
    python examples/10_babyai.py --debug                           # a test of the setup

A trial is one or more episodes at one level; with several ids, each trial is at one of them. The
run's folder gets `progress.csv`, curves, `trial.png`, `evaluation.npz`, weights and checkpoints.
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
from torchrl_amago.envs.libs import MiniGrid, MultiDomain


@dataclass
class Args(DomainArgs):
    """BabyAI, with AMAGO."""

    env_ids: tuple[str, ...] = ("BabyAI-GoToRedBallNoDists-v0",)
    """Ids of MiniGrid or BabyAI."""
    max_words: int = 16
    """Length of the longest mission; 48 for those of several parts."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/babyai")
    episodes: int = 1
    max_episode_steps: int = 64
    round_steps: int = 32
    timestep_encoder: Literal["combined"] = "combined"
    n_step: int = 3
    num_envs: int = 16
    total_updates: int = 2000
    anneal_frames: int = 50_000
    capacity: int = 200_000
    eval_trials: int = 128

    def make_env(self, num_envs: int, test: bool = False, **options: Any) -> EnvBase:
        options |= dict(max_words=self.max_words, max_steps=self.max_episode_steps)
        makers = {i: lambda i=i: MiniGrid(i, **options) for i in self.env_ids}
        is_one = len(makers) == 1
        rows = gymnasium_rows(
            makers[self.env_ids[0]] if is_one else lambda: MultiDomain(makers),
            num_envs,
            task_key=None if is_one else "task_id",
            task_names=() if is_one else self.env_ids,
        )
        return make_trial_env(rows, episodes=self.episodes, show_progress=self.episodes > 1)


if __name__ == "__main__":
    with command_line(Args, debug=dict(max_episode_steps=20, num_envs=4, eval_trials=8)) as args:
        words = {"kind": "tokens", "padding_token": 0, "embedding_size": 16, "output_size": 32}
        grid = {"trunk_options": {"channels": (16, 32, 32)}, "output_size": 64}
        options = args.policy_options(positions="rotary")["timestep_options"]
        train(args, timestep_options={**options, "entries": {"mission": words, "image": grid}})
