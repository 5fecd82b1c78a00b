"""Train an agent that adapts to an unknown frozen lake within five episodes.

    python examples/00_meta_frozen_lake.py                  # a few minutes on two CPU cores
    python examples/00_meta_frozen_lake.py --debug          # under a minute, a test of the setup
    python examples/00_meta_frozen_lake.py --resume         # go on after Ctrl-C
    python examples/00_meta_frozen_lake.py --run-dir runs/gru --seq-model gru

The agent doesn't observe where the holes are. A trial is five episodes at the same lake, and the
earlier episodes are all the information there is. The run's folder gets `progress.csv`,
`learning_curve.png`, `adaptation_curve.png`, `trial.png`, `evaluation.npz`,
`evaluation_sampled.npz`, weights and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from common import TrainingArgs, command_line, draw_progress, final_evaluation, resume_if_asked
from torchrl.envs import EnvBase

from torchrl_amago import (
    HeldOutEvaluator,
    MetaFrozenLake,
    make_policy,
    make_trainer,
    make_trial_env,
)
from torchrl_amago.envs import bayes_optimal_success
from torchrl_amago.evaluation import HELD_OUT_SEED, EvaluationResults
from torchrl_amago.plots import plot_adaptation_curve, plot_trial_strip


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
    """Show the agent the fraction of the trial that is used up."""
    hold_out_layouts: bool = False
    """Keep a quarter of all layouts out of training, and evaluate on those alone."""

    # Other defaults of common fields.
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
        device=args.task_device,
        seed=seed,
    )
    return make_trial_env(lake, episodes=args.episodes, show_progress=args.show_progress)


def train(args: Args) -> EvaluationResults:
    torch.manual_seed(args.seed)
    env = make_env(args, args.num_envs, "train" if args.hold_out_layouts else "all")
    horizon = args.episodes * env.base_env.max_episode_steps
    policy = make_policy(
        env,
        context_length=horizon,
        exploration=dict(anneal_frames=args.anneal_frames),
        **args.policy_options(),
    )
    layouts = "heldout" if args.hold_out_layouts else "all"
    held_out = HeldOutEvaluator(
        policy, make_env(args, min(256, args.eval_trials), layouts, seed=HELD_OUT_SEED)
    )
    trainer = make_trainer(env, policy, trial_length=horizon, **args.trainer_options(held_out))
    resume_if_asked(args, trainer)
    results = final_evaluation(args, trainer.train(), trainer, held_out)
    draw_pictures(args, results, held_out)
    return results


def draw_pictures(args: Args, results: EvaluationResults, held_out: HeldOutEvaluator) -> None:
    plain = not (args.hard_mode or args.recover_mode or args.slip_chance or args.hold_out_layouts)
    optimum = bayes_optimal_success(args.size, args.episodes) if plain and args.size < 4 else None
    draw_progress(
        args,
        f"{args.size}x{args.size} lakes, {args.seq_model}",
        reference={"return per trial": optimum.expected_return} if optimum else None,
    )
    plot_adaptation_curve(
        results.greedy,
        args.run_dir / "adaptation_curve.png",
        reference=optimum.success_by_episode if optimum else None,
        title=f"{args.size}x{args.size} lakes, {len(results.greedy)} held-out trials, greedy",
    )
    plot_trial_strip(
        held_out.pictures(), args.run_dir / "trial.png", title="One trial on a held-out lake"
    )


if __name__ == "__main__":
    with command_line(Args) as args:
        train(args)
