"""What the loss refuses, and what to do about it."""

from __future__ import annotations

import torch
from tensordict.nn import TensorDictModuleBase
from torch import Tensor

from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules.distributions import PolicyDistribution
from torchrl_amago.objectives.functional import FILTERS


def check_counts(**counts: int) -> None:
    """Refuse numbers of critics, rewards or samples below 1, by name."""
    for name, value in counts.items():
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}. See AMAGOLoss's arguments.")


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
