"""Adaptive agents with long memory, as TorchRL components (AMAGO, arXiv 2310.09971).

The flow, each arrow a tensordict (``torchrl_amago.keys`` lists every entry)::

    env (batched)                   policy (one object for collector, evaluator and loss)
    task -> trial of k episodes --> TimestepEncoder -> TrajectoryEncoder -> Actor -> sample
         -> previous step, time         "timestep"         "state"      of each discount
                                                              |
    Collector (whole trials) -> replay buffer -> slices [B, T] + mask -> AMAGOLoss -> optimiser
"""

from torchrl_amago.data import (
    GoalSequenceRelabel,
    HindsightRelabel,
    Relabel,
    TrialCollector,
    TrialMixture,
    TrialSliceSampler,
    make_trial_buffer,
)
from torchrl_amago.envs import (
    DarkKeyDoor,
    MazeRunner,
    MetaFrozenLake,
    PreviousStepTransform,
    TMaze,
    TrialTransform,
    make_trial_env,
)
from torchrl_amago.evaluation import HeldOutEvaluator, evaluate
from torchrl_amago.modules import (
    CNNTimestepEncoder,
    CombinedTimestepEncoder,
    FeedForwardEncoder,
    GatedLinearAttentionEncoder,
    GRUEncoder,
    HLGauss,
    LSTMEncoder,
    MambaEncoder,
    MLPTimestepEncoder,
    Policy,
    PopArt,
    TimestepEncoder,
    TrajectoryEncoder,
    TransformerEncoder,
    TwoHot,
    load_policy,
    make_critic,
    make_policy,
)
from torchrl_amago.objectives import AMAGOLoss, amago2_loss, amago_loss
from torchrl_amago.rows import split_trials
from torchrl_amago.trainers import AMAGOTrainer, make_optimizer, make_trainer

__version__ = "0.1.0"

__all__ = [
    "AMAGOLoss", "AMAGOTrainer", "CNNTimestepEncoder", "CombinedTimestepEncoder", "DarkKeyDoor",
    "FeedForwardEncoder", "GRUEncoder", "GatedLinearAttentionEncoder", "GoalSequenceRelabel",
    "HLGauss", "HeldOutEvaluator", "HindsightRelabel", "LSTMEncoder", "MLPTimestepEncoder",
    "MambaEncoder", "MazeRunner", "MetaFrozenLake", "Policy", "PopArt", "PreviousStepTransform",
    "Relabel", "TMaze", "TimestepEncoder", "TrajectoryEncoder", "TransformerEncoder",
    "TrialCollector", "TrialMixture", "TrialSliceSampler", "TrialTransform", "TwoHot",
    "amago2_loss", "amago_loss", "evaluate", "load_policy", "make_critic", "make_optimizer",
    "make_policy", "make_trainer", "make_trial_buffer", "make_trial_env", "split_trials",
]  # fmt: skip
