"""Networks: timestep encoders, trajectory encoders, heads, value codecs, exploration, the policy.

Data flows through the files in this order::

    timestep -> trajectory -> actor, critic -> distributions, value_codec -> exploration

``policy.py`` puts them together, ``build.py`` makes policies and critics from an environment's
specs, ``weights.py`` keeps a policy in a file, and ``export.py`` takes its step out for
torch.export.
"""

from torchrl.objectives import add_random_module

from torchrl_amago.modules.actor import Actor, ActorHead, ActorModule, ResidualActor
from torchrl_amago.modules.build import ACTORS, SEQ_MODELS, make_critic, make_policy
from torchrl_amago.modules.critic import ActionCritic, DiscreteCritic, EnsembleLinear
from torchrl_amago.modules.distributions import (
    DISTRIBUTIONS,
    ClippedCategorical,
    PolicyDistribution,
    make_distribution,
)
from torchrl_amago.modules.exploration import (
    BilevelEpsilonGreedy,
    BilevelGaussian,
    make_exploration,
)
from torchrl_amago.modules.export import PolicyStep
from torchrl_amago.modules.policy import DISCOUNTS, ActionSampler, Encoder, Policy
from torchrl_amago.modules.timestep import (
    TIMESTEP_ENCODERS,
    CategoryEmbedding,
    CNNTimestepEncoder,
    CombinedTimestepEncoder,
    EntryEmbedding,
    GoalEmbedding,
    GridEmbedding,
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
from torchrl_amago.modules.value_codec import HLGauss, PopArt, RunningScale, TwoHot, ValueCodec
from torchrl_amago.modules.weights import load_policy, save_policy

__all__ = [
    "ACTORS", "DISCOUNTS", "DISTRIBUTIONS", "SEQ_MODELS", "TIMESTEP_ENCODERS", "ActionCritic",
    "ActionSampler", "Actor", "ActorHead", "ActorModule", "BilevelEpsilonGreedy", "BilevelGaussian",
    "CNNTimestepEncoder", "CategoryEmbedding", "ClippedCategorical", "CombinedTimestepEncoder",
    "DiscreteCritic", "Encoder", "EnsembleLinear", "EntryEmbedding", "FeedForwardEncoder",
    "GRUEncoder", "GatedLinearAttentionEncoder", "GoalEmbedding", "GridEmbedding", "HLGauss",
    "IdentityEncoder", "ImageEmbedding", "LSTMEncoder", "MLPTimestepEncoder", "MambaEncoder",
    "Policy", "PolicyDistribution", "PolicyStep", "PopArt", "ResidualActor", "RunningScale",
    "TimestepEncoder", "TokenEmbedding", "TrajectoryEncoder", "TransformerEncoder", "TwoHot",
    "ValueCodec", "load_policy", "make_critic", "make_distribution", "make_exploration",
    "make_policy", "make_timestep_encoder", "save_policy",
]  # fmt: skip

# Dropout and shifts are functions here: losses that call encoders under vmap look for modules.
add_random_module(TimestepEncoder)
add_random_module(TrajectoryEncoder)
