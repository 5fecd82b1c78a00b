"""Train a robot whose motors may be inverted, which nothing but their effects reveals.

    pip install "torchrl-amago[mujoco]"
    python examples/inverted_actuators.py                          # HalfCheetah, one sign
    python examples/inverted_actuators.py --inversion each --run-dir runs/each
    python examples/inverted_actuators.py --change-within 100 --run-dir runs/changes
    python examples/inverted_actuators.py --seq-model feedforward --run-dir runs/no_memory
    python examples/inverted_actuators.py --debug                  # a test of the setup

A trial is an episode, or several with the same signs; a policy without memory can't tell them. The
run's folder gets `progress.csv`, curves, `trial.png`, `evaluation.npz`, weights and checkpoints.
Pictures need `MUJOCO_GL=egl` without a screen.
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
from torchrl_amago.envs.libs import InvertedActuators


@dataclass
class Args(DomainArgs):
    """Inverted actuators, with AMAGO."""

    env_id: str = "HalfCheetah-v5"
    """Id of a Gymnasium environment of bounded continuous actions."""
    inversion: Literal["all", "each"] = "all"
    """Whether all actuators change sign together, or each has a sign of its own."""
    change_within: int | None = None
    """Steps of an episode in which the signs change once more; default they stay."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/inverted_actuators")
    episodes: int = 1
    max_episode_steps: int = 200
    context_length: int = 32
    round_steps: int = 100
    reward_scale: float = 0.1
    n_step: int = 5
    num_envs: int = 16
    hidden_size: int = 128
    total_updates: int = 8000
    anneal_frames: int = 100_000
    capacity: int = 500_000
    eval_interval: int = 1000
    eval_trials: int = 64

    def make_env(self, num_envs: int, test: bool = False, **options: Any) -> EnvBase:
        options |= dict(inversion=self.inversion, change_within=self.change_within)
        options |= dict(max_episode_steps=self.max_episode_steps)
        return make_trial_env(
            gymnasium_rows(lambda: InvertedActuators(self.env_id, **options), num_envs),
            episodes=self.episodes,
            repeat="options",
            options=InvertedActuators.SAME_TASK,
            # A time limit that isn't observed says nothing about the last state's value.
            trial_end="episode",
            show_progress=self.episodes > 1,
        )


if __name__ == "__main__":
    with command_line(Args, debug=dict(max_episode_steps=20, num_envs=4, eval_trials=8)) as args:
        train(args)
