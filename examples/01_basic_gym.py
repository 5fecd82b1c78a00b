r"""Train an agent, with or without memory, on any Gymnasium environment of vector observations.

    python examples/01_basic_gym.py --mask-velocities              # CartPole without its velocities
    python examples/01_basic_gym.py --env-id Pendulum-v1 --run-dir runs/pendulum
    python examples/01_basic_gym.py --env-id Pendulum-v1 --loss amago2 --run-dir runs/pendulum_2

A trial is one episode, or `--episodes` of them with the same seed. The run's folder gets curves,
`trial.png` (`pip install "gymnasium[classic-control]"`), evaluations, weights and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from common import command_line, draw_progress, run
from gym_args import GymArgs, discounts_of

from torchrl_amago import HeldOutEvaluator, make_policy
from torchrl_amago.evaluation import EvaluationResults


@dataclass
class Args(GymArgs):
    """Any Gymnasium environment with AMAGO."""

    timestep_encoder: Literal["auto", "mlp", "combined"] = "auto"
    """Encoder of a step: mlp for vectors, combined for any observations, auto by what they are."""
    context_length: int = 16
    """Steps that the policy sees."""
    slice_length: int = 16
    """Steps of a slice in a batch; long slices give most steps their full context."""
    round_steps: int = 25
    """Steps of each environment between updates."""
    discounts: tuple[float, ...] = ()
    """Discounts that are trained; the last one is acted with. Default four, whose horizons go from
    10 steps to a third of the longest trial: .9, .961, .985 and .994 of 500 steps."""
    reward_scale: float = 1.0
    """Factor of rewards in the loss; the robust preset finds their scale by itself."""
    n_step: int = 10
    """Rewards in a TD target; 1 where a random action spoils the next ones, as on slippery ice."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/basic_gym")
    num_envs: int = 32
    total_updates: int = 12_000
    batch_size: int = 64
    tau: float = 0.02
    anneal_frames: int = 50_000
    capacity: int = 300_000
    eval_interval: int = 500
    eval_trials: int = 64


def train(args: Args) -> EvaluationResults:
    torch.manual_seed(args.seed)
    make = partial(args.make_env, args.num_envs)
    length, env = args.trial_length, make()
    context_length = min(args.context_length, length)
    policy = make_policy(
        env,
        context_length=context_length,
        timestep_encoder=args.timestep_encoder,
        discounts=args.discounts or discounts_of(length),
        **args.policy_options(positions="rotary", window=context_length),  # relative positions
    )
    held_out = HeldOutEvaluator(policy, args.make_env(min(64, args.eval_trials)))
    parts = (args, make, env, policy, held_out)
    results = run(
        *parts,
        "trial_return",
        trial_length=length,
        slice_length=min(args.slice_length, length),
        round_steps=min(args.round_steps, length),
        loss_options=dict(reward_scale=args.reward_scale, n_step=args.n_step),
        buffer_options=dict(sample_by="steps", crop="both"),  # all steps alike, ends too
    )
    draw_progress(args, f"{args.env_id}, {args.seq_model}, {args.loss}")
    args.draw_trial(policy, held_out.seed + 1)
    return results


if __name__ == "__main__":
    with command_line(Args, debug=dict(eval_trials=16)) as args:
        train(args)
