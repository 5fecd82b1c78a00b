"""AMAGO and AMAGO-2: the one loss with the published choices, and the critics that go with them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torchrl_amago.modules.build import make_critic
from torchrl_amago.modules.policy import Policy
from torchrl_amago.modules.value_codec import PopArt, TwoHot, ValueCodec
from torchrl_amago.objectives.amago import AMAGOLoss


def amago_loss(
    policy: Policy,
    *,
    value_codec: ValueCodec | None = None,
    critic_options: dict[str, Any] | None = None,
    **options: Any,
) -> AMAGOLoss:
    """Build AMAGO's loss (arXiv 2310.09971): PopArt regression, mostly by the policy gradient.

    Critics list the values of a single discrete action, and take actions of any other space.

    Args:
        value_codec: default :class:`PopArt`.
        critic_options: arguments of :func:`~torchrl_amago.modules.build.make_critic`.
        options: further arguments of :class:`AMAGOLoss`, whose defaults are AMAGO's.

    Example:
        >>> from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> loss = amago_loss(make_policy(env, context_length=45))
        >>> loss.takes_actions, loss.online_coeff
        (False, 1.0)
    """
    codec = value_codec if value_codec is not None else PopArt(len(policy.discounts))
    critic = make_critic(policy, value_codec=codec, **(critic_options or {}))
    return AMAGOLoss(policy, critic, codec, **options)


def amago2_loss(
    policy: Policy,
    *,
    value_codec: ValueCodec | None = None,
    critic_options: dict[str, Any] | None = None,
    **options: Any,
) -> AMAGOLoss:
    """Build AMAGO-2's loss (arXiv 2411.11188): classification critics and filtered imitation.

    It suits tasks whose returns differ in scale. Critics take actions. Defaults are
    ``online_coeff=0``, ``offline_coeff=1``, ``num_policy_actions=3`` and a :class:`TwoHot` codec
    over returns of up to 100,000 (times ``reward_scale``). Arguments: see :func:`amago_loss`.

    Example:
        >>> from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> loss = amago2_loss(make_policy(env, context_length=45))
        >>> loss.takes_actions, loss.online_coeff
        (True, 0.0)
    """
    return amago_loss(
        policy,
        value_codec=value_codec if value_codec is not None else TwoHot(len(policy.discounts)),
        critic_options={"takes_actions": True, **(critic_options or {})},
        **{"online_coeff": 0.0, "offline_coeff": 1.0, "num_policy_actions": 3, **options},
    )


LOSSES: dict[str, Callable[..., AMAGOLoss]] = {"amago": amago_loss, "amago2": amago2_loss}
"""Losses by name; each takes ``(policy, critic_options=..., **options)``."""
