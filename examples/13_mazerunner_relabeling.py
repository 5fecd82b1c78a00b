r"""Train an agent to reach goals in unknown mazes, with hindsight for the goals that it missed.

    python examples/13_mazerunner_relabeling.py                    # two minutes on two CPU cores
    python examples/13_mazerunner_relabeling.py --relabel none --run-dir runs/no_hindsight
    python examples/13_mazerunner_relabeling.py --relabel all --run-dir runs/all_successes
    python examples/13_mazerunner_relabeling.py --randomize-actions --max-episode-steps 60 \
        --total-updates 4000 --run-dir runs/rewired
    python examples/13_mazerunner_relabeling.py --debug            # a test of the setup
    python examples/13_mazerunner_relabeling.py --resume           # go on after Ctrl-C

Most trials of a beginner come to none of their goals, so there is no reward to learn from. But
wherever the agent went could have been a goal: hindsight exchanges goals that were missed for
places that were reached, as trials are drawn from the replay buffer, and computes rewards and
endings anew. The agent sees the goals, but not `achieved`, the entry that says what hindsight may
choose from.

Results land in the run's folder: `progress.csv`, `learning_curve.png`, `trial.png`,
`evaluation.npz`, `evaluation_sampled.npz`, the policy's weights and checkpoints.
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

from torchrl_amago import (
    GoalSequenceRelabel,
    HeldOutEvaluator,
    MazeRunner,
    make_policy,
    make_trainer,
    make_trial_env,
)
from torchrl_amago.evaluation import HELD_OUT_SEED, EvaluationResults


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

    # Other defaults of common fields.
    run_dir: Path = Path("runs/maze_runner")
    total_updates: int = 1500


def make_env(args: Args, num_envs: int, seed: int | None = None) -> EnvBase:
    maze = MazeRunner(
        args.maze_size,
        num_goals=args.goals,
        max_episode_steps=args.max_episode_steps,
        randomize_actions=args.randomize_actions,
        batch_size=(num_envs,),
        device=args.task_device,
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
        **args.trainer_options(held_out),
    )
    resume_if_asked(args, trainer)
    results = final_evaluation(
        args, trainer.train(), trainer, held_out, "trial_return", "success", "trial_length"
    )
    panels = {
        f"goals reached per trial, of {args.goals}": both("trial_return"),
        "success: all goals reached": both("success_last"),
    }
    size = f"{args.maze_size}x{args.maze_size}"
    draw_progress(args, f"{size} mazes, relabelled: {args.relabel}", panels)
    draw_steps(args, held_out.pictures()[0])
    return results


if __name__ == "__main__":
    with command_line(Args) as args:
        train(args)
