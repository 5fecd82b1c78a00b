"""Train an agent that finds an invisible key and door, and then finds them again and again.

    python examples/05_dark_key_door.py                    # an hour on a CPU core
    python examples/05_dark_key_door.py --seq-model feedforward --run-dir runs/no_memory
    python examples/05_dark_key_door.py --randomize-actions --run-dir runs/shuffled
    python examples/05_dark_key_door.py --no-dark --run-dir runs/light
    python examples/05_dark_key_door.py --debug            # under a minute, a test of the setup
    python examples/05_dark_key_door.py --resume           # go on after Ctrl-C

A trial is 100 steps in the same room; each time the agent comes to the key and then to the door (a
reward of 1 each), or 20 steps have passed, it starts again. Results land in the run's folder:
`progress.csv`, `learning_curve.png`, `adaptation_curve.png`, `trial.png`, `evaluation.npz`,
`evaluation_sampled.npz`, the policy's weights and checkpoints.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch
from common import TrainingArgs, command_line, draw_progress, final_evaluation, resume_if_asked
from torchrl.envs import EnvBase

from torchrl_amago import DarkKeyDoor, HeldOutEvaluator, make_policy, make_trainer, make_trial_env
from torchrl_amago.evaluation import HELD_OUT_SEED, EvaluationResults
from torchrl_amago.plots import plot_adaptation_curve, plot_trial_strip

THROUGH_DOOR = 1.0  # an episode succeeds if its return is larger: key and door


@dataclass
class Args(TrainingArgs):
    """Dark Key-to-Door with AMAGO."""

    size: int = 5
    """Cells on each side of the room."""
    max_episode_steps: int = 20
    """Steps after which an episode is over, if the agent isn't through the door before."""
    horizon: int = 100
    """Steps of a trial, however many episodes they make."""
    dark: bool = True
    """Hide the key, the door and the possession of the key from the agent."""
    randomize_actions: bool = False
    """Permute the actions anew in every room."""
    show_progress: bool = True
    """Show the agent how much of the trial is used up."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/dark_key_door")
    num_layers: int = 2
    hidden_size: int = 128
    learning_rate: float = 2.5e-4
    total_updates: int = 12_000
    anneal_frames: int = 4_000_000
    capacity: int = 400_000


def make_env(args: Args, num_envs: int, seed: int | None = None) -> EnvBase:
    room = DarkKeyDoor(
        args.size,
        dark=args.dark,
        max_episode_steps=args.max_episode_steps,
        randomize_actions=args.randomize_actions,
        batch_size=(num_envs,),
        device=args.task_device,
        seed=seed,
    )
    return make_trial_env(room, horizon=args.horizon, show_progress=args.show_progress)


def train(args: Args) -> EvaluationResults:
    torch.manual_seed(args.seed)
    env = make_env(args, args.num_envs)
    policy = make_policy(
        env,
        context_length=args.horizon,
        # Half the usual noise, for all of the run: how to search is learned from detours.
        exploration=dict(
            anneal_frames=args.anneal_frames, start_of_trial=(0.5, 0.05), end_of_trial=(0.4, 0.01)
        ),
        **args.policy_options(),
    )
    eval_env = make_env(args, min(128, args.eval_trials), seed=HELD_OUT_SEED)
    held_out = HeldOutEvaluator(policy, eval_env, success_threshold=THROUGH_DOOR)
    trainer = make_trainer(env, policy, trial_length=args.horizon, **args.trainer_options(held_out))
    resume_if_asked(args, trainer)
    # Success at the last episode says nothing here: the horizon cuts quick agents' last ones.
    results = final_evaluation(
        args, trainer.train(), trainer, held_out, "trial_return", "success_first"
    )
    draw_pictures(args, results, held_out)
    return results


def draw_pictures(args: Args, results: EvaluationResults, held_out: HeldOutEvaluator) -> None:
    title = f"{args.size}x{args.size} rooms, {args.seq_model}"
    draw_progress(args, title)
    # Only quick agents begin further episodes, so means over those would be means over them.
    common = max(1, args.horizon // args.max_episode_steps)
    first = dataclasses.replace(
        results.greedy,
        episode_return=results.greedy.episode_return[:, :common],
        episode_success=results.greedy.episode_success[:, :common],
    )
    path = args.run_dir / "adaptation_curve.png"
    plot_adaptation_curve(first, path, measure="return", title=f"{title}, greedy")
    frames = held_out.pictures()[:8]
    plot_trial_strip(frames, args.run_dir / "trial.png", title="The first episodes of a trial")


if __name__ == "__main__":
    with command_line(Args) as args:
        train(args)
