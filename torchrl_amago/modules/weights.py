"""A policy's weights and settings in one file, which is neither packed nor pickled."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from torchrl_amago._facts import check_same, describe_policy, facts
from torchrl_amago._state_file import load_state, save_state


def save_policy(path: str | Path, policy: nn.Module) -> None:
    """Write a policy's weights and settings, without its exploration's counters, in one step."""
    save_state(Path(path), describe_policy(policy))


def load_policy(path: str | Path, policy: nn.Module) -> nn.Module:
    """Load the weights that a run wrote into a policy; its exploration stays as it is.

    Args:
        path: `policy.npz` or `best_policy.npz` in a run's folder; the latter is there after an
            evaluation with trials or a number `trial_return`.
        policy: built with the run's settings; changed in place and returned.

    Raises:
        FileNotFoundError: if there is no such file; DamagedError if it is damaged.
        ValueError: if weights or settings are another policy's. Nothing has been changed then.

    Example:
        >>> trained = nn.Linear(2, 1)
        >>> save_policy("policy.npz", trained)
        >>> load_policy("policy.npz", nn.Linear(2, 1)).weight.equal(trained.weight)
        True
    """
    path = Path(path)
    saved, current = load_state(path), describe_policy(policy)
    check_same(path, *(facts(policy, policy.get("settings", {})) for policy in (saved, current)))
    policy.load_state_dict(saved["weights"], strict=False)
    return policy
