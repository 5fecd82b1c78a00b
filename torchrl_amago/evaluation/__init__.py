"""Unbiased evaluation over whole trials, and its statistics.

`evaluate` plays a fixed number of trials per environment row, `evaluator` the trials of one held-out seed
again and again through a run, and `statistics` gives interquartile means and bootstrap intervals.
"""

from torchrl_amago.evaluation.evaluate import TrialResults, evaluate
from torchrl_amago.evaluation.evaluator import HELD_OUT_SEED, BothResults, HeldOut
from torchrl_amago.evaluation.rollout_pictures import rollout_pictures
from torchrl_amago.evaluation.statistics import (
    Interval,
    bootstrap_mean,
    interquartile_mean,
    stratified_bootstrap,
)

__all__ = [
    "HELD_OUT_SEED",
    "BothResults",
    "HeldOut",
    "Interval",
    "TrialResults",
    "bootstrap_mean",
    "evaluate",
    "interquartile_mean",
    "rollout_pictures",
    "stratified_bootstrap",
]
