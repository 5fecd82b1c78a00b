"""Dataset, environment and replay of the example from offline to online."""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import make_minari_dataset
import minari
import numpy as np
from d4rl_file import D4RLFile
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase

from torchrl_amago import TrialMixture, make_trial_buffer, make_trial_env
from torchrl_amago.envs import gymnasium_rows
from torchrl_amago.offline import load_trials, read_d4rl, read_minari


def find_dataset(args: Any) -> minari.MinariDataset | D4RLFile:
    """Load the dataset of `args`, by default the scripted controller's, made if missing."""
    if args.dataset is not None and args.dataset.endswith((".hdf5", ".h5", ".npz")):
        return D4RLFile(args.dataset, args.env_id)
    if args.dataset is not None:
        try:
            return minari.load_dataset(args.dataset)
        except FileNotFoundError as error:
            remedy = f"minari download {args.dataset}"
            raise FileNotFoundError(f"{error} On the command line: {remedy}") from error
    own = make_minari_dataset.Args(episodes=args.dataset_episodes)
    if own.dataset_id in minari.list_local_datasets():
        return minari.load_dataset(own.dataset_id)
    return make_minari_dataset.make_dataset(own)


def make_env(args: Any, dataset: minari.MinariDataset | D4RLFile, num_envs: int) -> EnvBase:
    """Make the dataset's environment, batched, with one episode as a trial."""
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

    return make_trial_env(
        gymnasium_rows(make_one, num_envs), episodes=1, show_progress=False, trial_end="episode"
    )


def make_anew(args: Any) -> EnvBase:
    """Make the environment of training, in another process."""
    return make_env(args, find_dataset(args), args.num_envs)


def make_replay(
    args: Any, dataset: minari.MinariDataset | D4RLFile, env: EnvBase
) -> tuple[TrialMixture, float]:
    """Return a mixture of the dataset and an empty buffer, and the dataset's mean return."""

    def make_buffer(capacity: int) -> ReplayBuffer:
        return make_trial_buffer(
            capacity,
            slice_length=args.slice_length,
            batch_size=args.batch_size,
            trim_padding=True,
            crop="both",
            warn_short=False,
        )

    is_file = isinstance(dataset, D4RLFile)
    source = read_d4rl(dataset.arrays) if is_file else read_minari(dataset)
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
