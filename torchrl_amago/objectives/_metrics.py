"""Metrics of an update: masked, detached scalars.

Each is a mean over the real steps of the batch unless its name says otherwise, for the last
discount, the one acted with. Values are in the environment's reward units.

=================== ============================================================================
metric              meaning
=================== ============================================================================
``q_value``         Q(s, a) of the actions taken, ensemble mean
``q_value/0.9``     the same, of each discount
``q_value_std``     its standard deviation over the ensemble
``td_target``       its TD target; ``td_target_min`` and ``td_target_max`` of the batch
``td_error``        absolute difference of ``q_value`` and ``td_target``
``advantage``       Q(s, a) - V(s), the filter's input, in the filter's space
``filter``          weight of an action in the imitation term; fraction imitated if binary
``target_mean``     the codec's running mean of targets; ``target_scale``, standard deviation
``entropy``         of the policy, nats
``effective_batch`` number of real steps
=================== ============================================================================

Legend: M steps, C critics, G discounts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from torchrl_amago.modules.value_codec import ValueCodec
from torchrl_amago.objectives.functional import ensemble_std

POLICY_METRICS = ("entropy", "effective_batch")
VALUE_METRICS = (
    "q_value", "q_value_std", "td_target", "td_target_min", "td_target_max", "td_error",
    "advantage", "filter", "target_mean", "target_scale",
)  # fmt: skip


def value_names(discounts: Sequence[float]) -> list[str]:
    """Return the names of each discount's value, such as ``"q_value/0.9"``."""
    return [f"q_value/{discount:g}" for discount in discounts]


@torch.no_grad()
def policy_metrics(policy: Distribution, mask_M: Tensor) -> dict[str, Tensor]:
    """Compute metrics of the policy's distributions ``[M, G]``."""
    entropy_G = _mean(policy.entropy(), mask_M)
    return {"entropy": entropy_G[-1], "effective_batch": mask_M.sum().float()}


@torch.no_grad()
def value_metrics(
    codec: ValueCodec,
    q_MCG: Tensor,
    target_MG: Tensor,
    advantage_MG: Tensor,
    weight_MG: Tensor,
    mask_M: Tensor,
    reward_scale: float,
    names: Sequence[str],
) -> tuple[dict[str, Tensor], Tensor]:
    """Compute metrics of critics and filter, and the last discount's absolute TD error ``[M]``.

    Values are in reward units times ``reward_scale``; ``names``: see :func:`value_names`.
    """
    q_MCG, target_MG = q_MCG / reward_scale, target_MG / reward_scale
    q_MG = q_MCG.mean(-2)
    error_MG = (q_MG - target_MG).abs()
    mean, scale = codec.mean_and_scale()
    per_discount = {
        "q_value": _mean(q_MG, mask_M),
        "q_value_std": _mean(ensemble_std(q_MCG), mask_M),
        "td_target": _mean(target_MG, mask_M),
        "td_target_min": -_largest(-target_MG, mask_M),
        "td_target_max": _largest(target_MG, mask_M),
        "td_error": _mean(error_MG, mask_M),
        "advantage": _mean(advantage_MG, mask_M),
        "filter": _mean(weight_MG, mask_M),
        "target_mean": mean.expand(len(names)) / reward_scale,
        "target_scale": scale.expand(len(names)) / reward_scale,
    }
    metrics = {name: value_G[-1] for name, value_G in per_discount.items()}
    metrics |= zip(names, per_discount["q_value"].unbind(), strict=True)
    return metrics, error_MG[..., -1]


def _mean(x_MG: Tensor, mask_M: Tensor) -> Tensor:
    """Compute means over real steps, `[G]`; 0 if there are none."""
    total_G = torch.where(mask_M.unsqueeze(-1), x_MG, 0.0).flatten(0, -2).sum(0)
    return total_G / mask_M.sum().clamp_min(1)


def _largest(x_MG: Tensor, mask_M: Tensor) -> Tensor:
    """Compute maxima over real steps, `[G]`; 0 if there are none."""
    x_NG = torch.where(mask_M.unsqueeze(-1), x_MG, -torch.inf).flatten(0, -2)
    # A row more, since there is no maximum of none.
    largest_G = torch.nn.functional.pad(x_NG, (0, 0, 0, 1), value=-torch.inf).amax(0)
    return torch.where(mask_M.any(), largest_G, 0.0)
