"""The training loop: collect, update, evaluate, log, checkpoint, resume.

``amago`` has the loop, ``hooks`` one optimiser step and what is read off collected trials,
``optim`` the optimiser, ``nonfinite`` the guard against NaN, ``logging`` what a run tells, and
``checkpoint`` how it is kept.
"""

from torchrl_amago.trainers.amago import AMAGOTrainer, refuse_existing_run, summarize
from torchrl_amago.trainers.checkpoint import CheckpointStore, describe_architecture
from torchrl_amago.trainers.hooks import AMAGOOptimizationStepper, TrialMonitor
from torchrl_amago.trainers.logging import (
    CLOCK_COLUMNS,
    MetricWindow,
    ProgressTable,
    make_logger,
    read_progress,
)
from torchrl_amago.trainers.nonfinite import NonFiniteError
from torchrl_amago.trainers.optim import decays, make_optimizer, make_warmup

__all__ = [
    "CLOCK_COLUMNS",
    "AMAGOOptimizationStepper",
    "AMAGOTrainer",
    "CheckpointStore",
    "MetricWindow",
    "NonFiniteError",
    "ProgressTable",
    "TrialMonitor",
    "decays",
    "describe_architecture",
    "make_logger",
    "make_optimizer",
    "make_warmup",
    "read_progress",
    "refuse_existing_run",
    "summarize",
]
