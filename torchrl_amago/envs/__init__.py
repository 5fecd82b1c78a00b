"""Environments: native batched tasks and the transforms that make trials of any environment.

``tasks`` holds environments of our own, ``transforms`` the pieces that turn an environment that can
repeat a task into trials and show the agent its previous action and reward.
"""

from __future__ import annotations

from torchrl_amago.envs.recorded import RecordedEnv
from torchrl_amago.envs.tasks import (
    DarkKeyDoor,
    MazeRunner,
    MetaFrozenLake,
    TMaze,
    bayes_optimal_success,
)
from torchrl_amago.envs.transforms import PreviousStepTransform, TrialTransform, make_trial_env

__all__ = [
    "DarkKeyDoor",
    "MazeRunner",
    "MetaFrozenLake",
    "PreviousStepTransform",
    "RecordedEnv",
    "TMaze",
    "TrialTransform",
    "bayes_optimal_success",
    "make_trial_env",
]
