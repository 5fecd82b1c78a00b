"""Transforms that turn environments into adaptation tasks, and show the agent its own history.

``trial.py`` joins episodes at one task into trials, ``repeat.py`` repeats tasks,
``previous_step.py`` writes previous action and reward, ``trial_env.py`` assembles them.
"""

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
