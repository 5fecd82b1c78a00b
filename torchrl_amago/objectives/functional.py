"""The mathematics of the objective as functions of tensors: targets, filters, ensembles, masks.

Legend: B batch, T steps, C critics, G discounts, A action size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from torchrl_amago._validation import check_counts

AdvantageFilter = Callable[[Tensor], Tensor]


def n_step_target(
    reward_BTG: Tensor,
    terminated_BTG: Tensor,
    next_value_BTG: Tensor,
    gamma_G: Tensor,
    mask_BT1: Tensor,
    n: int = 1,
) -> Tensor:
    """Compute the n-step TD target of every discount at once (Sutton & Barto 2018, eq. 7.1).

        target[t] = r[t] + g r[t+1] + ... + g^(n-1) r[t+n-1] + g^n v[t+n-1]

    where ``v[t]`` is the value of the state that step t led to. A termination ends the sum without
    a bootstrap; the end of the slice, or padding, ends it early with one.

    Args:
        reward_BTG: rewards, or broadcastable to this shape, as ``terminated_BTG``, bool.
        next_value_BTG: ``v``.
        gamma_G: discounts.
        mask_BT1: bool, True on real steps, which come first in a row.
        n: number of rewards summed, at least 1.

    Returns:
        ``[B, T, G]``; entries under a False mask mean nothing but are finite if the inputs are.

    Example:
        >>> reward, done = torch.tensor([1.0, 1.0, 1.0]), torch.tensor([False, False, True])
        >>> to_BTG = lambda x: x.view(1, 3, 1)
        >>> n_step_target(to_BTG(reward), to_BTG(done), torch.full((1, 3, 1), 8.0),
        ...               torch.tensor([0.5]), torch.ones(1, 3, 1, dtype=torch.bool), n=2).flatten()
        tensor([3.5000, 1.5000, 1.0000])
    """
    check_counts("Use 1 for the usual TD target.", n_step=n)
    go_on_BTG = ~terminated_BTG
    if n == 1:
        return reward_BTG + gamma_G * torch.where(go_on_BTG, next_value_BTG, 0.0)

    def ahead(x: Tensor, steps: int) -> Tensor:
        shifted = torch.zeros_like(x)
        if steps < x.shape[1]:
            shifted[:, : x.shape[1] - steps] = x[:, steps:]
        return shifted

    target_BTG = torch.zeros_like(next_value_BTG)
    alive_BTG = mask_BT1.expand_as(next_value_BTG)
    n = min(n, next_value_BTG.shape[1])  # no sum goes further than its row
    for i in range(n):
        followed_BT1 = ahead(mask_BT1, i + 1) if i + 1 < n else torch.zeros_like(mask_BT1)
        survives_BTG = alive_BTG & ahead(go_on_BTG, i)
        last_BTG = survives_BTG & ~followed_BT1
        target_BTG = target_BTG + gamma_G**i * torch.where(alive_BTG, ahead(reward_BTG, i), 0.0)
        bootstrap_BTG = torch.where(last_BTG, ahead(next_value_BTG, i), 0.0)
        target_BTG = target_BTG + gamma_G ** (i + 1) * bootstrap_BTG
        alive_BTG = survives_BTG & followed_BT1
    return target_BTG


def expected_value(q: Tensor, probs: Tensor) -> Tensor:
    """Compute V(s) = sum_a pi(a|s) Q(s, a): ``[..., C, G, A], [..., G, A] -> [..., C, G]``."""
    return (q * probs.unsqueeze(-3)).sum(-1)


def draw_critic_subset(
    shape: tuple[int, ...], num_critics: int, device: torch.device | None = None
) -> Tensor:
    """Draw TD targets' members with replacement, int64 ``(..., K, G)`` (REDQ, arXiv 2101.05982)."""
    return torch.randint(num_critics, shape, device=device)


def reduce_ensemble(value: Tensor, subset: Tensor, how: Literal["min", "mean"]) -> Tensor:
    """Reduce values ``[..., C, G]`` over the drawn members ``[..., K, G]`` to ``[..., G]``.

    The minimum is clipped double Q (arXiv 1802.09477); see :func:`draw_critic_subset`.
    """
    drawn = value.gather(-2, subset)
    return drawn.amin(-2) if how == "min" else drawn.mean(-2)


def ensemble_std(value: Tensor) -> Tensor:
    """Compute the ensemble's standard deviation, ``[..., C, G] -> [..., G]``; 0 of one critic."""
    return (value - value.mean(-2, keepdim=True)).square().mean(-2).sqrt()


def binary_filter(advantage: Tensor, threshold: float = 0.0) -> Tensor:
    """Imitate only actions better than the policy's average (CRR, arXiv 2006.15134, eq. 3).

    Example:
        >>> binary_filter(torch.tensor([-1.0, 0.0, 2.0]))
        tensor([0., 0., 1.])
    """
    return (advantage > threshold).to(advantage.dtype)


def exponential_filter(
    advantage: Tensor,
    beta: float = 1.0,
    advantage_range: tuple[float | None, float | None] = (None, None),
    weight_range: tuple[float | None, float | None] = (1e-7, None),
) -> Tensor:
    """Imitate actions by ``exp(beta * advantage)``, any shape (AWAC, arXiv 2006.09359, eq. 8).

    Args:
        beta: inverse temperature (some papers write ``advantage / beta``).
        advantage_range: bounds of the advantage, as ``weight_range`` of the result; None is open.

    Example:
        >>> exponential_filter(torch.tensor([0.0, 9.0]), weight_range=(None, 5.0))
        tensor([1., 5.])
    """
    weight = torch.exp(beta * _clamp(advantage, advantage_range))
    return _clamp(weight, weight_range)


def leaky_relu_filter(
    advantage: Tensor,
    beta: float = 2.0,
    hinge: float = 1e-2,
    negative_slope: float = 0.05,
    weight_at_zero: float = 1e-2,
    weight_range: tuple[float | None, float | None] = (1e-7, 10.0),
    add_binary: bool = True,
) -> Tensor:
    """Imitate actions in proportion to their advantage, any shape; worse ones a little.

    Args:
        beta: scale of the slope, ``1 / beta`` above the hinge.
        hinge: advantage at which the main slope starts.
        negative_slope: relative slope below the hinge.
        weight_at_zero: weight of an action of no advantage (before bounds).
        weight_range: bounds of the ramp; None is open.
        add_binary: add :func:`binary_filter` to the ramp.

    Example:
        >>> leaky_relu_filter(torch.tensor([0.0, 2.0]), add_binary=False).round(decimals=3)
        tensor([0.0100, 1.0050])
    """
    offset = weight_at_zero + negative_slope * hinge / beta
    ramp = torch.nn.functional.leaky_relu((advantage - hinge) / beta, negative_slope)
    weight = _clamp(offset + ramp, weight_range)
    return weight + binary_filter(advantage) if add_binary else weight


FILTERS: dict[str, AdvantageFilter] = {
    "binary": binary_filter,
    "exponential": exponential_filter,
    "leaky_relu": leaky_relu_filter,
}


def masked_mean(x: Tensor, mask: Tensor, weight: Tensor | None = None) -> Tensor:
    """Compute the mean of ``x`` over the entries under a True mask; 0 if there are none.

    Masked entries may be NaN. The mask, and weights of at least 0, are broadcastable to ``x``.

    Example:
        >>> masked_mean(torch.tensor([1.0, 3.0, float("nan")]), torch.tensor([True, True, False]))
        tensor(2.)
    """
    mask = mask.expand_as(x)
    if weight is None:
        return torch.where(mask, x, 0.0).sum() / mask.sum().clamp_min(1)
    total = torch.where(mask, weight, 0.0).sum()
    return torch.where(mask, weight * x, 0.0).sum() / torch.where(total > 0, total, 1.0)


def _clamp(x: Tensor, bounds: tuple[float | None, float | None]) -> Tensor:
    return x if bounds == (None, None) else x.clamp(*bounds)
