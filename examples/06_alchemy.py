"""Train an agent that finds out by experiments which potions improve stones.

    python examples/06_alchemy.py                          # five minutes on a CPU core
    python examples/06_alchemy.py --seq-model feedforward --run-dir runs/no_memory
    python examples/06_alchemy.py --debug                  # under a minute, a test of the setup

A trial is six short episodes with one chemistry, which says what the colours of potions do to
stones. By default there is one stone, no move is impossible, an action names a colour, and potions
pay what they add. The published task, untried: `--bottleneck random --num-stones 3 --episodes 10
--max-episode-steps 20 --no-colour-actions --no-shaping`. The run's folder gets all results.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from common import TrainingArgs, command_line, draw_progress, run
from torchrl.envs import EnvBase

from torchrl_amago import HeldOutEvaluator, make_policy, make_trial_env
from torchrl_amago.envs import SymbolicAlchemy
from torchrl_amago.evaluation import HELD_OUT_SEED, EvaluationResults
from torchrl_amago.modules import SEQ_MODELS
from torchrl_amago.plots import plot_adaptation_curve, plot_trial_strip


@dataclass
class Args(TrainingArgs):
    """Symbolic Alchemy with AMAGO."""

    bottleneck: Literal["random", "none", "1", "2", "3"] = "none"
    """Impossible moves of stones."""
    num_stones: int = 1
    """Stones in an episode."""
    max_episode_steps: int = 6
    """Steps of an episode."""
    episodes: int = 6
    """Episodes in a trial."""
    colour_actions: bool = True
    """Let actions name the colour of a potion instead of its place."""
    shaping: bool = True
    """Reward potions by what they add to a stone's worth."""
    show_chemistry: bool = False
    """Show the task to the agent."""
    discounts: tuple[float, ...] = (0.5, 0.8, 0.9)
    """Discounts that values are learned for; the last is acted with."""
    reward_scale: float = 0.2
    """Factor of rewards in the loss; the robust preset finds their scale by itself."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/alchemy")
    seq_model: Literal[tuple(SEQ_MODELS)] = "gru"
    hidden_size: int = 128
    learning_rate: float = 1e-3
    total_updates: int = 4000
    tau: float = 0.02
    anneal_frames: int = 300_000
    capacity: int = 400_000
    eval_trials: int = 256


def make_env(args: Args, num_envs: int, seed: int | None = None) -> EnvBase:
    table = SymbolicAlchemy(
        bottleneck=args.bottleneck,
        num_stones=args.num_stones,
        max_episode_steps=args.max_episode_steps,
        colour_actions=args.colour_actions,
        shaping=args.shaping,
        show_chemistry=args.show_chemistry,
        batch_size=(num_envs,),
        device=args.task_device,
        seed=seed,
    )
    return make_trial_env(table, episodes=args.episodes)


def train(args: Args) -> EvaluationResults:
    torch.manual_seed(args.seed)
    make = partial(make_env, args, args.num_envs)
    env = make()
    horizon = args.episodes * args.max_episode_steps
    policy = make_policy(
        env,
        context_length=horizon,
        discounts=args.discounts,
        # Half the usual noise: the trials to learn from are those that use what they found out.
        exploration=dict(
            anneal_frames=args.anneal_frames, start_of_trial=(0.5, 0.05), end_of_trial=(0.4, 0.01)
        ),
        **args.policy_options(),
    )
    held_out = HeldOutEvaluator(policy, make_env(args, min(128, args.eval_trials), HELD_OUT_SEED))
    parts = (args, make, env, policy, held_out)
    results = run(
        *parts,
        "trial_return",
        critic_options=dict(num_critics=2),
        trial_length=horizon,
        loss_options=dict(reward_scale=args.reward_scale),
    )
    draw_pictures(args, results, held_out)
    return results


def draw_pictures(args: Args, results: EvaluationResults, held_out: HeldOutEvaluator) -> None:
    draw_progress(args, title := f"Symbolic Alchemy, {args.seq_model}")
    path = args.run_dir / "adaptation_curve.png"
    plot_adaptation_curve(results.greedy, path, measure="return", title=f"{title}, greedy")
    frames = held_out.pictures()[:5]
    plot_trial_strip(frames, args.run_dir / "trial.png", title="The first episodes of a trial")


if __name__ == "__main__":
    with command_line(Args) as args:
        train(args)
