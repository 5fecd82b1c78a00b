"""From a dataset to an agent that is better than what made it: offline first, then online, in one run.

    python examples/14_offline_to_online.py                          # makes pendulum/weak-5-v0 if need be
    python examples/14_offline_to_online.py --online-after 6000 --run-dir runs/offline_only   # never plays
    python examples/14_offline_to_online.py --dataset mujoco/hopper/medium-v0 --env-id Hopper-v5
    python examples/14_offline_to_online.py --debug                  # under a minute, to see that all runs
    python examples/14_offline_to_online.py --resume                 # go on after Ctrl-C

The first `--online-after` updates use the dataset alone. Then the agent plays in the environment, and
batches are made of both, less and less of the dataset. Needs Minari
(`pip install 'torchrl-amago[offline]'`), which looks for datasets in $MINARI_DATASETS_PATH, by default
~/.minari/datasets. Results land in the run's folder: `progress.csv`, `learning_curve.png`,
`evaluation.npz`, `evaluation_sampled.npz`, the policy's weights and checkpoints.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import gymnasium as gym
import make_minari_dataset
import minari
import numpy as np
import torch
from common import TrainingArgs, run_command_line, train_and_evaluate
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase

from torchrl_amago import (
    HeldOut,
    PopArt,
    TrialMixture,
    make_policy,
    make_trainer,
    make_trial_buffer,
    make_trial_env,
)
from torchrl_amago.evaluation import BothResults
from torchrl_amago.offline import load_trials, read_minari
from torchrl_amago.plots import plot_learning_curve


@dataclass
class Args(TrainingArgs):
    """Offline to online with AMAGO."""

    dataset: str | None = None
    """Id of a Minari dataset on this machine; by default one that is made here, see make_minari_dataset.py."""
    env_id: str | None = None
    """Environment of --dataset, by its id in Gymnasium."""
    trust_dataset_env: bool = False
    """Make the environment that --dataset describes. Its description can run any code: only for datasets
    of people you trust."""
    dataset_episodes: int = 5
    """Episodes of the dataset that is made here. Of many, with all their noise, nearly everything can be
    learned without playing."""
    online_after: int = 2000
    """Updates on the dataset alone; as many as --total-updates for an agent that never plays."""
    dataset_weight: float = 0.25
    """Share of a batch that comes from the dataset in the end."""
    anneal_updates: int = 1000
    """Updates over which the fraction of new experience rises."""
    online_coeff: float = 1.0
    """Weight of the policy gradient in the actor's loss."""
    offline_coeff: float = 0.1
    """Weight of the imitation of actions that the critics call better than the policy's. More of it helps
    with data of one narrow behaviour, and holds an agent back that plays."""
    context_length: int = 16
    """Steps that the policy sees."""
    slice_length: int = 16
    """Steps of a slice in a batch."""
    round_steps: int = 25
    """Steps of each environment between updates."""
    discounts: tuple[float, ...] = (0.9, 0.95, 0.97)
    """Discounts that are trained; the last one is acted with."""
    reward_scale: float = 1.0
    """Factor of rewards in the loss."""

    # Other defaults for fields that every task has.
    run_dir: Path = Path("runs/offline_to_online")
    num_envs: int = 32
    total_updates: int = 6000
    tau: float = 0.05
    anneal_frames: int = 50_000
    capacity: int = 300_000
    eval_interval: int = 500
    eval_trials: int = 64


def find_dataset(args: Args) -> minari.MinariDataset:
    if args.dataset is not None:
        return minari.load_dataset(args.dataset)
    own = make_minari_dataset.Args(episodes=args.dataset_episodes)
    if own.dataset_id in minari.list_local_datasets():
        return minari.load_dataset(own.dataset_id)
    return make_minari_dataset.make_dataset(own)


def make_env(args: Args, dataset: minari.MinariDataset, num_envs: int) -> EnvBase:
    env_id = args.env_id
    if args.dataset is None:
        env_id = make_minari_dataset.Args.env_id
    elif (env_id is None) != args.trust_dataset_env:
        raise ValueError(
            f"--dataset needs either --env-id or --trust-dataset-env; {dataset.id} says that its "
            f"environment is {dataset.env_spec.id}. Its description can run any code."
        )

    def make_one() -> gym.Env:
        if env_id is None:
            return dataset.recover_environment()
        return gym.make(env_id, max_episode_steps=dataset.env_spec.max_episode_steps)

    together = gym.vector.SyncVectorEnv(
        [make_one] * num_envs,
        # The trial transform resets what is done.
        autoreset_mode=gym.vector.AutoresetMode.DISABLED,
    )
    return make_trial_env(together, episodes=1, show_progress=False, trial_end="episode")


def make_replay(
    args: Args, dataset: minari.MinariDataset, env: EnvBase
) -> tuple[TrialMixture, float]:
    """The dataset, protected, beside what will be collected; and the dataset's mean return."""

    def make_buffer(capacity: int) -> ReplayBuffer:
        return make_trial_buffer(
            capacity,
            slice_length=args.slice_length,
            batch_size=args.batch_size,
            trim_padding=True,
            crop="both",
            warn_short=False,
        )

    source = read_minari(dataset)
    offline = make_buffer(source.num_steps)
    report = load_trials(offline, source, env)
    print(f"{dataset.id}: {report.describe()}")
    mixture = TrialMixture(
        {"dataset": offline, "online": make_buffer(args.capacity)},
        {"dataset": args.dataset_weight, "online": 1 - args.dataset_weight},
        anneal_updates=args.anneal_updates,
        online="online",
        batch_size=args.batch_size,
    )
    return mixture, float(np.mean(report.returns))


def train(args: Args) -> BothResults:
    torch.manual_seed(args.seed)
    dataset = find_dataset(args)
    length = dataset.env_spec.max_episode_steps
    env = make_env(args, dataset, args.num_envs)
    policy = make_policy(
        env,
        context_length=args.context_length,
        discounts=args.discounts,
        exploration=dict(anneal_frames=args.anneal_frames, horizon=length),
        # What AMAGO's own example on offline data takes.
        distribution="beta" if isinstance(dataset.action_space, gym.spaces.Box) else None,
        # Relative, since it doesn't matter how long an episode has lasted.
        **args.policy_options(positions="rotary", window=args.context_length),
    )
    replay, dataset_return = make_replay(args, dataset, env)
    held_out = HeldOut(policy, make_env(args, dataset, min(64, args.eval_trials)))
    options = dict(online_coeff=args.online_coeff, offline_coeff=args.offline_coeff, n_step=3)
    if args.loss == "amago":
        # The published step size averages over a third of this run.
        options["value_codec"] = PopArt(len(args.discounts), beta=0.01)
    trainer = make_trainer(
        env,
        policy,
        trial_length=length,
        round_steps=args.round_steps,
        replay_buffer=replay,
        online_after=args.online_after,
        loss_options=dict(reward_scale=args.reward_scale, **options),
        evaluator=lambda: held_out.evaluate(args.eval_trials // 4),
        **args.trainer_options(),
    )
    results = train_and_evaluate(args, trainer, held_out)
    print(f"{results.describe('trial_return')}; the dataset's mean {dataset_return:.3f}")
    draw_picture(args, dataset.id, dataset_return)
    return results


def draw_picture(args: Args, dataset_id: str, dataset_return: float) -> None:
    plays = args.online_after < args.total_updates
    plot_learning_curve(
        args.run_dir / "progress.csv",
        args.run_dir / "learning_curve.png",
        x="update",
        panels={
            "return per trial": {
                "train/trial_return": "collected",
                "eval/trial_return": "evaluation",
            },
        },
        reference={"return per trial": dataset_return},
        reference_label="dataset",
        marks={"begins to play": args.online_after} if plays else None,
        title=f"{dataset_id}, {args.seq_model}, {args.loss}",
    )


if __name__ == "__main__":
    run_command_line(
        Args,
        train,
        debug=dict(dataset_episodes=10, online_after=20, anneal_updates=10, eval_trials=16),
    )
