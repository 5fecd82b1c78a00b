"""Transforms that turn environments into adaptation tasks, and show the agent its own history."""

from torchrl_amago.envs.transforms.previous_step import PreviousStepTransform
from torchrl_amago.envs.transforms.repeat import RepeatFunction, RepeatMode, ResetOptions
from torchrl_amago.envs.transforms.trial import TrialTransform
from torchrl_amago.envs.transforms.trial_env import make_trial_env

__all__ = [
    "PreviousStepTransform",
    "RepeatFunction",
    "RepeatMode",
    "ResetOptions",
    "TrialTransform",
    "make_trial_env",
]
