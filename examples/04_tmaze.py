"""Train an agent that remembers one bit for as long as a corridor is: the Passive T-Maze.

    python examples/04_tmaze.py             # a corridor of 50 steps, on two CPU cores
    python examples/04_tmaze.py --debug     # under a minute, to see that all runs
    python examples/04_tmaze.py --resume    # go on after Ctrl-C
    python examples/04_tmaze.py --run-dir runs/gru_100 --corridor 100 --seq-model gru
    python examples/04_tmaze.py --run-dir runs/no_memory --seq-model feedforward    # stays at 1/2
    python examples/04_tmaze.py --run-dir runs/oracle --seq-model feedforward --oracle

The right arm at the corridor's end is shown at the first step only. Results land in the run's folder:
`progress.csv`, `learning_curve.png`, `trial.png`, `evaluation.npz`, `evaluation_sampled.npz`,
the policy's weights and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from common import TrainingArgs, run_command_line, train_and_evaluate
from torchrl.envs import EnvBase

from torchrl_amago import HeldOutEvaluator, TMaze, make_policy, make_trainer, make_trial_env
from torchrl_amago.evaluation import HELD_OUT_SEED, EvaluationResults
from torchrl_amago.plots import plot_learning_curve, plot_trial_strip


@dataclass
class Args(TrainingArgs):
    """Passive T-Maze with AMAGO."""

    corridor: int = 50
    """Steps from the start to the junction."""
    episode: int | None = None
    """Steps of a trial; one more than the corridor has by default, so that none may be wasted."""
    ambiguous_position: bool = True
    """Hide how far the agent has come: the corridor's cells look alike."""
    penalty: float | None = None
    """Cost of a step that `penalize` names; 1 / (episode - 1) by default."""
    penalize: Literal["behind", "dawdling"] = "dawdling"
    """Which steps cost: those at which the agent is behind the clock (the paper's rule), or those that
    don't go ahead."""
    show_time: bool = False
    """Observe the time step."""
    oracle: bool = False
    """Show the goal at every step, so that no memory is needed."""

    # Other defaults for fields that every task has.
    run_dir: Path = Path("runs/tmaze")
    anneal_frames: int = 60_000


def make_env(args: Args, num_envs: int, seed: int | None = None) -> EnvBase:
    maze = TMaze(
        args.corridor,
        max_episode_steps=args.episode,
        ambiguous_position=args.ambiguous_position,
        penalty=args.penalty,
        penalize=args.penalize,
        show_time=args.show_time,
        oracle=args.oracle,
        batch_size=(num_envs,),
        seed=seed,
    )
    return make_trial_env(maze, episodes=1, show_progress=False)


def train(args: Args) -> EvaluationResults:
    torch.manual_seed(args.seed)
    env = make_env(args, args.num_envs)
    trial_length = env.base_env.max_episode_steps
    policy = make_policy(
        env,
        context_length=trial_length,
        exploration=dict(
            anneal_frames=args.anneal_frames,
            # A single wrong step spoils the walk: noise is for the junction, the last few steps.
            start_of_trial=(0.2, 0.0),
            end_of_trial=(1.0, 0.2),
            power=trial_length / 4,
        ),
        **args.policy_options(longest_memory=trial_length),
    )
    eval_env = make_env(args, min(128, args.eval_trials), seed=HELD_OUT_SEED)
    held_out = HeldOutEvaluator(policy, eval_env)
    trainer = make_trainer(
        env,
        policy,
        trial_length=trial_length,
        evaluator=lambda: held_out.evaluate(args.eval_trials // 4),
        **args.trainer_options(),
    )
    results = train_and_evaluate(args, trainer, held_out)
    print(results.describe("success", "trial_return"))
    draw_pictures(args, held_out.pictures())
    return results


def draw_pictures(args: Args, frames: list) -> None:
    plot_learning_curve(
        args.run_dir / "progress.csv",
        args.run_dir / "learning_curve.png",
        panels={
            "success rate": {"train/success_last": "training", "eval/success_last": "evaluation"},
            "return per trial": {
                "train/trial_return": "training",
                "eval/trial_return": "evaluation",
            },
        },
        title=f"corridor of {args.corridor}, {args.seq_model}",
    )
    (trial,) = frames
    steps = [
        *np.unique(np.linspace(0, len(trial) - 3, 6, dtype=int)),
        len(trial) - 2,
        len(trial) - 1,
    ]
    plot_trial_strip(
        [[trial[step] for step in steps]],
        args.run_dir / "trial.png",
        headings=[f"step {step}" for step in steps],
        titles=["trial"],
        picture_inches=1.3,
    )
    print(f"Pictures: {args.run_dir}/{{learning_curve,trial}}.png")


if __name__ == "__main__":
    run_command_line(Args, train, debug=dict(corridor=10))
