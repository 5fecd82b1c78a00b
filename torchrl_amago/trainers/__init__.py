"""The training loop: collect, update, evaluate, log, checkpoint, resume (docs/training.md)."""

from torchrl_amago.modules.weights import load_policy
from torchrl_amago.progress import ProgressTable, read_progress
from torchrl_amago.trainers._components import Intervals
from torchrl_amago.trainers.amago import AMAGOTrainer
from torchrl_amago.trainers.build import make_trainer
from torchrl_amago.trainers.checkpoint import check_no_existing_run
from torchrl_amago.trainers.hooks import EvaluationHook, TrialMonitor
from torchrl_amago.trainers.nonfinite import NonFiniteError
from torchrl_amago.trainers.optim import FiniteOptimizationStepper, make_optimizer, make_schedule
from torchrl_amago.trainers.report import CLOCK_COLUMNS

__all__ = [
    "CLOCK_COLUMNS", "AMAGOTrainer", "EvaluationHook", "FiniteOptimizationStepper", "Intervals",
    "NonFiniteError", "ProgressTable", "TrialMonitor", "check_no_existing_run", "load_policy",
    "make_optimizer", "make_schedule", "make_trainer", "read_progress",
]  # fmt: skip
