"""Train on Crafter with instructions: sequences of its achievements, and hindsight.

    pip install "torchrl-amago[crafter]"
    python examples/crafter_instructions.py                         # codes of what is seen
    python examples/crafter_instructions.py --view pixels --run-dir runs/crafter_pixels
    python examples/crafter_instructions.py --relabel none --run-dir runs/no_hindsight
    python examples/crafter_instructions.py --debug                 # a test of the setup

A trial is one episode: a new world, and a random sequence of up to `max_goals` achievements. Of
failed instructions, hindsight makes others that were followed. For a GPU: `--view pixels
--max-episode-steps 2000 --num-envs 64 --d-model 256 --total-updates 500000` (untried). The run's
folder gets `progress.csv`, curves, `trial.png`, `evaluation.npz`, weights and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from common import command_line
from domain import DomainArgs, train
from torchrl.envs import EnvBase

from torchrl_amago import GoalSequenceRelabel, make_trial_env
from torchrl_amago.envs import gymnasium_rows
from torchrl_amago.envs.libs import CrafterInstructions


@dataclass
class Args(DomainArgs):
    """Crafter with instructions, with AMAGO."""

    view: Literal["pixels", "codes"] = "codes"
    """What the agent sees: a picture, or ids of the cells around it."""
    max_goals: int = 3
    """Largest number of achievements in a sequence."""
    relabel: Literal["some", "all", "none"] = "some"
    """How many of the missed goals hindsight exchanges: a random number of them, all, or none."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/crafter")
    episodes: int = 1
    max_episode_steps: int = 200
    context_length: int = 64
    round_steps: int = 50
    timestep_encoder: Literal["combined"] = "combined"
    num_envs: int = 8
    d_model: int = 128
    total_updates: int = 10_000
    anneal_frames: int = 200_000
    capacity: int = 200_000
    eval_interval: int = 1000
    eval_trials: int = 32

    def make_env(self, num_envs: int, test: bool = False, **options: Any) -> EnvBase:
        options |= dict(max_goals=self.max_goals, max_episode_steps=self.max_episode_steps)
        rows = gymnasium_rows(lambda: CrafterInstructions(self.view, **options), num_envs)
        return make_trial_env(rows, episodes=self.episodes, show_progress=self.episodes > 1)


if __name__ == "__main__":
    small = dict(max_episode_steps=20, num_envs=4, eval_trials=4)
    with command_line(Args, debug=small) as args:
        entries = {"goals": {"kind": "goals", "padding": 0}}
        if args.view == "pixels":
            entries["pixels"] = {"trunk": "impala"}
        options = args.policy_options(positions="rotary")["timestep_options"]
        train(
            args,
            relabel=GoalSequenceRelabel(args.relabel, empty_goal=0),
            obs_keys=["goals", *(["pixels"] if args.view == "pixels" else ["codes", "body"])],
            timestep_options={**options, "entries": entries},
        )
