"""Adaptive agents with long memory, as TorchRL components (AMAGO, arXiv 2310.09971).

The flow, each arrow a tensordict (``torchrl_amago.keys`` lists every entry)::

    env (batched)                   policy (one object for collector, evaluator and loss)
    task -> trial of k attempts --> TimestepEncoder -> TrajectoryEncoder -> Actor -> discount -> sample
         -> previous step, time         "timestep"         "state"          one distribution each
                                                              |
    Collector (whole trials) -> replay buffer -> slices [B, T] + mask -> AMAGOLoss -> optimiser
"""

from torchrl_amago.data import TrialCollector, TrialSliceSampler, make_trial_buffer
from torchrl_amago.envs import (
    DarkKeyDoor,
    MetaFrozenLake,
    PreviousStepTransform,
    TMaze,
    TrialTransform,
    bayes_optimal_success,
    make_trial_env,
)
from torchrl_amago.evaluation import (
    HELD_OUT_SEED,
    HeldOut,
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
    TIMESTEP_ENCODERS,
    Actor,
    BilevelEpsilonGreedy,
    CategoryEmbedding,
    ClippedCategorical,
    CNNTimestepEncoder,
    CombinedTimestepEncoder,
    DiscreteCritic,
    EntryEmbedding,
    FeedForwardEncoder,
    GatedLinearAttentionEncoder,
    GoalEmbedding,
    GRUEncoder,
    IdentityEncoder,
    ImageEmbedding,
    LSTMEncoder,
    MambaEncoder,
    MLPTimestepEncoder,
    Policy,
    PopArt,
    TimestepEncoder,
    TokenEmbedding,
    TrajectoryEncoder,
    TransformerEncoder,
    ValueCodec,
    make_critic,
    make_policy,
    make_timestep_encoder,
)
from torchrl_amago.objectives import AMAGOLoss
from torchrl_amago.trainers import (
    AMAGOTrainer,
    TrainingArgs,
    make_optimizer,
    make_trainer,
    run_command_line,
)

__version__ = "0.1.0"

__all__ = [
    "DISCOUNTS",
    "HELD_OUT_SEED",
    "SEQ_MODELS",
    "TIMESTEP_ENCODERS",
    "AMAGOLoss",
    "AMAGOTrainer",
    "Actor",
    "BilevelEpsilonGreedy",
    "CNNTimestepEncoder",
    "CategoryEmbedding",
    "ClippedCategorical",
    "CombinedTimestepEncoder",
    "DarkKeyDoor",
    "DiscreteCritic",
    "EntryEmbedding",
    "FeedForwardEncoder",
    "GRUEncoder",
    "GatedLinearAttentionEncoder",
    "GoalEmbedding",
    "HeldOut",
    "IdentityEncoder",
    "ImageEmbedding",
    "LSTMEncoder",
    "MLPTimestepEncoder",
    "MambaEncoder",
    "MetaFrozenLake",
    "Policy",
    "PopArt",
    "PreviousStepTransform",
    "TMaze",
    "TimestepEncoder",
    "TokenEmbedding",
    "TrainingArgs",
    "TrajectoryEncoder",
    "TransformerEncoder",
    "TrialCollector",
    "TrialResults",
    "TrialSliceSampler",
    "TrialTransform",
    "ValueCodec",
    "bayes_optimal_success",
    "evaluate",
    "make_critic",
    "make_optimizer",
    "make_policy",
    "make_timestep_encoder",
    "make_trainer",
    "make_trial_buffer",
    "make_trial_env",
    "plot_adaptation_curve",
    "plot_learning_curve",
    "plot_trial_strip",
    "rollout_pictures",
    "run_command_line",
]
