"""What an actor's parameters mean: distributions over actions of every kind.

``base.py`` is the contract; ``categorical.py``, ``bernoulli.py``, ``tanh_gaussian.py``, ``beta.py``
and ``tanh_mixture.py`` are the distributions; ``make.py`` chooses one for an action space.
Randomness comes from ``noise.py``.
"""

from torchrl_amago.modules.distributions.base import (
    PolicyDistribution,
    StoredActions,
    VectorDistribution,
)
from torchrl_amago.modules.distributions.bernoulli import Bernoulli, Bits
from torchrl_amago.modules.distributions.beta import Beta, StretchedBeta
from torchrl_amago.modules.distributions.bounds import softplus_bounded, tanh_bounded
from torchrl_amago.modules.distributions.categorical import (
    CLIP_HIGH,
    CLIP_LOW,
    ClippedCategorical,
    Discrete,
    OneHotParts,
    clip_probabilities,
    clipped_softmax,
)
from torchrl_amago.modules.distributions.make import DISTRIBUTIONS, make_distribution
from torchrl_amago.modules.distributions.tanh_gaussian import SquashedNormal, TanhGaussian
from torchrl_amago.modules.distributions.tanh_mixture import SquashedMixture, TanhMixture

__all__ = [
    "CLIP_HIGH",
    "CLIP_LOW",
    "DISTRIBUTIONS",
    "Bernoulli",
    "Beta",
    "Bits",
    "ClippedCategorical",
    "Discrete",
    "OneHotParts",
    "PolicyDistribution",
    "SquashedMixture",
    "SquashedNormal",
    "StoredActions",
    "StretchedBeta",
    "TanhGaussian",
    "TanhMixture",
    "VectorDistribution",
    "clip_probabilities",
    "clipped_softmax",
    "make_distribution",
    "softplus_bounded",
    "tanh_bounded",
]
