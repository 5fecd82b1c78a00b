"""Meta Frozen Lake: the task, its layouts, its exact optimum and its pictures."""

from torchrl_amago.envs.tasks.frozen_lake.layouts import (
    LAKE_SPLITS,
    LakeSplit,
    enumerate_lakes,
    in_split,
    is_crossable,
    random_lakes,
)
from torchrl_amago.envs.tasks.frozen_lake.planner import (
    BayesOptimum,
    LakePlanner,
    bayes_optimal_success,
)
from torchrl_amago.envs.tasks.frozen_lake.task import MetaFrozenLake

__all__ = [
    "LAKE_SPLITS",
    "BayesOptimum",
    "LakePlanner",
    "LakeSplit",
    "MetaFrozenLake",
    "bayes_optimal_success",
    "enumerate_lakes",
    "in_split",
    "is_crossable",
    "random_lakes",
]
