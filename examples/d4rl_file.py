"""A file of D4RL-style arrays in the place of a Minari dataset, and normalised scores of both."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

try:
    import h5py
    import minari
except ImportError as error:
    sys.exit(f"error: Minari is missing ({error}): pip install 'torchrl-amago[offline]'")

# Returns of random and expert policies by the first part of a file's name (arXiv 2004.07219).
D4RL_SCORES = {
    "halfcheetah": (-280.178953, 12135.0),
    "hopper": (-20.272305, 3234.3),
    "walker2d": (1.629008, 4592.3),
    "ant": (-325.6, 3879.7),
    "antmaze": (0.0, 1.0),
    "kitchen": (0.0, 4.0),
}


class D4RLFile:
    """Arrays of D4RL in HDF5 or `.npz`, with what the example asks of a dataset.

    Args:
        path: such as `halfcheetah_medium-v2.hdf5`.
        env_id: id of its environment in Gymnasium.
    """

    def __init__(self, path: str, env_id: str | None) -> None:
        if env_id is None:
            raise ValueError(f"--dataset {path} is a file, so that it needs --env-id.")
        self.id = Path(path).stem
        self.arrays = load_arrays(Path(path))
        env = gym.make(env_id)
        self.env_spec, self.action_space = env.spec, env.action_space
        env.close()


def load_arrays(path: Path) -> dict[str, np.ndarray]:
    """Load the arrays that trajectories are made of."""
    names = ("observations", "actions", "rewards", "terminals", "timeouts", "next_observations")
    opened = np.load(path) if path.suffix == ".npz" else h5py.File(path)
    with opened as file:
        return {name: np.asarray(file[name]) for name in names if name in file}


def normalized_score(dataset: minari.MinariDataset | D4RLFile, mean_return: float) -> float | None:
    """Compute 100 (return - random) / (expert - random); None without published references."""
    if isinstance(dataset, D4RLFile):
        family = dataset.id.replace("_", "-").split("-")[0].lower()
        low, high = D4RL_SCORES.get(family, (None, None))
    else:
        metadata: dict[str, Any] = dataset.storage.metadata
        low, high = metadata.get("ref_min_score"), metadata.get("ref_max_score")
    return None if low is None or high is None else 100 * (mean_return - low) / (high - low)


def describe_returns(
    dataset: minari.MinariDataset | D4RLFile, of_dataset: float, of_policy: float
) -> str:
    """Compare the dataset's mean return with the greedy policy's, normalised if that is defined."""
    returns = {"dataset": of_dataset, "greedy policy": of_policy}
    scores = {name: normalized_score(dataset, value) for name, value in returns.items()}
    return "\n".join(
        f"mean return of the {name}: {value:.3f}"
        + ("" if scores[name] is None else f", normalised score {scores[name]:.1f}")
        for name, value in returns.items()
    )
