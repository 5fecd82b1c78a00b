"""Train a simulated arm on Meta-World: problem and goal are hidden, rewards reveal them.

    pip install "torchrl-amago[metaworld]"
    python examples/07_meta_world.py                             # ML1, reach-v3
    python examples/07_meta_world.py --problem push-v3 --run-dir runs/push
    python examples/07_meta_world.py --benchmark ML10 --run-dir runs/ml10 --num-envs 40
    python examples/07_meta_world.py --debug                     # a test of the setup

A trial is several episodes at one problem with one goal; evaluation plays the benchmark's test
goals (ML1) or test problems (ML10, ML45). The run's folder gets `progress.csv`, curves,
`trial.png`, `evaluation.npz`, weights and checkpoints. Pictures need `MUJOCO_GL=egl` without a
screen.
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
from torchrl_amago.envs.libs import MetaWorld


@dataclass
class Args(DomainArgs):
    """Meta-World, with AMAGO."""

    benchmark: Literal["ML1", "ML10", "ML25", "ML45"] = "ML1"
    """Set of problems."""
    problem: str = "reach-v3"
    """Problem of ML1."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/meta_world")
    episodes: int = 3
    max_episode_steps: int = 100
    round_steps: int = 100
    reward_scale: float = 0.1
    n_step: int = 3
    num_envs: int = 10
    hidden_size: int = 128
    total_updates: int = 6000
    anneal_frames: int = 100_000
    capacity: int = 500_000
    eval_interval: int = 1000
    eval_trials: int = 40

    def make_env(self, num_envs: int, test: bool = False, **options: Any) -> EnvBase:
        problem = self.problem if self.benchmark == "ML1" else None
        steps, split = self.max_episode_steps, "test" if test else "train"
        options |= dict(split=split, max_episode_steps=steps)
        rows = gymnasium_rows(
            lambda: MetaWorld(self.benchmark, problem, **options),
            num_envs,
            success_key="success",
            task_key="task_id",
            task_names=MetaWorld.names_of(self.benchmark, problem, split),
        )
        return make_trial_env(
            rows, episodes=self.episodes, repeat="options", options=MetaWorld.SAME_TASK
        )


if __name__ == "__main__":
    with command_line(Args, debug=dict(max_episode_steps=20, num_envs=4, eval_trials=8)) as args:
        train(args)
