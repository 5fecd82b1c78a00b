"""AMAGO and AMAGO-2: the one loss with a preset's choices, and critics that go with them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from torchrl_amago.modules.build import Preset, is_robust, make_critic
from torchrl_amago.modules.policy import Policy
from torchrl_amago.modules.value_codec import HLGauss, PopArt, RunningScale, TwoHot, ValueCodec
from torchrl_amago.objectives.amago import AMAGOLoss


def amago_loss(
    policy: Policy,
    *,
    preset: Preset = "robust",
    value_codec: ValueCodec | None = None,
    critic_options: dict[str, Any] | None = None,
    **options: Any,
) -> AMAGOLoss:
    """Build AMAGO's loss (arXiv 2310.09971): regression, mostly by the policy gradient.

    Critics list the values of a single discrete action, and take actions of any other space.

    Args:
        preset: "paper" for the published :class:`PopArt` and plain critics; "robust" has
            :class:`RunningScale`, normalises the critics' first layer, and has an entropy bonus.
        value_codec: default the preset's.
        critic_options: arguments of :func:`~torchrl_amago.modules.build.make_critic`.
        options: further arguments of :class:`AMAGOLoss`, whose defaults are AMAGO's.

    Example:
        >>> from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> loss = amago_loss(make_policy(env, context_length=45))
        >>> loss.takes_actions, loss.online_coeff
        (False, 1.0)
    """
    robust = is_robust(preset)
    codec = value_codec or (RunningScale if robust else PopArt)(len(policy.discounts))
    critic_options = {"norm": "first" if robust else "none", **(critic_options or {})}
    critic = make_critic(policy, value_codec=codec, **critic_options)
    return AMAGOLoss(policy, critic, codec, **{"entropy_coeff": 0.3 * robust, **options})


def amago2_loss(
    policy: Policy,
    *,
    preset: Preset = "robust",
    value_codec: ValueCodec | None = None,
    critic_options: dict[str, Any] | None = None,
    **options: Any,
) -> AMAGOLoss:
    """Build AMAGO-2's loss (arXiv 2411.11188): classification critics and filtered imitation.

    Defaults are ``online_coeff=0``, ``offline_coeff=1`` and ``num_policy_actions=3``. Arguments:
    see :func:`amago_loss`.

    Args:
        preset: "paper" for the published :class:`TwoHot` codec over returns of up to 100,000 (times
            ``reward_scale``), for tasks of different scales at once, and critics that take actions;
            "robust" has few bins whose range follows the returns' scale, and critics that tell
            actions apart (``docs/value_codecs.md``): they list the values of a discrete action.

    Example:
        >>> from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> loss = amago2_loss(make_policy(env, context_length=45))
        >>> loss.takes_actions, loss.online_coeff
        (False, 0.0)
    """
    lists = is_robust(preset) and policy.distribution.space.kind == "discrete"
    critic_options = {"takes_actions": not lists, "norm": "none", **(critic_options or {})}
    make_codec = TwoHot
    if is_robust(preset):
        bins = dict(num_bins=9, min_return=-3.0, max_return=3.0, symlog=False, init_slope=10.0)
        make_codec = partial(HLGauss, **bins, relative=True)
        if critic_options["takes_actions"]:
            critic_options.setdefault("action_gain", 8.0)
    return amago_loss(
        policy,
        preset=preset,
        value_codec=value_codec or make_codec(len(policy.discounts)),
        critic_options=critic_options,
        **{"online_coeff": 0.0, "offline_coeff": 1.0, "num_policy_actions": 3, **options},
    )


LOSSES: dict[str, Callable[..., AMAGOLoss]] = {"amago": amago_loss, "amago2": amago2_loss}
"""Losses by name; each takes ``(policy, critic_options=..., **options)``."""
