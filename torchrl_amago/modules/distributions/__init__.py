"""Distributions over actions of every kind, and the contract that ties them to actor and loss.

``base.py`` is the contract; ``categorical.py``, ``bernoulli.py``, ``squashed.py`` and ``beta.py`` are
the distributions; ``make.py`` chooses one for an action space. Randomness comes from ``_noise.py``.
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
from torchrl_amago.modules.distributions.squashed import (
    SquashedMixture,
    SquashedNormal,
    TanhGaussian,
    TanhMixture,
)

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
