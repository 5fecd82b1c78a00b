"""Meta-FrozenLake: the task, its distribution of lakes and its exact optimum."""

from torchrl_amago.envs.tasks.frozen_lake.layouts import (
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
    "BayesOptimum", "LakePlanner", "LakeSplit", "MetaFrozenLake", "bayes_optimal_success",
    "enumerate_lakes", "in_split", "is_crossable", "random_lakes",
]  # fmt: skip
