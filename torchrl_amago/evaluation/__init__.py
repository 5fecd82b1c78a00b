"""Unbiased evaluation over whole trials, and its statistics."""

from torchrl_amago.evaluation.evaluate import evaluate
from torchrl_amago.evaluation.evaluator import (
    HELD_OUT_SEED,
    Evaluator,
    HeldOutEvaluator,
    run_evaluator,
)
from torchrl_amago.evaluation.results import (
    EvaluationResults,
    Results,
    TrialResults,
    evaluation_metrics,
)
from torchrl_amago.evaluation.rollout_pictures import rollout_pictures
from torchrl_amago.evaluation.statistics import Interval, bootstrap_mean, interquartile_mean

__all__ = [
    "HELD_OUT_SEED", "EvaluationResults", "Evaluator", "HeldOutEvaluator", "Interval", "Results",
    "TrialResults", "bootstrap_mean", "evaluate", "evaluation_metrics", "interquartile_mean",
    "rollout_pictures", "run_evaluator",
]  # fmt: skip
