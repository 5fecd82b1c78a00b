"""Train an agent that finds an invisible key and door, and then finds them again and again.

    python examples/05_dark_key_door.py                    # on two CPU cores
    python examples/05_dark_key_door.py --seq-model feedforward --run-dir runs/no_memory   # for comparison
    python examples/05_dark_key_door.py --randomize-actions --run-dir runs/shuffled        # actions unknown, too
    python examples/05_dark_key_door.py --no-dark --run-dir runs/light                     # all is shown
    python examples/05_dark_key_door.py --debug            # under a minute, to see that all runs
    python examples/05_dark_key_door.py --resume           # go on after Ctrl-C

A trial is 100 steps in the same room; each time the agent comes to the key and then to the door (a
reward of 1 each), or 20 steps have passed, it starts again. Results land in the run's folder:
`progress.csv`, `learning_curve.png`, `adaptation_curve.png`, `trial.png`, `evaluation.npz` and
checkpoints.
"""

from __future__ import annotations

import dataclasses
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
    DarkKeyDoor,
    TrialResults,
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
THROUGH_DOOR = 1.0  # an attempt succeeds if its return is larger: key and door


@dataclass
class Args:
    """Dark Key-to-Door with AMAGO."""

    run_dir: Path = Path("runs/dark_key_door")
    """Folder for everything this run writes."""
    resume: bool = False
    """Go on from the newest checkpoint in run_dir."""
    debug: bool = False
    """A short run with a small network, to see that everything works (under a minute)."""
    seed: int = 1
    """Seed of everything: networks, rooms, exploration, batches."""

    size: int = 5
    """Cells on each side of the room."""
    attempt_steps: int = 20
    """Steps after which an attempt is over, if the agent isn't through the door before."""
    horizon: int = 100
    """Steps of a trial, however many attempts they make."""
    dark: bool = True
    """Show the agent its own position only; else also the key, the door and whether it has the key."""
    randomize_actions: bool = False
    """Permute the actions anew in every room."""
    show_progress: bool = True
    """Show the agent how much of the trial is used up."""

    seq_model: Literal[tuple(SEQ_MODELS)] = "transformer"
    """What remembers: the trajectory encoder."""
    d_model: int = 64
    """Width of the sequence model."""
    num_layers: int = 1
    """Layers of the sequence model."""
    hidden_size: int = 64
    """Width of the timestep encoder's, actor's and critics' hidden layers."""

    num_envs: int = 64
    """Rooms searched at the same time."""
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
    anneal_frames: int = 100_000
    """Environment steps over which exploration fades."""
    buffer_frames: int = 120_000
    """Capacity of the replay buffer in steps; the oldest trials leave first."""

    eval_interval: int = 250
    """Updates between evaluations on rooms of another seed, greedy, without exploration."""
    eval_trials: int = 512
    """Trials in the last evaluation; a quarter of it in those before."""
    checkpoint_interval: int = 500
    """Updates between checkpoints."""
    logger: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """Loggers besides progress.csv."""
    threads: int = 2
    """CPU threads."""


DEBUG = dict(debug=True, run_dir=Path("runs/dark_key_door_debug"), total_updates=40, updates_per_round=10, num_envs=16, batch_size=8, d_model=32,
             hidden_size=32, eval_interval=20, eval_trials=64, checkpoint_interval=20)  # fmt: skip


TASK = ("size", "attempt_steps", "horizon", "dark", "randomize_actions", "show_progress")


def seq_model_options(args: Args) -> dict:
    sizes = dict(d_model=args.d_model, num_layers=args.num_layers)
    heads = dict(num_heads=4) if args.seq_model in ("transformer", "linear_attention") else {}
    return {} if args.seq_model == "identity" else sizes | heads


def make_env(args: Args, num_envs: int, seed: int | None = None) -> EnvBase:
    room = DarkKeyDoor(
        args.size,
        dark=args.dark,
        max_episode_steps=args.attempt_steps,
        randomize_actions=args.randomize_actions,
        batch_size=(num_envs,),
        seed=seed,
    )
    return make_trial_env(room, horizon=args.horizon, show_progress=args.show_progress)


def train(args: Args) -> str:
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    env = make_env(args, args.num_envs)
    policy = make_policy(
        env,
        context_length=args.horizon,
        seq_model=args.seq_model,
        seq_model_options=seq_model_options(args),
        timestep_options=dict(hidden_size=args.hidden_size, output_size=args.d_model),
        actor_options=dict(hidden_size=args.hidden_size),
        exploration=dict(anneal_frames=args.anneal_frames),
    )
    eval_rows = min(128, args.eval_trials)
    eval_env = make_env(args, eval_rows, seed=HELD_OUT_SEED)

    def evaluate_held_out(num_trials: int) -> TrialResults:
        rounds = math.ceil(num_trials / eval_rows)
        return evaluate(
            policy,
            eval_env,
            trials_per_row=rounds,
            seed=HELD_OUT_SEED,
            success_threshold=THROUGH_DOOR,
        )

    trainer = make_trainer(
        env,
        policy,
        trial_length=args.horizon,
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
        success_threshold=THROUGH_DOOR,
        seed=args.seed,
        task={name: getattr(args, name) for name in TASK},
        resume_command=shlex.join([sys.executable, *sys.argv] + ["--resume"] * (not args.resume)),
    )
    if args.resume:
        trainer.resume()
    outcome = trainer.train()
    if outcome == "finished":
        results = evaluate_held_out(args.eval_trials)
        # Success at the last attempt says nothing here: the horizon cuts quick agents' last ones.
        summary = results.summary()
        print(
            f"Greedy, on {len(results)} fresh trials: return per trial {summary['trial_return']:.3f}, "
            f"success at the first attempt {summary['success_first']:.3f}"
        )
        results.save(args.run_dir / "evaluation.npz")
        draw_pictures(args, results, rollout_pictures(policy, eval_env, seed=HELD_OUT_SEED + 1))
    return outcome


def draw_pictures(args: Args, results: TrialResults, frames: list) -> None:
    plot_learning_curve(
        args.run_dir / "progress.csv",
        args.run_dir / "learning_curve.png",
        panels={
            "return per trial": {
                "train/trial_return": "training",
                "eval/trial_return": "evaluation",
            },
        },
        title=f"{args.size}x{args.size} rooms, {args.seq_model}",
    )
    # Only quick agents begin further attempts, so means over those would be means over them.
    common = max(1, args.horizon // args.attempt_steps)
    results = dataclasses.replace(
        results,
        attempt_return=results.attempt_return[:, :common],
        attempt_success=results.attempt_success[:, :common],
    )
    plot_adaptation_curve(
        results,
        args.run_dir / "adaptation_curve.png",
        measure="return",
        title=f"{args.size}x{args.size} rooms, {args.seq_model}, greedy",
    )
    plot_trial_strip(frames[:8], args.run_dir / "trial.png", title="The first attempts of a trial")
    print(f"Pictures: {args.run_dir}/{{learning_curve,adaptation_curve,trial}}.png")


def main() -> None:
    args = tyro.cli(Args, default=Args(**DEBUG) if "--debug" in sys.argv else Args())
    sys.exit(0 if train(args) == "finished" else 130)


if __name__ == "__main__":
    main()
