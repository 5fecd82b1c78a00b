"""Adaptive agents with long memory, as TorchRL components (AMAGO, arXiv 2310.09971).

The flow, each arrow a tensordict (``torchrl_amago.keys`` lists every entry)::

    env (batched)                   policy (one object for collector, evaluator and loss)
    task -> trial of k attempts --> TimestepEncoder -> TrajectoryEncoder -> Actor -> discount -> sample
         -> previous step, time         "timestep"         "state"          one distribution each
                                                              |
    Collector (whole trials) -> replay buffer -> slices [B, T] + mask -> AMAGOLoss -> optimiser
"""

from torchrl_amago.data import TrialSliceSampler, make_trial_buffer
from torchrl_amago.envs import (
    MetaFrozenLake,
    PreviousStepTransform,
    TrialTransform,
    bayes_optimal_success,
    make_trial_env,
)
from torchrl_amago.evaluation import (
    TrialResults,
    evaluate,
    plot_adaptation_curve,
    plot_learning_curve,
    plot_trial_strip,
    rollout_pictures,
)
from torchrl_amago.modules import (
    DISCOUNTS,
    SEQ_MODELS,
    Actor,
    BilevelEpsilonGreedy,
    ClippedCategorical,
    DiscreteCritic,
    MLPTimestepEncoder,
    Policy,
    PopArt,
    TimestepEncoder,
    TrajectoryEncoder,
    TransformerEncoder,
    ValueCodec,
    make_critic,
    make_policy,
)
from torchrl_amago.objectives import AMAGOLoss
from torchrl_amago.trainers import AMAGOTrainer, make_optimizer

__version__ = "0.1.0"

__all__ = [
    "DISCOUNTS",
    "SEQ_MODELS",
    "AMAGOLoss",
    "AMAGOTrainer",
    "Actor",
    "BilevelEpsilonGreedy",
    "ClippedCategorical",
    "DiscreteCritic",
    "MLPTimestepEncoder",
    "MetaFrozenLake",
    "Policy",
    "PopArt",
    "PreviousStepTransform",
    "TimestepEncoder",
    "TrajectoryEncoder",
    "TransformerEncoder",
    "TrialResults",
    "TrialSliceSampler",
    "TrialTransform",
    "ValueCodec",
    "bayes_optimal_success",
    "evaluate",
    "make_critic",
    "make_optimizer",
    "make_policy",
    "make_trial_buffer",
    "make_trial_env",
    "plot_adaptation_curve",
    "plot_learning_curve",
    "plot_trial_strip",
    "rollout_pictures",
]
