"""The optimiser and its warm-up: AdamW, with weight decay on weight matrices only by default."""

from __future__ import annotations

import math
from collections.abc import Iterable

from torch import nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR

# Last parts of parameter names that are shifts or scales, whatever their number of dimensions
# (the biases of an ensemble are [C, out], the scales of attention heads [H, 1, 1], Mamba's log decays
# [channels, states]).
_SHIFTS_AND_SCALES = ("bias", "gain", "gamma", "scale", "a_log")


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether weight decay applies: at least 2 dimensions, and not a shift or scale by name.

    Example:
        >>> import torch
        >>> decays("critic.0.weight", torch.zeros(4, 8, 3)), decays("critic.0.bias", torch.zeros(4, 3))
        (True, False)
    """
    last = name.rpartition(".")[2].lower()
    return parameter.ndim >= 2 and not any(word in last for word in _SHIFTS_AND_SCALES)


def make_optimizer(
    loss_module: nn.Module,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-3,
    *,
    decay_all: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> AdamW:
    """AdamW over every parameter of ``loss_module`` that requires a gradient.

    Norms, biases, gains and scales are not decayed: :func:`decays` is the rule. The public AMAGO
    code decays everything; ``decay_all=True`` does so too. The fused implementation is used: for
    many small tensors on a CPU it takes about a fifth of the time of the others.

    Args:
        loss_module: an :class:`~torchrl_amago.objectives.AMAGOLoss` or any module.
        learning_rate: 1e-4 is AMAGO's (arXiv 2310.09971, Table 2).
        weight_decay: decoupled decay, multiplied by the learning rate at each update.
        decay_all: decay every parameter.
        betas: decay rates of Adam's moments.
        eps: added to the root of the second moment.

    Raises:
        ValueError: if nothing requires a gradient, or for a learning rate out of its range.

    Example:
        >>> optimizer = make_optimizer(nn.Linear(3, 2), learning_rate=3e-4)
        >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        [(0.001, 1), (0.0, 1)]
    """
    if not 0 < learning_rate < math.inf:
        raise ValueError(
            f"learning_rate must be positive and finite, got {learning_rate}. 1e-4 is AMAGO's."
        )
    named = [(name, p) for name, p in loss_module.named_parameters() if p.requires_grad]
    if not named:
        raise ValueError(
            "make_optimizer needs a module with at least one parameter that requires a gradient, "
            f"got {type(loss_module).__name__} with none. Pass the loss module itself, not its "
            "frozen targets."
        )
    decayed = [p for name, p in named if decay_all or decays(name, p)]
    kept = [p for name, p in named if not (decay_all or decays(name, p))]
    groups = [{"params": decayed, "weight_decay": weight_decay}]
    if kept:
        groups.append({"params": kept, "weight_decay": 0.0})
    groups = [group for group in groups if group["params"]]
    return AdamW(groups, lr=learning_rate, betas=betas, eps=eps, fused=True)


def make_schedule(
    optimizer: Optimizer,
    warmup_updates: int,
    total_updates: int = 1,
    final_fraction: float = 1.0,
) -> LambdaLR:
    """Learning rate that rises linearly, then falls linearly, in fractions of its peak.

    Args:
        optimizer: its ``lr`` is the peak.
        warmup_updates: updates of the rise, from 1/n of the peak to all of it; 0 for none.
        total_updates: update at which ``final_fraction`` is reached, and kept from then on.
        final_fraction: fraction of the peak at the end; 1 for no fall.

    Raises:
        ValueError: for a negative ``warmup_updates``, or a ``final_fraction`` outside [0, 1].

    Example:
        >>> optimizer = make_optimizer(nn.Linear(3, 2), learning_rate=1.0)
        >>> schedule = make_schedule(optimizer, 4, total_updates=104, final_fraction=0.1)
        >>> [round(schedule.lr_lambdas[0](update), 3) for update in (0, 3, 4, 54, 104, 999)]
        [0.25, 1.0, 1.0, 0.55, 0.1, 0.1]
    """
    if warmup_updates < 0:
        raise ValueError(
            f"warmup_updates must be at least 0, got {warmup_updates}. It is the number of updates "
            "over which the learning rate rises; 0 starts at the full rate."
        )
    if not 0.0 <= final_fraction <= 1.0:
        raise ValueError(
            f"final_fraction must be in [0, 1], got {final_fraction}. It is the fraction of the learning "
            "rate that is left at the last update; 1 keeps it constant."
        )

    def fraction(update: int) -> float:
        if update < warmup_updates:
            return (update + 1) / warmup_updates
        done = min(1.0, (update - warmup_updates) / max(1, total_updates - warmup_updates))
        return 1.0 + done * (final_fraction - 1.0)

    return LambdaLR(optimizer, fraction)


def parameters_of(optimizer: Optimizer) -> Iterable[nn.Parameter]:
    """Every parameter that ``optimizer`` changes."""
    return [p for group in optimizer.param_groups for p in group["params"]]
