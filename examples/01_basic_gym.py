"""Train an agent on any Gymnasium environment whose observations are vectors, with or without memory.

    python examples/01_basic_gym.py --mask-velocities              # CartPole without its velocities
    python examples/01_basic_gym.py --mask-velocities --seq-model feedforward --run-dir runs/no_memory
    python examples/01_basic_gym.py --env-id Pendulum-v1 --run-dir runs/pendulum
    python examples/01_basic_gym.py --env-id Pendulum-v1 --loss amago2 --return-range -400 0 --run-dir runs/pendulum_2
    python examples/01_basic_gym.py --env-id Acrobot-v1 --keep 0 1 2 3 --run-dir runs/acrobot
    python examples/01_basic_gym.py --debug                        # under a minute, to see that all runs
    python examples/01_basic_gym.py --resume                       # go on after Ctrl-C

A trial is one episode, or `--episodes` of them that start alike. Environments are stepped together
in this process; continuous actions reach the policy in [-1, 1]. Results land in the run's folder:
`progress.csv`, `learning_curve.png`, `evaluation.npz`, `evaluation_sampled.npz`, weights, checkpoints,
and `trial.png` where the environment can be drawn (`pip install "gymnasium[classic-control]"`).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import gymnasium as gym
import numpy as np
import torch
from common import TrainingArgs, run_command_line, train_and_evaluate
from torchrl.envs import EnvBase

from torchrl_amago import (
    HeldOutEvaluator,
    HLGauss,
    PopArt,
    make_policy,
    make_trainer,
    make_trial_env,
)
from torchrl_amago.evaluation import EvaluationResults, rollout_pictures
from torchrl_amago.plots import plot_learning_curve, plot_trial_strip

# What stays visible under --mask-velocities: cart position and pole angle; cosine and sine of the angle.
WITHOUT_VELOCITIES = {"CartPole-v0": (0, 2), "CartPole-v1": (0, 2), "Pendulum-v1": (0, 1)}


@dataclass
class Args(TrainingArgs):
    """Any Gymnasium environment with AMAGO."""

    env_id: str = "CartPole-v1"
    """Id of a registered environment; `module:id` imports the module that registers it first."""
    mask_velocities: bool = False
    """Hide the velocities of CartPole and Pendulum, so that they must be worked out from the past."""
    keep: tuple[int, ...] = ()
    """Numbers of the observation's entries that stay visible; all if none is given."""
    episodes: int = 1
    """Episodes of a trial; all begin with the same seed."""
    episode_steps: int | None = None
    """Time limit of an episode; the environment's own by default."""
    timestep_encoder: Literal["mlp", "combined"] = "mlp"
    """What reads a step: mlp for vectors, combined also for dictionaries with images or categories."""
    context_length: int = 16
    """Steps that the policy sees."""
    slice_length: int = 16
    """Steps of a slice in a batch. In slices much longer than context_length, most steps see as much as
    the policy does when it acts; short ones make updates quick, so that there can be many."""
    round_steps: int = 25
    """Steps of each environment between updates."""
    discounts: tuple[float, ...] = (0.9, 0.95, 0.97)
    """Discounts that are trained; the last one is acted with."""
    reward_scale: float = 1.0
    """Factor of rewards in the loss."""
    n_step: int = 5
    """Rewards in a TD target. With more of them, actions differ more in what they lead to; those of old
    data tell less of what the policy would get, so that the buffer should be small."""
    popart_beta: float = 0.01
    """Step size of the running scale of values, where the loss is amago. The published one, 5e-4, averages
    over about 2,000 updates."""
    return_range: tuple[float, float] | None = None
    """Discounted returns that bins cover evenly, where the loss is amago2; by default 128 bins cover 100,000
    on either side of 0, finely near 0 and coarsely far from it."""
    num_bins: int = 9
    """Bins of --return-range, two of them below and two above it. Few wide ones show critics sooner what
    actions change."""
    init_slope: float | None = 10.0
    """How far the first weights of --return-range's bins are ordered (docs/value_codecs.md); None: not at all."""
    action_gain: float = 8.0
    """Factor of the first weights of the action in critics, where the loss is amago2."""
    offline_coeff: float | None = None
    """Weight of the filtered imitation in the actor's loss; the loss's own by default."""

    # Other defaults for fields that every task has.
    run_dir: Path = Path("runs/basic_gym")
    num_envs: int = 32
    total_updates: int = 12_000
    batch_size: int = 16
    learning_rate: float = 1e-3
    tau: float = 0.02
    anneal_frames: int = 50_000
    capacity: int = 50_000
    eval_interval: int = 500
    eval_trials: int = 64


def make_one(args: Args, **options: str) -> gym.Env:
    try:
        env = gym.make(args.env_id, max_episode_steps=args.episode_steps, **options)
    except gym.error.UnregisteredEnv as error:
        raise ValueError(
            f"--env-id must be an environment that Gymnasium knows, got {args.env_id!r}: {error} "
            "gymnasium.pprint_registry() lists them; `module:id` imports the module that registers one."
        ) from error
    keep = list(
        args.keep or (WITHOUT_VELOCITIES.get(args.env_id, ()) if args.mask_velocities else ())
    )
    if args.mask_velocities and not keep:
        raise ValueError(
            f"--mask-velocities knows the observations of {sorted(WITHOUT_VELOCITIES)} only, got "
            f"{args.env_id!r}. Name the entries that stay visible with --keep."
        )
    if not keep:
        return env
    space = env.observation_space
    if len(space.shape or ()) != 1 or not all(0 <= i < space.shape[0] for i in keep):
        raise ValueError(
            f"--keep takes numbers of entries of a vector, got {keep} for observations of {space}. "
            "Entries are counted from 0."
        )
    visible = gym.spaces.Box(space.low[keep], space.high[keep], dtype=space.dtype)
    return gym.wrappers.TransformObservation(env, lambda entries: entries[keep], visible)


def make_env(args: Args, num_envs: int, **options: str) -> EnvBase:
    together = gym.vector.SyncVectorEnv(
        [lambda: make_one(args, **options)] * num_envs,
        # The trial transform resets what is done.
        autoreset_mode=gym.vector.AutoresetMode.DISABLED,
    )
    return make_trial_env(
        together,
        episodes=args.episodes,
        show_progress=args.episodes > 1,
        # A time limit that isn't observed says nothing of what the last state is worth.
        trial_end="episode",
    )


def trial_length(args: Args) -> int:
    steps = args.episode_steps or make_one(args).spec.max_episode_steps
    if steps is None:
        raise ValueError(
            f"a trial needs an end, but {args.env_id} has no time limit. Give it one with --episode-steps."
        )
    return args.episodes * steps


def loss_options(args: Args) -> dict[str, Any]:
    options = dict(reward_scale=args.reward_scale, n_step=args.n_step)
    if args.loss == "amago":
        options["value_codec"] = PopArt(len(args.discounts), beta=args.popart_beta)
    elif args.return_range is not None:
        low, high = args.return_range
        if args.num_bins < 6:
            raise ValueError(
                f"--num-bins must be at least 6, got {args.num_bins}: four of them lie outside of "
                "--return-range."
            )
        # Labels are cut off at the ends, so that values near them are read too far inside.
        margin = 2 * (high - low) / (args.num_bins - 5)
        options["value_codec"] = HLGauss(
            len(args.discounts),
            num_bins=args.num_bins,
            min_return=low - margin,
            max_return=high + margin,
            symlog=False,
            init_slope=args.init_slope,
        )
    if args.offline_coeff is not None:
        options["offline_coeff"] = args.offline_coeff
    return options


def train(args: Args) -> EvaluationResults:
    torch.manual_seed(args.seed)
    length = trial_length(args)
    context_length = min(args.context_length, length)
    env = make_env(args, args.num_envs)
    policy = make_policy(
        env,
        context_length=context_length,
        timestep_encoder=args.timestep_encoder,
        discounts=args.discounts,
        exploration=dict(anneal_frames=args.anneal_frames, horizon=length),
        # Relative, since it doesn't matter how long an episode has lasted.
        **args.policy_options(positions="rotary", window=context_length),
    )
    held_out = HeldOutEvaluator(policy, make_env(args, min(64, args.eval_trials)))
    critic_options = dict(action_gain=args.action_gain) if args.loss == "amago2" else {}
    trainer = make_trainer(
        env,
        policy,
        trial_length=length,
        slice_length=min(args.slice_length, length),
        round_steps=min(args.round_steps, length),
        loss_options=loss_options(args),
        evaluator=lambda: held_out.evaluate(args.eval_trials // 4),
        **args.trainer_options(**critic_options),
    )
    results = train_and_evaluate(args, trainer, held_out)
    print(results.describe("trial_return"))
    draw_pictures(args, policy, held_out.seed + 1)
    return results


def draw_pictures(args: Args, policy, seed: int) -> None:
    plot_learning_curve(
        args.run_dir / "progress.csv",
        args.run_dir / "learning_curve.png",
        panels={
            "return per trial": {
                "train/trial_return": "training",
                "eval/trial_return": "evaluation",
            },
        },
        title=f"{args.env_id}, {args.seq_model}, {args.loss}",
    )
    try:
        episodes = rollout_pictures(policy, make_env(args, 1, render_mode="rgb_array"), seed=seed)
    except Exception as error:  # noqa: BLE001 - whatever a task fails with, the results are there
        print(f"No trial.png, since {args.env_id} can't be drawn here: {error}")
        return
    plot_trial_strip(
        [
            [episode[int(step)] for step in np.linspace(0, len(episode) - 1, 8)]
            for episode in episodes
        ],
        args.run_dir / "trial.png",
        headings=["start", *[""] * 6, "end"],
        titles=[f"{len(episode) - 1} steps" for episode in episodes],
        picture_inches=1.3,
    )


if __name__ == "__main__":
    run_command_line(Args, train, debug=dict(eval_trials=16))
