"""Train an agent that remembers one bit for as long as a corridor is: the Passive T-Maze.

    python examples/04_tmaze.py             # a corridor of 50 steps, on two CPU cores
    python examples/04_tmaze.py --debug     # under a minute, to see that all runs
    python examples/04_tmaze.py --resume    # go on after Ctrl-C
    python examples/04_tmaze.py --run-dir runs/gru_100 --corridor 100 --seq-model gru
    python examples/04_tmaze.py --run-dir runs/no_memory --seq-model feedforward    # stays at 1/2
    python examples/04_tmaze.py --run-dir runs/oracle --seq-model feedforward --oracle

The right arm at the corridor's end is shown at the first step only. Results land in the run's folder:
`progress.csv`, `learning_curve.png`, `trial.png`, `evaluation.npz` and checkpoints.
"""

from __future__ import annotations

import math
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro
from torchrl.envs import EnvBase

from torchrl_amago import (
    SEQ_MODELS,
    TMaze,
    TrialResults,
    evaluate,
    make_policy,
    make_trainer,
    make_trial_env,
    plot_learning_curve,
    plot_trial_strip,
    rollout_pictures,
)

HELD_OUT_SEED = 10_000_019  # of evaluation; training draws its own


@dataclass
class Args:
    """Passive T-Maze with AMAGO."""

    run_dir: Path = Path("runs/tmaze")
    """Folder for everything this run writes."""
    resume: bool = False
    """Go on from the newest checkpoint in run_dir."""
    debug: bool = False
    """A short run with a small network and corridor, to see that everything works (under a minute)."""
    seed: int = 1
    """Seed of everything: networks, goals, exploration, batches."""

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

    seq_model: Literal[tuple(SEQ_MODELS)] = "transformer"
    """What remembers: the trajectory encoder."""
    d_model: int = 64
    """Width of the sequence model."""
    num_layers: int = 1
    """Layers of the sequence model."""
    hidden_size: int = 64
    """Width of the timestep encoder's, actor's and critics' hidden layers."""

    num_envs: int = 64
    """Mazes walked at the same time."""
    total_updates: int = 3000
    """Optimiser steps in all."""
    updates_per_round: int = 20
    """Optimiser steps after each round, in which every environment plays one trial."""
    batch_size: int = 32
    """Trials in a batch."""
    learning_rate: float = 5e-4
    """Peak learning rate of AdamW; it falls to a tenth by the end."""
    warmup_updates: int = 100
    """Updates over which the learning rate rises."""
    tau: float = 0.01
    """Share of the online weights that the targets take over at each update."""
    anneal_frames: int = 60_000
    """Environment steps over which exploration fades."""
    buffer_frames: int = 120_000
    """Capacity of the replay buffer in steps; the oldest trials leave first."""

    eval_interval: int = 250
    """Updates between evaluations, greedy, without exploration."""
    eval_trials: int = 512
    """Trials in the last evaluation; a quarter of it in those before."""
    checkpoint_interval: int = 500
    """Updates between checkpoints."""
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers besides progress.csv."""
    threads: int = 2
    """CPU threads."""


DEBUG = dict(debug=True, run_dir=Path("runs/tmaze_debug"), corridor=10, total_updates=40, updates_per_round=10, num_envs=16, batch_size=8, d_model=32,
             hidden_size=32, eval_interval=20, eval_trials=64, checkpoint_interval=20)  # fmt: skip


TASK = (
    "corridor",
    "episode",
    "ambiguous_position",
    "penalty",
    "penalize",
    "show_time",
    "oracle",
)


def seq_model_options(args: Args, trial_length: int) -> dict:
    options = dict(d_model=args.d_model, num_layers=args.num_layers)
    if args.seq_model in ("transformer", "linear_attention"):
        options["num_heads"] = 4
    if args.seq_model in ("gru", "lstm"):
        options["longest_memory"] = trial_length
    return {} if args.seq_model == "identity" else options


def make_env(args: Args, num_envs: int, seed: int | None = None) -> EnvBase:
    maze = TMaze(
        args.corridor,
        episode_length=args.episode,
        ambiguous_position=args.ambiguous_position,
        penalty=args.penalty,
        penalize=args.penalize,
        show_time=args.show_time,
        oracle=args.oracle,
        batch_size=(num_envs,),
        seed=seed,
    )
    return make_trial_env(maze, episodes=1, show_progress=False)


def train(args: Args) -> str:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    env = make_env(args, args.num_envs)
    trial_length = env.base_env.episode_length
    policy = make_policy(
        env,
        context_length=trial_length,
        seq_model=args.seq_model,
        seq_model_options=seq_model_options(args, trial_length),
        timestep_options=dict(hidden_size=args.hidden_size, output_size=args.d_model),
        actor_options=dict(hidden_size=args.hidden_size),
        exploration=dict(
            anneal_frames=args.anneal_frames,
            # A single wrong step spoils the walk: noise is for the junction, the last few steps.
            start_of_trial=(0.2, 0.0),
            end_of_trial=(1.0, 0.2),
            power=trial_length / 4,
        ),
    )
    eval_rows = min(128, args.eval_trials)
    eval_env = make_env(args, eval_rows, seed=HELD_OUT_SEED)

    def evaluate_held_out(num_trials: int) -> TrialResults:
        rounds = math.ceil(num_trials / eval_rows)
        return evaluate(policy, eval_env, trials_per_row=rounds, seed=HELD_OUT_SEED)

    trainer = make_trainer(
        env,
        policy,
        trial_length=trial_length,
        total_updates=args.total_updates,
        run_dir=args.run_dir,
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
        success, trial_return = results.summary()["success"], results.summary()["trial_return"]
        print(f"Greedy, on {len(results)} trials: success {success:.3f}, return {trial_return:.3f}")
        results.save(args.run_dir / "evaluation.npz")
        draw_pictures(args, rollout_pictures(policy, eval_env, seed=HELD_OUT_SEED + 1))
    return outcome


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


def main() -> None:
    args = tyro.cli(Args, default=Args(**DEBUG) if "--debug" in sys.argv else Args())
    sys.exit(0 if train(args) == "finished" else 130)


if __name__ == "__main__":
    main()
