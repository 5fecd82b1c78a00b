"""Networks: timestep encoders, trajectory encoders, heads, value codecs, exploration, the policy.

Data flows through the files in this order::

    timestep -> trajectory -> actor, critic -> distributions, value_codec -> exploration
    policy assembles them from an environment's specs
"""

from torchrl_amago.modules.actor import Actor
from torchrl_amago.modules.critic import DiscreteCritic, EnsembleLinear
from torchrl_amago.modules.distributions import ClippedCategorical, ClippedOneHotCategorical
from torchrl_amago.modules.exploration import BilevelEpsilonGreedy
from torchrl_amago.modules.policy import (
    DISCOUNTS,
    SEQ_MODELS,
    Policy,
    SelectDiscount,
    make_critic,
    make_policy,
)
from torchrl_amago.modules.timestep import (
    TIMESTEP_ENCODERS,
    CategoryEmbedding,
    CNNTimestepEncoder,
    CombinedTimestepEncoder,
    EntryEmbedding,
    GoalEmbedding,
    ImageEmbedding,
    MLPTimestepEncoder,
    TimestepEncoder,
    TokenEmbedding,
    make_timestep_encoder,
)
from torchrl_amago.modules.trajectory import (
    FeedForwardEncoder,
    GatedLinearAttentionEncoder,
    GRUEncoder,
    IdentityEncoder,
    LSTMEncoder,
    MambaEncoder,
    TrajectoryEncoder,
    TransformerEncoder,
)
from torchrl_amago.modules.value_codec import HLGauss, PopArt, TwoHot, ValueCodec

__all__ = [
    "DISCOUNTS",
    "SEQ_MODELS",
    "TIMESTEP_ENCODERS",
    "Actor",
    "BilevelEpsilonGreedy",
    "CNNTimestepEncoder",
    "CategoryEmbedding",
    "ClippedCategorical",
    "ClippedOneHotCategorical",
    "CombinedTimestepEncoder",
    "DiscreteCritic",
    "EnsembleLinear",
    "EntryEmbedding",
    "FeedForwardEncoder",
    "GRUEncoder",
    "GatedLinearAttentionEncoder",
    "GoalEmbedding",
    "HLGauss",
    "IdentityEncoder",
    "ImageEmbedding",
    "LSTMEncoder",
    "MLPTimestepEncoder",
    "MambaEncoder",
    "Policy",
    "PopArt",
    "SelectDiscount",
    "TimestepEncoder",
    "TokenEmbedding",
    "TrajectoryEncoder",
    "TransformerEncoder",
    "TwoHot",
    "ValueCodec",
    "make_critic",
    "make_policy",
    "make_timestep_encoder",
]
