"""Make a local Minari dataset: a scripted controller, more or less often overruled by chance.

    python examples/make_minari_dataset.py                        # pendulum/weak-5-v0
    python examples/make_minari_dataset.py --quality good         # pendulum/good-5-v0
    python examples/make_minari_dataset.py --env-id CartPole-v1   # cartpole/weak-5-v0

The behaviour policy, all of it: at every step, with the probability NOISE[quality], the action is
drawn uniformly from the action space; otherwise a controller chooses it. On the pendulum that
swings up by pumping energy, and balances near the top by a linear feedback; on the cart it pushes
to the side to which the pole falls. Datasets land in $MINARI_DATASETS_PATH or ~/.minari/datasets.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import gymnasium as gym
import minari
import numpy as np
import tyro
from minari.data_collector import EpisodeBuffer

NOISE = {"random": 1.0, "weak": 0.5, "good": 0.1}


@dataclass
class Args:
    """A dataset of a scripted controller."""

    env_id: Literal["Pendulum-v1", "CartPole-v1"] = "Pendulum-v1"
    """What is played."""
    quality: Literal["random", "weak", "good"] = "weak"
    """How often chance overrules the controller, see NOISE."""
    episodes: int = 5
    """Episodes of the dataset."""
    seed: int = 0
    """Of the environment and of chance."""

    @property
    def dataset_id(self) -> str:
        """Its name in Minari."""
        return f"{self.env_id.partition('-')[0].lower()}/{self.quality}-{self.episodes}-v0"


def swing_up(observation: np.ndarray) -> np.ndarray:
    """Torque on the pendulum, whose angle is 0 at the top."""
    cosine, sine, velocity = observation
    angle = math.atan2(sine, cosine)
    if cosine > 0.9 and abs(velocity) < 4:
        torque = -10.0 * angle - 2.6 * velocity
    else:
        # Energy by the moment of inertia; at rest at the top it is 15.
        lacking = 15.0 - (velocity**2 / 2 + 15.0 * cosine)
        torque = lacking * (velocity if velocity else 1.0)
    # Short of the bound of 2, where densities of bounded actions have no good value to learn.
    return np.array([1.8 * math.tanh(torque)], dtype=np.float32)


def keep_upright(observation: np.ndarray) -> int:
    """Side to push the cart to, 0 or 1."""
    position, speed, angle, angular_speed = observation
    return int(angle + 0.5 * angular_speed + 0.02 * position + 0.05 * speed > 0)


CONTROLLERS: dict[str, Callable] = {"Pendulum-v1": swing_up, "CartPole-v1": keep_upright}


def play(args: Args) -> list[EpisodeBuffer]:
    """The episodes; observations have one more entry than the rest."""
    env = gym.make(args.env_id)
    controller, noise = CONTROLLERS[args.env_id], NOISE[args.quality]
    chance = np.random.default_rng(args.seed)
    env.action_space.seed(args.seed)
    episodes = []
    for number in range(args.episodes):
        observation, _ = env.reset(seed=None if number else args.seed)
        episode = EpisodeBuffer(number, observations=[observation], actions=[])
        done = False
        while not done:
            by_chance = chance.random() < noise
            action = env.action_space.sample() if by_chance else controller(observation)
            observation, reward, terminated, truncated, _ = env.step(action)
            episode.observations.append(observation)
            episode.actions.append(action)
            episode.rewards.append(float(reward))
            episode.terminations.append(terminated)
            episode.truncations.append(truncated)
            done = terminated or truncated
        episodes.append(episode)
    return episodes


def make_dataset(args: Args) -> minari.MinariDataset:
    """Play the episodes and write the dataset, in place of one of this name."""
    if args.dataset_id in minari.list_local_datasets():
        minari.delete_dataset(args.dataset_id)
    episodes = play(args)
    # Not with minari.DataCollector, which needs jax.
    dataset = minari.create_dataset_from_buffers(
        args.dataset_id,
        episodes,
        env=args.env_id,
        eval_env=args.env_id,
        algorithm_name=f"scripted controller, random with probability {NOISE[args.quality]}",
        author="torchrl_amago",
        author_email="unknown",
        code_permalink="examples/make_minari_dataset.py",
        description=__doc__,
    )
    size = f"{dataset.total_episodes} episodes of {dataset.total_steps} steps"
    mean_return = np.mean([sum(episode.rewards) for episode in episodes])
    print(f"{dataset.id}: {size}, mean return {mean_return:.1f}")
    return dataset


if __name__ == "__main__":
    make_dataset(tyro.cli(Args))
