"""Train an agent that remembers one bit for as long as a corridor is: the Passive T-Maze.

    python examples/04_tmaze.py             # a corridor of 50 steps, on two CPU cores
    python examples/04_tmaze.py --debug     # under a minute, a test of the setup
    python examples/04_tmaze.py --resume    # go on after Ctrl-C
    python examples/04_tmaze.py --run-dir runs/gru_100 --corridor 100 --seq-model gru
    python examples/04_tmaze.py --run-dir runs/no_memory --seq-model feedforward    # stays at 1/2
    python examples/04_tmaze.py --run-dir runs/oracle --seq-model feedforward --oracle

The right arm at the corridor's end is shown at the first step only. The run's folder gets
`progress.csv`, `learning_curve.png`, `trial.png`, `evaluation.npz`, `evaluation_sampled.npz`,
weights and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from common import (
    TrainingArgs,
    both,
    command_line,
    draw_progress,
    draw_steps,
    final_evaluation,
    resume_if_asked,
)
from torchrl.envs import EnvBase

from torchrl_amago import HeldOutEvaluator, TMaze, make_policy, make_trainer, make_trial_env
from torchrl_amago.evaluation import HELD_OUT_SEED, EvaluationResults


@dataclass
class Args(TrainingArgs):
    """Passive T-Maze with AMAGO."""

    corridor: int = 50
    """Steps from the start to the junction."""
    max_episode_steps: int | None = None
    """Steps of a trial; default one more than the corridor has, which leaves none to waste."""
    ambiguous_position: bool = True
    """Make all cells of the corridor look alike."""
    penalty: float | None = None
    """Cost of a step that `penalize` names; default 1 / (max_episode_steps - 1)."""
    penalize: Literal["behind", "dawdling"] = "dawdling"
    """Steps that cost: all while the agent is behind the clock (the paper's rule), or those that
    don't go ahead."""
    show_time: bool = False
    """Observe the time step."""
    oracle: bool = False
    """Show the goal at every step, so that no memory is needed."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/tmaze")
    anneal_frames: int = 60_000


def make_env(args: Args, num_envs: int, seed: int | None = None) -> EnvBase:
    maze = TMaze(
        args.corridor,
        max_episode_steps=args.max_episode_steps,
        ambiguous_position=args.ambiguous_position,
        penalty=args.penalty,
        penalize=args.penalize,
        show_time=args.show_time,
        oracle=args.oracle,
        batch_size=(num_envs,),
        device=args.task_device,
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
    held_out = HeldOutEvaluator(
        policy, make_env(args, min(128, args.eval_trials), seed=HELD_OUT_SEED)
    )
    trainer = make_trainer(env, policy, trial_length=trial_length, **args.trainer_options(held_out))
    resume_if_asked(args, trainer)
    results = final_evaluation(args, trainer.train(), trainer, held_out, "success", "trial_return")
    panels = {"success rate": both("success_last"), "return per trial": both("trial_return")}
    draw_progress(args, f"corridor of {args.corridor}, {args.seq_model}", panels)
    draw_steps(args, held_out.pictures()[0])
    return results


if __name__ == "__main__":
    with command_line(Args, debug=dict(corridor=10)) as args:
        train(args)
