"""The policy's weights in files of their own, for whoever wants to act with a trained policy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from torchrl_amago.trainers.checkpoint import differing_entries
from torchrl_amago.trainers.replacing import replacing

LAST, BEST = "policy.pt", "best_policy.pt"


class PolicyFiles:
    """A run's policy: `policy.pt` as of the last checkpoint, `best_policy.pt` as of the best evaluation.

    Each is replaced in one step, so that there is a whole one at any time. What exploration counts is
    left out. :func:`load_policy` reads them.

    Args:
        run_dir: the run's folder.
        policy: a module; of anything else there are no weights to write, and nothing is.
        metric: column of an evaluation; the larger, the better. Of equals the later one is kept.

    Example:
        >>> import tempfile
        >>> policy = nn.Linear(2, 1)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = PolicyFiles(folder, policy)
        ...     files.offer({"eval/trial_return": 0.5})
        ...     files.offer({"eval/trial_return": 0.25})
        ...     _ = load_policy(files.best, policy)
        ...     files.best_value
        0.5
    """

    def __init__(
        self, run_dir: str | Path, policy: object, metric: str = "eval/trial_return"
    ) -> None:
        self.last, self.best = Path(run_dir) / LAST, Path(run_dir) / BEST
        self.policy, self.metric = policy, metric
        #: What the best evaluation so far came to; None before there is one.
        self.best_value: float | None = None

    def save_last(self) -> None:
        """Write the policy as it is."""
        if isinstance(self.policy, nn.Module):
            _write(self.policy, self.last)

    def offer(self, evaluation: Mapping[str, float]) -> None:
        """Write the policy if nothing evaluated before it was better; evaluations without the metric pass.

        Args:
            evaluation: numbers by column.
        """
        value = evaluation.get(self.metric, math.nan)
        is_best = value >= (-math.inf if self.best_value is None else self.best_value)
        if is_best and isinstance(self.policy, nn.Module):
            _write(self.policy, self.best)
            self.best_value = value

    def restore(self, best_value: float | None) -> None:
        """Go on as after an evaluation of this value, unless its policy isn't in the run's folder."""
        self.best_value = best_value if self.best.exists() else None


def load_policy(path: str | Path, policy: nn.Module) -> nn.Module:
    """Give a policy the weights that a run wrote; its exploration stays as it is.

    Args:
        path: `policy.pt` or `best_policy.pt` in a run's folder.
        policy: built with the run's settings, such as
            :func:`~torchrl_amago.modules.assemble.make_policy` gives it; changed in place.

    Returns:
        The policy.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if the weights are another policy's. Nothing has been changed then.

    Example:
        >>> import tempfile
        >>> from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> trained, other = (make_policy(env, context_length=45) for _ in range(2))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     files = PolicyFiles(folder, trained)
        ...     files.save_last()
        ...     _ = load_policy(files.last, other)
        >>> all(torch.equal(a, b) for a, b in zip(trained.parameters(), other.parameters()))
        True
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(
            f"there is no policy at {path}. A run writes {LAST} with each checkpoint, and {BEST} when "
            "its evaluator gives trials or a number 'trial_return'."
        )
    state, own = torch.load(path, map_location="cpu", weights_only=True), _weights(policy)
    described = {name: tuple(x.shape) for name, x in own.items()}
    found = {name: tuple(x.shape) for name, x in state.items()}
    differing = differing_entries(found, described)
    if differing:
        name = min(differing)
        raise ValueError(
            f"the weights in {path} must be this policy's, but {len(differing)} entries differ, such as "
            f"{name!r}: {found.get(name, 'missing')} there, {described.get(name, 'missing')} here. "
            "Build the policy with the settings of the run."
        )
    policy.load_state_dict(state, strict=False)
    return policy


def _weights(policy: nn.Module) -> dict[str, Tensor]:
    """The state dict on the CPU, without what exploration counts."""
    exploration = getattr(policy, "exploration", None)
    prefixes = tuple(f"{name}." for name, module in policy.named_modules() if module is exploration)
    return {
        name: x.detach().cpu()
        for name, x in policy.state_dict().items()
        if isinstance(x, Tensor) and not name.startswith(prefixes)
    }


def _write(policy: nn.Module, path: Path) -> None:
    with replacing(path, "wb") as file:
        torch.save(_weights(policy), file)
