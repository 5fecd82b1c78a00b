"""Train an agent that adapts to an unknown frozen lake within five attempts at it.

    python examples/00_meta_frozen_lake.py                  # a few minutes on two CPU cores
    python examples/00_meta_frozen_lake.py --debug          # under a minute, to see that all runs
    python examples/00_meta_frozen_lake.py --resume         # go on after Ctrl-C
    python examples/00_meta_frozen_lake.py --run-dir runs/gru --seq-model gru

The agent isn't told where the holes are. A trial is five attempts at the same lake; what happened in
the earlier ones is all it has to go by. Results land in the run's folder: `progress.csv`,
`learning_curve.png`, `adaptation_curve.png`, `trial.png`, `evaluation.npz` and checkpoints.
"""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from torchrl.envs import EnvBase

from torchrl_amago import (
    SEQ_MODELS,
    MetaFrozenLake,
    TrialResults,
    bayes_optimal_success,
    evaluate,
    make_policy,
    make_trainer,
    make_trial_env,
    plot_adaptation_curve,
    plot_learning_curve,
    plot_trial_strip,
    rollout_pictures,
)

HELD_OUT_SEED = 10_000_019  # of evaluation; training draws its own


@dataclass
class Args:
    """Meta-FrozenLake with AMAGO."""

    run_dir: Path = Path("runs/meta_frozen_lake")
    """Folder for everything this run writes."""
    resume: bool = False
    """Go on from the newest checkpoint in run_dir."""
    debug: bool = False
    """A short run with a small network, to see that everything works (well under a minute)."""
    seed: int = 1
    """Seed of everything: networks, lakes, exploration, batches."""

    size: int = 3
    """Cells on each side of the lake."""
    episodes: int = 5
    """Attempts in a trial."""
    hard_mode: bool = False
    """Noisy position, holes opening behind the agent, shuffled actions."""
    recover_mode: bool = False
    """Holes cost 0.1 instead of ending the attempt."""
    slip_chance: float = 0.0
    """Chance that a move does nothing."""
    show_progress: bool = True
    """Show the agent how much of the trial is used up."""
    hold_out_layouts: bool = False
    """Keep a quarter of all layouts out of training, and evaluate on those alone."""

    seq_model: Literal[tuple(SEQ_MODELS)] = "transformer"
    """What remembers: the trajectory encoder."""
    d_model: int = 64
    """Width of the sequence model."""
    num_layers: int = 2
    """Layers of the sequence model."""
    hidden_size: int = 256
    """Width of the timestep encoder's, actor's and critics' hidden layers."""

    num_envs: int = 64
    """Lakes played at the same time."""
    total_updates: int = 2400
    """Optimiser steps in all."""
    updates_per_round: int = 20
    """Optimiser steps after each round, in which every environment makes as many steps as a trial has."""
    batch_size: int = 32
    """Trials in a batch."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW; it falls to a tenth by the end."""
    warmup_updates: int = 100
    """Updates over which the learning rate rises."""
    tau: float = 0.01
    """Share of the online weights that the targets take over at each update."""
    anneal_frames: int = 200_000
    """Environment steps over which exploration fades."""
    buffer_frames: int = 120_000
    """Capacity of the replay buffer in steps; the oldest trials leave first."""

    eval_interval: int = 250
    """Updates between evaluations on held-out lakes, greedy, without exploration."""
    eval_trials: int = 1024
    """Trials in the last evaluation; a quarter of it in those before."""
    checkpoint_interval: int = 500
    """Updates between checkpoints."""
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers besides progress.csv."""
    threads: int = 2
    """CPU threads."""


DEBUG = dict(debug=True, run_dir=Path("runs/meta_frozen_lake_debug"), total_updates=40, updates_per_round=10, num_envs=16, batch_size=8, d_model=32, hidden_size=32,
             num_layers=1, eval_interval=20, eval_trials=64, checkpoint_interval=20)  # fmt: skip


TASK = (
    "size",
    "episodes",
    "hard_mode",
    "recover_mode",
    "slip_chance",
    "show_progress",
    "hold_out_layouts",
)


def seq_model_options(args: Args) -> dict:
    options = dict(d_model=args.d_model, num_layers=args.num_layers)
    if args.seq_model in ("transformer", "linear_attention"):
        options["num_heads"] = 4
    return {} if args.seq_model == "identity" else options


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


def train(args: Args) -> str:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    env = make_env(args, args.num_envs, "train" if args.hold_out_layouts else "all")
    horizon = args.episodes * env.base_env.max_episode_steps
    policy = make_policy(
        env,
        context_length=horizon,
        seq_model=args.seq_model,
        seq_model_options=seq_model_options(args),
        timestep_options=dict(hidden_size=args.hidden_size, output_size=args.d_model),
        actor_options=dict(hidden_size=args.hidden_size),
        exploration=dict(anneal_frames=args.anneal_frames),
    )
    eval_rows = min(256, args.eval_trials)
    layouts = "heldout" if args.hold_out_layouts else "all"
    eval_env = make_env(args, eval_rows, layouts, seed=HELD_OUT_SEED)

    def evaluate_held_out(num_trials: int) -> TrialResults:
        rounds = math.ceil(num_trials / eval_rows)
        return evaluate(policy, eval_env, trials_per_row=rounds, seed=HELD_OUT_SEED)

    trainer = make_trainer(
        env,
        policy,
        trial_length=horizon,
        total_updates=args.total_updates,
        updates_per_round=args.updates_per_round,
        batch_size=args.batch_size,
        buffer_frames=args.buffer_frames,
        learning_rate=args.learning_rate,
        tau=args.tau,
        critic_options=dict(hidden_size=args.hidden_size),
        warmup_updates=args.warmup_updates,
        final_lr_share=0.1,
        evaluator=lambda: evaluate_held_out(max(1, args.eval_trials // 4)),
        eval_interval=args.eval_interval,
        checkpoint_interval=args.checkpoint_interval,
        run_dir=args.run_dir,
        loggers=args.logger,
        seed=args.seed,
        task={name: getattr(args, name) for name in TASK},
        resume_command=shlex.join([sys.executable, *sys.argv] + ["--resume"] * (not args.resume)),
    )
    if args.resume:
        trainer.resume()
    outcome = trainer.train()
    if outcome == "finished":
        results = evaluate_held_out(args.eval_trials)
        summary = ", ".join(f"{name} {value:.3f}" for name, value in results.summary().items())
        print(f"Greedy, on {len(results)} held-out trials: {summary}")
        results.save(args.run_dir / "evaluation.npz")
        draw_pictures(args, results, rollout_pictures(policy, eval_env, seed=HELD_OUT_SEED + 1))
    return outcome


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
        reference=optimum.success_by_attempt if optimum else None,
        title=f"{args.size}x{args.size} lakes, {len(results)} held-out trials, greedy",
    )
    plot_trial_strip(frames, args.run_dir / "trial.png", title="One trial on a held-out lake")
    print(f"Pictures: {args.run_dir}/{{learning_curve,adaptation_curve,trial}}.png")


def main() -> None:
    args = tyro.cli(Args, default=Args(**DEBUG) if "--debug" in sys.argv else Args())
    sys.exit(0 if train(args) == "finished" else 130)


if __name__ == "__main__":
    main()
