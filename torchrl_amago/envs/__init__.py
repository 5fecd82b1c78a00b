"""Environments: ``tasks`` are natively batched, ``transforms`` make trials of any environment."""

from torchrl_amago.envs.libs import ReseedEpisodes, gymnasium_rows
from torchrl_amago.envs.recorded import RecordedEnv
from torchrl_amago.envs.tasks import (
    DarkKeyDoor,
    MazeRunner,
    MetaFrozenLake,
    SymbolicAlchemy,
    TMaze,
    bayes_optimal_success,
)
from torchrl_amago.envs.transforms import PreviousStepTransform, TrialTransform, make_trial_env

__all__ = [
    "DarkKeyDoor", "MazeRunner", "MetaFrozenLake", "PreviousStepTransform", "RecordedEnv",
    "ReseedEpisodes", "SymbolicAlchemy", "TMaze", "TrialTransform", "bayes_optimal_success",
    "gymnasium_rows", "make_trial_env",
]  # fmt: skip
