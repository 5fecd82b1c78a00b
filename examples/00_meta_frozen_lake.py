"""Train an agent that adapts to an unknown frozen lake within five episodes at it.

    python examples/00_meta_frozen_lake.py                  # a few minutes on two CPU cores
    python examples/00_meta_frozen_lake.py --debug          # under a minute, to see that all runs
    python examples/00_meta_frozen_lake.py --resume         # go on after Ctrl-C
    python examples/00_meta_frozen_lake.py --run-dir runs/gru --seq-model gru

The agent isn't told where the holes are. A trial is five episodes at the same lake; what happened in
the earlier ones is all it has to go by. Results land in the run's folder: `progress.csv`,
`learning_curve.png`, `adaptation_curve.png`, `trial.png`, `evaluation.npz`, `evaluation_sampled.npz`,
the policy's weights and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from common import TrainingArgs, run_command_line, train_and_evaluate
from torchrl.envs import EnvBase

from torchrl_amago import (
    HeldOutEvaluator,
    MetaFrozenLake,
    make_policy,
    make_trainer,
    make_trial_env,
)
from torchrl_amago.envs import bayes_optimal_success
from torchrl_amago.evaluation import HELD_OUT_SEED, EvaluationResults, TrialResults
from torchrl_amago.plots import plot_adaptation_curve, plot_learning_curve, plot_trial_strip


@dataclass
class Args(TrainingArgs):
    """Meta-FrozenLake with AMAGO."""

    size: int = 3
    """Cells on each side of the lake."""
    episodes: int = 5
    """Episodes in a trial."""
    hard_mode: bool = False
    """Noisy position, holes opening behind the agent, shuffled actions."""
    recover_mode: bool = False
    """Holes cost 0.1 instead of ending the episode."""
    slip_chance: float = 0.0
    """Chance that a move does nothing."""
    show_progress: bool = True
    """Show the agent how much of the trial is used up."""
    hold_out_layouts: bool = False
    """Keep a quarter of all layouts out of training, and evaluate on those alone."""

    # Other defaults for fields that every task has.
    run_dir: Path = Path("runs/meta_frozen_lake")
    num_layers: int = 2
    hidden_size: int = 256
    total_updates: int = 2400
    anneal_frames: int = 200_000
    eval_trials: int = 1024


def make_env(args: Args, num_envs: int, layouts: str, seed: int | None = None) -> EnvBase:
    lake = MetaFrozenLake(
        args.size,
        hard_mode=args.hard_mode,
        recover_mode=args.recover_mode,
        slip_chance=args.slip_chance,
        layouts=layouts,
        batch_size=(num_envs,),
        seed=seed,
    )
    return make_trial_env(lake, episodes=args.episodes, show_progress=args.show_progress)


def train(
    args: Args,
    policy_options: dict[str, Any] | None = None,
    loss_options: dict[str, Any] | None = None,
) -> EvaluationResults:
    """Train and evaluate; options of the policy and the loss win over those of `args`."""
    torch.manual_seed(args.seed)
    env = make_env(args, args.num_envs, "train" if args.hold_out_layouts else "all")
    horizon = args.episodes * env.base_env.max_episode_steps
    policy = make_policy(
        env,
        context_length=horizon,
        exploration=dict(anneal_frames=args.anneal_frames),
        **{**args.policy_options(), **(policy_options or {})},
    )
    layouts = "heldout" if args.hold_out_layouts else "all"
    eval_env = make_env(args, min(256, args.eval_trials), layouts, seed=HELD_OUT_SEED)
    held_out = HeldOutEvaluator(policy, eval_env)
    trainer = make_trainer(
        env,
        policy,
        trial_length=horizon,
        evaluator=lambda: held_out.evaluate(args.eval_trials // 4),
        loss_options=loss_options,
        **args.trainer_options(),
    )
    results = train_and_evaluate(args, trainer, held_out)
    print(results.describe())
    draw_pictures(args, results.greedy, held_out.pictures())
    return results


def draw_pictures(args: Args, results: TrialResults, frames: list) -> None:
    plain = not (args.hard_mode or args.recover_mode or args.slip_chance or args.hold_out_layouts)
    optimum = bayes_optimal_success(args.size, args.episodes) if plain and args.size < 4 else None
    plot_learning_curve(
        args.run_dir / "progress.csv",
        args.run_dir / "learning_curve.png",
        reference={"return per trial": optimum.expected_return} if optimum else None,
    )
    plot_adaptation_curve(
        results,
        args.run_dir / "adaptation_curve.png",
        reference=optimum.success_by_episode if optimum else None,
        title=f"{args.size}x{args.size} lakes, {len(results)} held-out trials, greedy",
    )
    plot_trial_strip(frames, args.run_dir / "trial.png", title="One trial on a held-out lake")
    print(f"Pictures: {args.run_dir}/{{learning_curve,adaptation_curve,trial}}.png")


if __name__ == "__main__":
    run_command_line(Args, train)
