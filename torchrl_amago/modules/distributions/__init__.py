"""Distributions over actions of every kind, and the contract that ties them to actor and loss.

``base.py`` is the contract; ``categorical.py``, ``bernoulli.py``, ``squashed.py`` and ``beta.py``
are the distributions; ``make.py`` chooses one for an action space. Randomness comes from
``_noise.py``.
"""

from torchrl_amago.modules.distributions.base import PolicyDistribution, VectorDistribution
from torchrl_amago.modules.distributions.continuous import Beta, TanhGaussian, TanhMixture
from torchrl_amago.modules.distributions.discrete import (
    Bernoulli,
    ClippedCategorical,
    Discrete,
)
from torchrl_amago.modules.distributions.make import DISTRIBUTIONS, make_distribution

__all__ = [
    "DISTRIBUTIONS",
    "Bernoulli",
    "Beta",
    "ClippedCategorical",
    "Discrete",
    "PolicyDistribution",
    "TanhGaussian",
    "TanhMixture",
    "VectorDistribution",
    "make_distribution",
]
