"""Checks of the loss's arguments and batches; each error says what to do."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import get_args

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_amago._validation import check_choice
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules.distributions import PolicyDistribution
from torchrl_amago.modules.value_codec import ValueCodec
from torchrl_amago.objectives._critics import ValueSpace

# Returns of a million steps of such rewards have squares within float32, and so have sums of them.
LARGEST_REWARD = 1e12

_CHOICES = {
    "target_reduction": ("min", "mean"),
    "filter_space": get_args(ValueSpace),
    "reduction": ("mean", "sum", "none"),
    "compact": (None, True, False),
    "use_prioritized_weights": ("auto", True, False),
    "use_target_actor": (True, False),
    "clip_actions": (True, False),
}


def check_words(**words: object) -> None:
    """Raise ValueError for words that choose nothing, by the argument's name."""
    for name, word in words.items():
        check_choice(name, word, _CHOICES[name])


def check_distribution(distribution: object) -> None:
    """Raise TypeError for distributions that don't know the space of their actions."""
    if not isinstance(distribution, PolicyDistribution):
        raise TypeError(
            "the loss needs a PolicyDistribution, which knows how actions are stored and shown to "
            f"critics, got {distribution!r}. Give policy.distribution, or Discrete(space, "
            "clip_low=0.0, clip_high=1.0) for a plain categorical one."
        )


def check_scales(reward_scale: float, **coefficients: float) -> None:
    """Raise ValueError for coefficients below 0 and factors of rewards that aren't above it."""
    for name, value in coefficients.items():
        if not 0 <= value < math.inf:
            raise ValueError(
                f"{name} must be 0 or more, got {value}. Use a finite number, 0 to leave its term out."
            )
    if not 0 < reward_scale < math.inf:
        raise ValueError(
            f"reward_scale must be above 0, got {reward_scale}. Use a finite number, 1 for rewards as "
            "they are; metrics are divided by it."
        )


def check_critics(
    critic_network: TensorDictModuleBase,
    num_target_critics: int,
    distribution: PolicyDistribution,
    takes_actions: bool,
    online: bool,
) -> None:
    """Raise ValueError for critics that don't fit the policy's actions or the number drawn."""
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
    """Raise ValueError for parts of other discounts: of one discount, shapes would fit all the same.

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


def check_precision(*tensors: Tensor) -> None:
    """Raise TypeError for weights in half precision."""
    for dtype in {tensor.dtype for tensor in tensors}:
        if dtype.itemsize < 4:
            raise TypeError(
                f"the loss needs weights of float32 or more, got {dtype}, in which values, statistics "
                "and small steps are lost. Leave them in float32 and compute under "
                "torch.autocast(device, torch.bfloat16), as AMAGOTrainer(precision='bf16') does."
            )


def check_batch_size(shape: torch.Size) -> None:
    """Raise ValueError for batches without steps, and those that are neither flat nor rows."""
    if 0 in shape[-1:]:
        raise ValueError(
            f"the loss needs a batch of at least one step, got the batch size {list(shape)}. Sample "
            "once the buffer holds a trial."
        )
    if len(shape) == 2 or (len(shape) == 1 and not torch.compiler.is_compiling()):
        return
    remedy = f"Use batch.reshape(-1, {shape[-1] if shape else 'T'})."
    if len(shape) == 1:
        remedy = "Call split_trials(batch) before the compiled loss."
    raise ValueError(
        "the loss reads batches [B, T], a row for each slice of a trial, and flat ones, [N], got the "
        f"batch size {list(shape)}. {remedy}"
    )


def check_steps(
    mask_BT: Tensor,
    begins_BT: Tensor,
    inputs: Sequence[Tensor | None],
    reward: Tensor | None,
    reward_scale: float,
    is_flat: bool,
) -> bool:
    """Check the data of a batch, waiting for a GPU once.

    Args:
        mask_BT: True on real steps.
        begins_BT: where trials begin, see :func:`~torchrl_amago.rows.trial_starts`.
        inputs: what steps led to, of any shapes and dtypes; None for those that are missing.
        reward: a number per step; None if missing.
        reward_scale: its factor.
        is_flat: the batch was given as one row, in which padding may lie anywhere.

    Returns:
        Whether there are rows to split.

    Raises:
        ValueError: if a row has padding before real steps, inputs hold NaN, or a reward is too large.
    """
    behind_BT = mask_BT[:, 1:] & ~mask_BT[:, :-1] & (not is_flat)
    floats = [x for x in inputs if x is not None and x.is_floating_point()]
    # A sum sees every NaN, and more: what it finds is looked at step by step.
    suspicious = [~x.sum(dtype=torch.float32).isfinite() for x in floats]
    if reward is None or reward.numel() != mask_BT.numel():
        reward = mask_BT.new_zeros(mask_BT.shape)  # refused elsewhere, by name
    scaled_BT = reward.reshape(mask_BT.shape) * reward_scale
    is_large_BT = mask_BT & ~(scaled_BT.abs() <= LARGEST_REWARD)
    flags = [mask_BT, behind_BT, begins_BT[:, 1:], is_large_BT, *suspicious]
    any_real, any_behind, any_begins, any_large, *look = torch.stack(
        [flag.any() for flag in flags]
    ).tolist()
    if not any_real:
        warnings.warn(
            "every step of the batch is masked: the loss is zero and no statistic moves. "
            "Check the replay buffer's sampler.",
            stacklevel=3,
        )
    if any_behind:
        raise ValueError(
            "real steps of a row must come first and padding behind them, got "
            f"{int(behind_BT.any(1).sum())} of {len(mask_BT)} rows with a real step behind padding. Use "
            "make_trial_buffer(padding='right'), the default."
        )
    if any_large:
        raise ValueError(
            f"rewards times reward_scale={reward_scale:g} must be finite and within +-"
            f"{LARGEST_REWARD:g}, whose squares float32 can add up, got {scaled_BT[is_large_BT][0]:g}. "
            "Lower reward_scale, or scale rewards in the environment."
        )
    if any(look):
        _check_nan(floats, mask_BT)
    return any_begins


def _check_nan(inputs: Sequence[Tensor], mask_BT: Tensor) -> None:
    is_nan_BT = torch.zeros_like(mask_BT)
    for x in inputs:
        is_nan_BT |= x.isnan().reshape(*mask_BT.shape, -1).any(-1) & mask_BT
    if is_nan_BT.any():
        raise ValueError(
            f"what steps led to must not be NaN, got NaN under next at {int(is_nan_BT.sum())} of "
            f"{int(mask_BT.sum())} steps. Collectors with compact_obs=True drop it, and "
            "NextStateReconstructor can't tell it at the end of a slice: collect with "
            "compact_obs=False. make_trial_buffer stores each observation once all the same."
        )


def check_actions(space: ActionSpace, action: Tensor, mask: Tensor) -> None:
    """Raise ValueError for stored actions outside of their space."""
    valid = space.contains(action) | ~mask
    if not valid.all():
        example = action[~valid][0].tolist()
        raise ValueError(
            f"{int((~valid).sum())} stored actions of the batch are outside of their {space.kind} space "
            f"{tuple(space.sizes) or ''}, such as {example}. Store actions as the policy gave them, "
            "in the policy's scale."
        )


def check_reward(reward: Tensor, mask_BT1: Tensor) -> None:
    """Raise ValueError for rewards of several numbers."""
    if reward.numel() != mask_BT1.numel():
        raise ValueError(
            f"rewards must be one number per step, {tuple(mask_BT1.shape)}, got "
            f"{tuple(reward.shape)}. Add up the parts of a reward in the environment."
        )


def check_mask(edited: Tensor, full: Tensor) -> None:
    """Raise ValueError if a mask hook returned another shape or dtype."""
    if edited.shape != full.shape or edited.dtype != torch.bool:
        raise ValueError(
            f"actor_mask and critic_mask must return a bool mask of the loss's shape "
            f"{tuple(full.shape)}, got {edited.dtype} of {tuple(edited.shape)}. Edit the mask given "
            "as the third argument."
        )
