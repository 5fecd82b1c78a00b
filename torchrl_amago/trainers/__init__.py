"""The training loop: collect, update, evaluate, log, checkpoint, resume.

``amago`` has the loop, ``build`` what it takes around a policy, ``hooks`` one optimiser step and
what is read off collected trials, ``optim`` the optimiser, ``nonfinite`` the guard against NaN,
``logging`` and ``report`` what a run tells, ``run_state`` what a run is made of, ``checkpoint`` how
it is kept on disk, ``policy_files`` the trained policy, ``replacing`` how files change in one step,
``interrupt`` what Ctrl-C does, and ``command_line`` the settings of a training script.
"""

from torchrl_amago.trainers.amago import AMAGOTrainer
from torchrl_amago.trainers.build import make_trainer
from torchrl_amago.trainers.checkpoint import CheckpointStore, refuse_existing_run
from torchrl_amago.trainers.command_line import (
    TrainingArgs,
    run_command_line,
    train_and_evaluate,
)
from torchrl_amago.trainers.hooks import (
    AMAGOOptimizationStepper,
    TrialMonitor,
    evaluation_metrics,
)
from torchrl_amago.trainers.logging import (
    CLOCK_COLUMNS,
    MetricWindow,
    ProgressTable,
    make_logger,
    read_progress,
)
from torchrl_amago.trainers.nonfinite import NonFiniteError
from torchrl_amago.trainers.optim import decays, make_optimizer, make_schedule
from torchrl_amago.trainers.policy_files import PolicyFiles, load_policy
from torchrl_amago.trainers.report import RunReport
from torchrl_amago.trainers.run_state import describe_architecture

__all__ = [
    "CLOCK_COLUMNS",
    "AMAGOOptimizationStepper",
    "AMAGOTrainer",
    "CheckpointStore",
    "MetricWindow",
    "NonFiniteError",
    "PolicyFiles",
    "ProgressTable",
    "RunReport",
    "TrainingArgs",
    "TrialMonitor",
    "decays",
    "describe_architecture",
    "evaluation_metrics",
    "load_policy",
    "make_logger",
    "make_optimizer",
    "make_schedule",
    "make_trainer",
    "read_progress",
    "refuse_existing_run",
    "run_command_line",
    "train_and_evaluate",
]
