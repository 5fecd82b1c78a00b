"""Train an agent that becomes better than its dataset: offline first, then online, in one run.

    python examples/14_offline_to_online.py                   # makes pendulum/weak-5-v0 if needed
    python examples/14_offline_to_online.py --online-after 6000 --run-dir runs/offline
    python examples/14_offline_to_online.py --dataset mujoco/hopper/medium-v0 --env-id Hopper-v5
    python examples/14_offline_to_online.py --debug           # under a minute, a test of the setup

The first `--online-after` updates use the dataset alone. Then the agent plays, and batches mix
both, less and less of the dataset. Minari (`pip install 'torchrl-amago[offline]'`) looks for
datasets in $MINARI_DATASETS_PATH. The run's folder gets curve, evaluations, weights, checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path

import gymnasium as gym
import torch
from common import TrainingArgs, command_line, draw_progress, run
from d4rl_file import describe_returns
from offline_parts import find_dataset, make_anew, make_env, make_replay

from torchrl_amago import HeldOutEvaluator, make_policy
from torchrl_amago.evaluation import EvaluationResults


@dataclass
class Args(TrainingArgs):
    """Offline to online with AMAGO."""

    dataset: str | None = None
    """Id of a local Minari dataset, or a D4RL-style .hdf5 or .npz file; default: one made here."""
    env_id: str | None = None
    """Id of the dataset's environment in Gymnasium."""
    trust_dataset_env: bool = False
    """Make the environment by the dataset's description, which can run any code."""
    dataset_episodes: int = 5
    """Episodes of the dataset made here; many would make playing needless."""
    online_after: int = 2000
    """Updates on the dataset alone; with total_updates the agent never plays."""
    dataset_weight: float = 0.25
    """Fraction of a batch that comes from the dataset in the end."""
    anneal_updates: int = 1000
    """Updates over which the fraction of new experience rises."""
    online_coeff: float = 1.0
    """Weight of the policy gradient in the actor's loss."""
    offline_coeff: float = 0.1
    """Weight of the filtered imitation; more helps with data of one narrow behaviour."""
    context_length: int = 16
    """Steps that the policy sees."""
    slice_length: int = 16
    """Steps of a slice in a batch."""
    round_steps: int = 25
    """Steps of each environment between updates."""
    discounts: tuple[float, ...] = (0.9, 0.95, 0.97)
    """Discounts that are trained; the last one is acted with."""
    reward_scale: float = 1.0
    """Factor of rewards in the loss; the robust preset finds their scale by itself."""

    # Other defaults of common fields.
    run_dir: Path = Path("runs/offline_to_online")
    num_envs: int = 32
    total_updates: int = 6000
    tau: float = 0.05
    anneal_frames: int = 50_000
    capacity: int = 300_000
    eval_interval: int = 500
    eval_trials: int = 64


def train(args: Args) -> EvaluationResults:
    torch.manual_seed(args.seed)
    dataset = find_dataset(args)
    length = dataset.env_spec.max_episode_steps
    env = make_env(args, dataset, args.num_envs)
    policy = make_policy(
        env,
        context_length=args.context_length,
        discounts=args.discounts,
        exploration=dict(anneal_frames=args.anneal_frames, horizon=length),
        # As in AMAGO's own example on offline data.
        distribution="beta" if isinstance(dataset.action_space, gym.spaces.Box) else None,
        # Relative, since it doesn't matter how long an episode has lasted.
        **args.policy_options(positions="rotary", window=args.context_length),
    )
    replay, dataset_return = make_replay(args, dataset, env)
    held_out = HeldOutEvaluator(policy, make_env(args, dataset, min(64, args.eval_trials)))
    options = dict(online_coeff=args.online_coeff, offline_coeff=args.offline_coeff, n_step=3)
    parts = (args, partial(make_anew, args), env, policy, held_out)
    results = run(
        *parts,
        "trial_return",
        trial_length=length,
        round_steps=args.round_steps,
        replay_buffer=replay,
        online_after=args.online_after,
        loss_options=dict(reward_scale=args.reward_scale, **options),
    )
    greedy_return = results.greedy.trial_return.mean().item()
    print(describe_returns(dataset, dataset_return, greedy_return))
    draw_progress(
        args,
        f"{dataset.id}, {args.seq_model}, {args.loss}",
        x="update",
        reference={"return per trial": dataset_return},
        reference_label="dataset",
        marks={"begins to play": args.online_after},
    )
    return results


if __name__ == "__main__":
    short = dict(dataset_episodes=10, online_after=20, anneal_updates=10, eval_trials=16)
    with command_line(Args, debug=short) as args:
        train(args)
