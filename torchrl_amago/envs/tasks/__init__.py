"""Tasks that need memory, written as natively batched TorchRL environments.

``MetaFrozenLake`` is the first example's task. ``bayes_optimal_success`` says how well the best
possible agent does on it, which is what learned agents are measured against.
"""

from __future__ import annotations

from torchrl_amago.envs.tasks.frozen_lake import MetaFrozenLake
from torchrl_amago.envs.tasks.frozen_lake_drawing import draw_lake
from torchrl_amago.envs.tasks.frozen_lake_layouts import (
    LAKE_SPLITS,
    LakeSplit,
    enumerate_lakes,
    in_split,
    is_crossable,
    random_lakes,
)
from torchrl_amago.envs.tasks.frozen_lake_planner import (
    BayesOptimum,
    LakePlanner,
    bayes_optimal_success,
)

__all__ = [
    "LAKE_SPLITS",
    "BayesOptimum",
    "LakePlanner",
    "LakeSplit",
    "MetaFrozenLake",
    "bayes_optimal_success",
    "draw_lake",
    "enumerate_lakes",
    "in_split",
    "is_crossable",
    "random_lakes",
]
