"""The policy's weights in files of their own, for whoever wants to act with a trained policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from torchrl_amago.files import DamagedError
from torchrl_amago.state_file import load_state, save_state
from torchrl_amago.trainers.checkpoint import as_json, show_differences

LAST, BEST = "policy.npz", "best_policy.npz"


class PolicyFiles:
    """A run's policy: `policy.npz` of the last checkpoint, `best_policy.npz` of the best evaluation.

    Args:
        run_dir: the run's folder.
        policy: a module; nothing is written for anything else.
        metric: column of an evaluation; the larger, the better. Of equals the later one is kept.
    """

    def __init__(
        self, run_dir: str | Path, policy: object, metric: str = "eval/trial_return"
    ) -> None:
        self.last, self.best = Path(run_dir) / LAST, Path(run_dir) / BEST
        self.policy, self.metric = policy, metric
        #: The best evaluation so far; None before there is one.
        self.best_value: float | None = None

    def save_last(self) -> None:
        """Write the policy as it is."""
        if isinstance(self.policy, nn.Module):
            save_state(self.last, _describe(self.policy))

    def offer(self, evaluation: Mapping[str, float]) -> None:
        """Write the policy if no earlier evaluation was better; ignore evaluations without the metric."""
        value = evaluation.get(self.metric, math.nan)
        is_best = value >= (-math.inf if self.best_value is None else self.best_value)
        if is_best and isinstance(self.policy, nn.Module):
            save_state(self.best, _describe(self.policy))
            self.best_value = value

    def state_dict(self) -> dict[str, Any]:
        """The best evaluation so far."""
        return {"best_value": self.best_value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from that evaluation, unless its policy isn't in the run's folder."""
        self.best_value = state["best_value"] if self.best.exists() else None


def load_policy(path: str | Path, policy: nn.Module) -> nn.Module:
    """Give a policy the weights that a run wrote; its exploration stays as it is.

    Args:
        path: `policy.npz` or `best_policy.npz` in a run's folder.
        policy: built with the run's settings; changed in place and returned.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedError: if it is not as it was written.
        ValueError: if weights or settings are another policy's. Nothing has been changed then.

    Example:
        >>> import tempfile
        >>> from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> trained, other = (make_policy(env, context_length=45) for _ in range(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = PolicyFiles(folder, trained)
        ...     files.save_last()
        ...     _ = load_policy(files.last, other)
        >>> from torch import equal
        >>> all(equal(a, b) for a, b in zip(trained.parameters(), other.parameters()))
        True
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no policy at {path}. A run writes {LAST} with each checkpoint, and {BEST} when "
            "its evaluator gives trials or a number 'trial_return'."
        )
    saved = load_state(path)
    if not (isinstance(saved, dict) and saved.keys() == {"weights", "settings"}):
        raise DamagedError(f"{path} must hold a policy, and holds another state. Choose {LAST}.")
    own = _describe(policy)
    for kind, there, here in (
        ("settings", saved["settings"], own["settings"]),
        ("weights", _shapes(saved["weights"]), _shapes(own["weights"])),
    ):
        if there != here:
            raise ValueError(
                f"the {kind} in {path} must be this policy's, but differ in "
                f"{show_differences(there, here, 'there')}. Build the policy with the settings of "
                "the run."
            )
    policy.load_state_dict(saved["weights"], strict=False)
    return policy


def _describe(policy: nn.Module) -> dict[str, Any]:
    """Settings, and the state dict without what exploration counts."""
    exploration = getattr(policy, "exploration", None)
    prefixes = tuple(f"{name}." for name, module in policy.named_modules() if module is exploration)
    weights = {
        name: x
        for name, x in policy.state_dict().items()
        if isinstance(x, Tensor) and not name.startswith(prefixes)
    }
    return {"weights": weights, "settings": as_json(policy_settings(policy))}


def policy_settings(policy: object) -> dict[str, Any]:
    """Return the settings of a policy that decide how it acts, without those of its exploration."""
    settings = getattr(policy, "settings", {})
    return {k: value for k, value in settings.items() if k.partition(".")[0] != "exploration"}


def _shapes(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(x.shape) for name, x in weights.items()}
