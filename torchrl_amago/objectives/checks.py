"""What the loss refuses, and what to do about it."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import get_args

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_amago.action_space import ActionSpace
from torchrl_amago.choice import check_choice
from torchrl_amago.modules.distributions import PolicyDistribution
from torchrl_amago.modules.value_codec import ValueCodec
from torchrl_amago.objectives.critics import ValueSpace
from torchrl_amago.objectives.functional import FILTERS

_CHOICES = {
    "target_reduction": ("min", "mean"),
    "filter_space": get_args(ValueSpace),
    "reduction": ("mean", "sum", "none"),
}


def check_words(**words: str) -> None:
    """Refuse words that choose nothing, by the argument's name."""
    for name, word in words.items():
        check_choice(name, word, _CHOICES[name])


def check_weighting(use_prioritized_weights: object) -> None:
    """Refuse what is neither a choice nor left to the batch."""
    if use_prioritized_weights not in (True, False, "auto"):
        raise ValueError(
            f"use_prioritized_weights must be True, False or 'auto', got {use_prioritized_weights!r}. "
            "Use 'auto' where in doubt."
        )


def check_scales(reward_scale: float, **coefficients: float) -> None:
    """Refuse factors that turn a term of the loss round, or rewards into nothing."""
    for name, value in coefficients.items():
        if not value >= 0:
            raise ValueError(f"{name} must be 0 or more, got {value}. Use 0 to leave its term out.")
    if not reward_scale > 0:
        raise ValueError(
            f"reward_scale must be above 0, got {reward_scale}. Use 1 for rewards as they are; "
            "metrics are divided by it."
        )


def check_filter(advantage_filter: object) -> None:
    """Refuse the name of a filter that there isn't."""
    if isinstance(advantage_filter, str) and advantage_filter not in FILTERS:
        raise ValueError(
            f"advantage_filter must be one of {sorted(FILTERS)}, a function or None, got "
            f"{advantage_filter!r}."
        )


def check_critics(
    critic_network: TensorDictModuleBase,
    num_target_critics: int,
    distribution: PolicyDistribution,
    takes_actions: bool,
    online: bool,
) -> None:
    """Refuse critics that don't go with the policy's actions or with the number drawn."""
    size = getattr(getattr(critic_network, "module", None), "num_critics", None)
    if size is not None and num_target_critics > size:
        raise ValueError(
            f"num_target_critics must be at most the size of the ensemble, got {num_target_critics} of "
            f"{size} critics. Draw fewer, or build the ensemble with more num_critics."
        )
    kind = distribution.space.kind
    if not takes_actions and kind != "discrete":
        raise ValueError(
            f"critics that list the values of all actions need a single discrete action, got a {kind} "
            "space. Use make_critic(policy, takes_actions=True)."
        )
    if takes_actions and online and not distribution.differentiable:
        raise ValueError(
            f"the online actor term needs samples with a gradient, which {type(distribution).__name__} "
            "doesn't have. Set online_coeff=0, or choose another distribution."
        )


def check_same_discounts(
    discounts: Sequence[float],
    actor_network: TensorDictModuleBase,
    critic_network: TensorDictModuleBase,
    codec: ValueCodec,
) -> None:
    """Refuse parts for other discounts: of one discount, shapes would fit all the same.

    Modules of a user's own that don't tell their number are left alone.
    """
    actor, critic = (getattr(net, "module", None) for net in (actor_network, critic_network))
    critic_G = getattr(critic, "discounts", None)
    critic_number = None if critic_G is None else len(critic_G)
    mu_G = getattr(getattr(codec, "popart", codec), "mu", None)
    numbers = {
        "the actor has": getattr(actor, "num_discounts", None),
        "the critics have": getattr(critic, "num_discounts", critic_number),
        "the value codec has": len(mu_G) if isinstance(mu_G, Tensor) and mu_G.ndim else None,
    }
    others = [
        f"{who} {number}" for who, number in numbers.items() if number not in (None, len(discounts))
    ]
    if not others and isinstance(critic_G, Tensor):
        given_G = torch.tensor(discounts, dtype=torch.float32).to(critic_G)
        if not torch.equal(given_G, critic_G):
            others = [f"the critics read {tuple(round(g, 6) for g in critic_G.tolist())}"]
    if others:
        raise ValueError(
            f"the loss, actor, critics and value codec must be for the same discounts; the loss got "
            f"{tuple(discounts)}, {', '.join(others)}. Give discounts=policy.discounts, and build the "
            "other parts from that policy."
        )


def check_batch_size(shape: torch.Size) -> None:
    """Refuse batches that aren't rows of steps."""
    if len(shape) != 2:
        steps = shape[-1] if len(shape) else "T"
        raise ValueError(
            f"the loss reads batches [B, T], a row for each slice of a trial, got the batch size "
            f"{list(shape)}. Use batch.reshape(-1, {steps})."
        )


def check_rows(mask_BT: Tensor, is_init: Tensor | None) -> None:
    """Refuse rows of which the loss would read wrong states; warn where no step is real.

    States are read at a row's first root, then at what every step led to: the root of any later step
    is taken for what the step before led to.

    Args:
        mask_BT: True on real steps.
        is_init: where a trial begins, of any shape that has a number per step; None if unknown.
    """
    behind_BT = mask_BT[:, 1:] & ~mask_BT[:, :-1]
    begins_BT = mask_BT[:, :0]
    if is_init is not None:
        begins_BT = is_init.reshape(mask_BT.shape)[:, 1:] & mask_BT[:, 1:]
    # Asked together, so that a GPU is waited for once.
    asked = torch.stack([mask_BT.any(), behind_BT.any(), begins_BT.any()])
    any_real, any_behind, any_begins = asked.tolist()
    if not any_real:
        warnings.warn(
            "every step of the batch is masked: the loss is zero and no statistic moves. "
            "Check the replay buffer's sampler.",
            stacklevel=3,
        )
    if any_behind:
        raise ValueError(
            f"real steps of a row must come first and padding behind them, got {_rows(behind_BT)} "
            "with a real step behind padding. Use make_trial_buffer(padding='right'), the default."
        )
    if any_begins:
        raise ValueError(
            f"one row holds one trial, got {_rows(begins_BT)} in which another trial begins. Split "
            "rollouts where trials end, or collect with TrialCollector."
        )


def _rows(where_BT: Tensor) -> str:
    number = int(where_BT.any(1).sum())
    return f"{number} of {len(where_BT)} rows"


def check_actions(space: ActionSpace, action: Tensor, mask: Tensor) -> None:
    """Refuse stored actions outside of their space."""
    valid = space.contains(action) | ~mask
    if not valid.all():
        example = action[~valid][0].tolist()
        raise ValueError(
            f"{int((~valid).sum())} stored actions of the batch are outside of their {space.kind} space "
            f"{tuple(space.sizes) or ''}, such as {example}. Store actions as the policy gave them, "
            "in the policy's scale."
        )


def check_reward(reward: Tensor, mask_BT1: Tensor) -> None:
    """Refuse rewards of several numbers."""
    if reward.numel() != mask_BT1.numel():
        raise ValueError(
            f"rewards must be one number per step, {tuple(mask_BT1.shape)}, got "
            f"{tuple(reward.shape)}. Add up the parts of a reward in the environment."
        )


def check_mask(edited: Tensor, full: Tensor) -> None:
    """Refuse what a mask hook must not return."""
    if edited.shape != full.shape or edited.dtype != torch.bool:
        raise ValueError(
            f"actor_mask and critic_mask must return a bool mask of the loss's shape "
            f"{tuple(full.shape)}, got {edited.dtype} of {tuple(edited.shape)}. Edit the mask given "
            "as the third argument."
        )
