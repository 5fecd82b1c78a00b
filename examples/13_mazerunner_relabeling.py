"""Train an agent to run through unknown mazes to one goal after the other, and to learn from goals it missed.

    python examples/13_mazerunner_relabeling.py                    # two minutes on two CPU cores
    python examples/13_mazerunner_relabeling.py --relabel none --run-dir runs/no_hindsight    # for comparison
    python examples/13_mazerunner_relabeling.py --relabel all --run-dir runs/all_successes
    python examples/13_mazerunner_relabeling.py --randomize-actions --time-limit 60 --total-updates 4000 --run-dir runs/rewired
    python examples/13_mazerunner_relabeling.py --debug            # under a minute, to see that all runs
    python examples/13_mazerunner_relabeling.py --resume           # go on after Ctrl-C

Most trials of a beginner come to none of their goals, so there is no reward to learn from. But wherever
the agent went could have been a goal: hindsight exchanges goals that were missed for places that were
reached, as trials are drawn from the replay buffer, and computes rewards and endings anew. The agent
sees the goals, but not `achieved`, the entry that says what hindsight may choose from.

Results land in the run's folder: `progress.csv`, `learning_curve.png`, `trial.png`, `evaluation.npz`,
`evaluation_sampled.npz`, the policy's weights and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from common import TrainingArgs, run_command_line, train_and_evaluate
from torchrl.envs import EnvBase

from torchrl_amago import (
    GoalSequenceRelabel,
    HeldOutEvaluator,
    MazeRunner,
    make_policy,
    make_trainer,
    make_trial_env,
)
from torchrl_amago.evaluation import HELD_OUT_SEED, EvaluationResults
from torchrl_amago.plots import plot_learning_curve, plot_trial_strip


@dataclass
class Args(TrainingArgs):
    """MazeRunner with AMAGO and hindsight."""

    maze_size: int = 7
    """Cells on each side of the maze, walls included; an odd number."""
    goals: int = 2
    """Goals to reach, one after the other."""
    max_episode_steps: int = 20
    """Steps of a trial, if the last goal isn't reached before."""
    randomize_actions: bool = False
    """Permute the actions anew in every maze."""
    relabel: Literal["some", "all", "none"] = "some"
    """How many of the missed goals hindsight exchanges: a random number of them, all, or none."""

    # Other defaults for fields that every task has.
    run_dir: Path = Path("runs/maze_runner")
    total_updates: int = 1500


def make_env(args: Args, num_envs: int, seed: int | None = None) -> EnvBase:
    maze = MazeRunner(
        args.maze_size,
        num_goals=args.goals,
        max_episode_steps=args.max_episode_steps,
        randomize_actions=args.randomize_actions,
        batch_size=(num_envs,),
        seed=seed,
    )
    return make_trial_env(maze, episodes=1, show_progress=False)


def train(args: Args) -> EvaluationResults:
    torch.manual_seed(args.seed)
    env = make_env(args, args.num_envs)
    policy = make_policy(
        env,
        context_length=args.max_episode_steps,
        obs_keys=["observation", "goals"],
        exploration=dict(anneal_frames=args.anneal_frames),
        **args.policy_options(),
    )
    all_goals = args.goals - 0.5  # a trial succeeds if its return is larger
    eval_env = make_env(args, min(128, args.eval_trials), seed=HELD_OUT_SEED)
    held_out = HeldOutEvaluator(policy, eval_env, success_threshold=all_goals)
    trainer = make_trainer(
        env,
        policy,
        trial_length=args.max_episode_steps,
        buffer_options=dict(relabel=GoalSequenceRelabel(args.relabel)),
        evaluator=lambda: held_out.evaluate(args.eval_trials // 4),
        success_threshold=all_goals,
        **args.trainer_options(),
    )
    results = train_and_evaluate(args, trainer, held_out)
    print(results.describe("trial_return", "success", "trial_length"))
    draw_pictures(args, held_out.pictures())
    return results


def draw_pictures(args: Args, frames: list) -> None:
    plot_learning_curve(
        args.run_dir / "progress.csv",
        args.run_dir / "learning_curve.png",
        panels={
            f"goals reached per trial, of {args.goals}": {
                "train/trial_return": "training",
                "eval/trial_return": "evaluation",
            },
            "success: all goals reached": {
                "train/success_last": "training",
                "eval/success_last": "evaluation",
            },
        },
        title=f"{args.maze_size}x{args.maze_size} mazes, relabelled: {args.relabel}",
    )
    (trial,) = frames
    steps = np.unique(np.linspace(0, len(trial) - 1, 8, dtype=int))
    plot_trial_strip(
        [[trial[step] for step in steps]],
        args.run_dir / "trial.png",
        headings=[f"step {step}" for step in steps],
        titles=["trial"],
        picture_inches=1.6,
    )
    print(f"Pictures: {args.run_dir}/{{learning_curve,trial}}.png")


if __name__ == "__main__":
    run_command_line(Args, train)
