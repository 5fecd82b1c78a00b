"""Distributions over actions of every kind, and the contract that ties them to actor and loss."""

from __future__ import annotations

from typing import Any

from torchrl_amago._validation import check_choice
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules.distributions.base import PolicyDistribution, VectorDistribution
from torchrl_amago.modules.distributions.continuous import Beta, TanhGaussian, TanhMixture
from torchrl_amago.modules.distributions.discrete import Bernoulli, ClippedCategorical, Discrete

__all__ = [
    "DISTRIBUTIONS", "Bernoulli", "Beta", "ClippedCategorical", "Discrete", "PolicyDistribution",
    "TanhGaussian", "TanhMixture", "VectorDistribution", "make_distribution",
]  # fmt: skip

DISTRIBUTIONS: dict[str, type[PolicyDistribution]] = {
    "discrete": Discrete,
    "bernoulli": Bernoulli,
    "tanh_gaussian": TanhGaussian,
    "beta": Beta,
    "tanh_mixture": TanhMixture,
}
"""Policy distributions by name; the first that fits a space is its default."""


def make_distribution(
    space: ActionSpace, name: str | None = None, **options: Any
) -> PolicyDistribution:
    """Build a policy distribution that fits an action space.

    Args:
        space: the actions.
        name: one of :data:`DISTRIBUTIONS`; default clipped categoricals for discrete actions, bits
            for multi-binary ones, a squashed Gaussian for continuous ones. ValueError for others.
        options: further arguments of the distribution.

    Example:
        >>> from torchrl.data import Bounded
        >>> space = ActionSpace.from_spec(Bounded(-1.0, 1.0, shape=(3,)))
        >>> make_distribution(space, "tanh_mixture", num_modes=2).num_params
        14
    """
    fitting = [key for key, cls in DISTRIBUTIONS.items() if space.kind in cls.kinds]
    name = fitting[0] if name is None else name
    check_choice(f"the distribution of {space.kind} actions", name, fitting)
    return DISTRIBUTIONS[name](space, **options)
