"""What changes a loss's function and no shape of a weight tells, for checkpoints to keep and compare."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from functools import partial

from torchrl_amago.modules.distributions import PolicyDistribution

Setting = str | float | int | bool | list[float] | None

#: Attributes of the loss that are settings under their own name.
PLAIN = (
    "num_target_critics",
    "target_reduction",
    "n_step",
    "reward_scale",
    "online_coeff",
    "offline_coeff",
    "critic_coeff",
    "filter_space",
    "num_target_actions",
    "num_policy_actions",
    "use_target_actor",
    "soften_actions",
    "use_prioritized_weights",
    "reduction",
)


def name_of(function: Callable | None) -> str | None:
    """A function's name, with the arguments that a partial one is given.

    Example:
        >>> name_of(partial(max, default=3.0))
        'max(default=3.0)'
    """
    if function is None:
        return None
    if isinstance(function, partial):
        given = [*map(repr, function.args), *(f"{k}={v!r}" for k, v in function.keywords.items())]
        return f"{name_of(function.func)}({', '.join(given)})"
    return getattr(function, "__qualname__", type(function).__qualname__)


def distribution_settings(distribution: PolicyDistribution) -> dict[str, Setting]:
    """Kind of a distribution and its numbers, without the space.

    Example:
        >>> from torchrl.data import Categorical
        >>> from torchrl_amago.action_space import ActionSpace
        >>> from torchrl_amago.modules.distributions import Discrete
        >>> distribution_settings(Discrete(ActionSpace.from_spec(Categorical(3))))["clip_low"]
        0.001
    """
    numbers = {field.name: getattr(distribution, field.name) for field in fields(distribution)}
    del numbers["space"]
    return {"kind": type(distribution).__name__, **numbers}
