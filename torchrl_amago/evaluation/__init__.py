"""What an agent can do: unbiased evaluation, its statistics, and the pictures of both.

`evaluate` plays a fixed number of whole trials per environment row, `held_out` those of one seed again
and again through a run; `statistics` gives interquartile means and bootstrap intervals; `plots`
draws learning curves, adaptation curves and trials.
"""

from torchrl_amago.evaluation.evaluate import TrialResults, evaluate
from torchrl_amago.evaluation.held_out import HELD_OUT_SEED, BothResults, HeldOut
from torchrl_amago.evaluation.plots import (
    plot_adaptation_curve,
    plot_learning_curve,
    plot_trial_strip,
)
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
    "plot_adaptation_curve",
    "plot_learning_curve",
    "plot_trial_strip",
    "rollout_pictures",
    "stratified_bootstrap",
]
