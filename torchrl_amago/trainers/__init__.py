"""The training loop: collect, update, evaluate, log, checkpoint, resume.

``amago`` has the loop, ``build`` everything around a policy that it needs, ``update`` one optimiser
step, ``optim`` optimiser and schedule, ``nonfinite`` the guard against NaN, ``monitor`` the counts
of collected trials, ``progress`` and ``report`` table, terminal and loggers, ``hooks`` the same for a
stock trainer, ``parts`` the parts of a run's state, ``checkpoint``, ``policy_files`` and
``state_file`` their files, ``signals`` stopping in good order.
"""

from torchrl_amago.trainers.amago import AMAGOTrainer, Intervals
from torchrl_amago.trainers.build import make_trainer
from torchrl_amago.trainers.checkpoint import (
    CheckpointStore,
    describe_architecture,
    refuse_existing_run,
)
from torchrl_amago.trainers.hooks import EvaluationHook
from torchrl_amago.trainers.monitor import TrialMonitor
from torchrl_amago.trainers.nonfinite import NonFiniteError
from torchrl_amago.trainers.optim import decays, make_optimizer, make_schedule
from torchrl_amago.trainers.parts import Components
from torchrl_amago.trainers.policy_files import PolicyFiles, load_policy
from torchrl_amago.trainers.progress import CLOCK_COLUMNS, ProgressTable, read_progress
from torchrl_amago.trainers.report import (
    MetricWindow,
    RunReport,
    evaluation_metrics,
    make_logger,
)
from torchrl_amago.trainers.state_file import load_state, save_state
from torchrl_amago.trainers.update import FiniteOptimizationStepper

__all__ = [
    "CLOCK_COLUMNS",
    "AMAGOTrainer",
    "CheckpointStore",
    "Components",
    "EvaluationHook",
    "FiniteOptimizationStepper",
    "Intervals",
    "MetricWindow",
    "NonFiniteError",
    "PolicyFiles",
    "ProgressTable",
    "RunReport",
    "TrialMonitor",
    "decays",
    "describe_architecture",
    "evaluation_metrics",
    "load_policy",
    "load_state",
    "make_logger",
    "make_optimizer",
    "make_schedule",
    "make_trainer",
    "read_progress",
    "refuse_existing_run",
    "save_state",
]
