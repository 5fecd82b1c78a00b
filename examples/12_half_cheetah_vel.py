"""Train Half-Cheetah to run at a velocity that it isn't told: rewards say how far off it is.

    pip install "torchrl-amago[mujoco]"
    python examples/12_half_cheetah_vel.py             # three episodes at each velocity
    python examples/12_half_cheetah_vel.py --seq-model gru --run-dir runs/cheetah_gru
    python examples/12_half_cheetah_vel.py --loss amago2 --run-dir runs/cheetah_2
    python examples/12_half_cheetah_vel.py --debug     # under a minute, a test of the setup
    python examples/12_half_cheetah_vel.py --resume    # go on after Ctrl-C

A trial is three episodes of 200 steps at one target velocity between 0 and 3 m/s. Results land in
the run's folder: `progress.csv`, `learning_curve.png`, `adaptation_curve.png`, `evaluation.npz`,
`evaluation_sampled.npz`, the policy's weights and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from common import TrainingArgs, command_line, draw_progress, run
from torchrl.envs import EnvBase

from torchrl_amago import HeldOutEvaluator, make_policy, make_trial_env
from torchrl_amago.envs.libs import HalfCheetahVel, gymnasium_rows
from torchrl_amago.evaluation import EvaluationResults
from torchrl_amago.plots import plot_adaptation_curve


@dataclass
class Args(TrainingArgs):
    """Half-Cheetah with hidden target velocities, with AMAGO."""

    episodes: int = 3
    """Episodes at each velocity."""
    max_episode_steps: int = 200
    """Steps of an episode."""
    min_velocity: float = 0.0
    """Lowest target in m/s."""
    max_velocity: float = 3.0
    """Highest target in m/s; an agent that is to run as fast as it can gets beyond 10."""
    context_length: int = 64
    """Steps that the policy remembers, and steps of a slice; a few rewards reveal the target."""
    round_steps: int = 100
    """Steps of each environment between updates."""
    discounts: tuple[float, ...] = (0.1, 0.9, 0.95, 0.97, 0.99)
    """Discounts that are trained; the last one is acted with. Running needs no longer horizon."""
    reward_scale: float = 1.0
    """Factor of rewards in the loss; the robust preset finds their scale by itself."""
    n_step: int = 5
    """Rewards in a TD target; more of them tell values sooner of what comes late."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/half_cheetah_vel")
    d_model: int = 128
    hidden_size: int = 256
    num_envs: int = 16
    total_updates: int = 20_000
    anneal_frames: int = 500_000
    capacity: int = 1_000_000
    eval_interval: int = 1000
    eval_trials: int = 64
    checkpoint_interval: int = 2000


def make_env(args: Args, num_envs: int) -> EnvBase:
    rows = gymnasium_rows(
        lambda: HalfCheetahVel(args.max_episode_steps, args.min_velocity, args.max_velocity),
        num_envs,
    )
    return make_trial_env(
        rows, episodes=args.episodes, repeat="options", options=HalfCheetahVel.SAME_TARGET
    )


def train(args: Args) -> EvaluationResults:
    torch.manual_seed(args.seed)
    trial_length = args.episodes * args.max_episode_steps
    make = partial(make_env, args, args.num_envs)
    env = make()
    policy = make_policy(
        env,
        context_length=min(args.context_length, trial_length),
        discounts=args.discounts,
        exploration=dict(anneal_frames=args.anneal_frames, horizon=trial_length),
        # Relative, since it doesn't matter how long a trial has lasted.
        **args.policy_options(positions="rotary"),
    )
    held_out = HeldOutEvaluator(policy, make_env(args, min(16, args.eval_trials)))
    parts = (args, make, env, policy, held_out)
    results = run(
        *parts,
        "trial_return",
        trial_length=trial_length,
        slice_length=min(args.context_length, trial_length),
        round_steps=min(args.round_steps, trial_length),
        loss_options=dict(reward_scale=args.reward_scale, n_step=args.n_step),
    )
    title = f"{args.min_velocity:g} to {args.max_velocity:g} m/s, {args.seq_model}, {args.loss}"
    draw_progress(args, title)
    path = args.run_dir / "adaptation_curve.png"
    plot_adaptation_curve(results.greedy, path, measure="return", title=f"{title}, greedy")
    return results


if __name__ == "__main__":
    with command_line(Args, debug=dict(max_episode_steps=20, num_envs=4, eval_trials=16)) as args:
        train(args)
