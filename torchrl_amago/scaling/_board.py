"""The board: the newest policy of a run, a file that is replaced in one step."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchrl import logger as torchrl_logger

from torchrl_amago._facts import as_json, check_same, describe_policy, facts
from torchrl_amago._files import DamagedError
from torchrl_amago._state_file import load_state, save_state


class Board:
    """Writer and reader of ``<run_dir>/board/policy.npz``.

    Its version is the number of updates; ``finished`` tells workers and evaluators to end.
    """

    def __init__(self, run_dir: str | Path, settings: Mapping[str, Any] | None = None) -> None:
        self.file, self.settings = Path(run_dir) / "board" / "policy.npz", as_json(settings or {})
        self._seen: tuple | None = None

    def publish(self, policy: nn.Module, version: int, finished: bool = False) -> None:
        """Replace the policy on the board, with the counters of its exploration."""
        save_state(self.file, describe(policy, version, self.settings, finished=finished))

    def newer(self) -> dict[str, Any] | None:
        """Return the policy's state if it has changed since the last call, else None."""
        try:
            found = os.stat(self.file)
            seen = found.st_mtime_ns, found.st_ino, found.st_size
            if seen == self._seen:
                return None
            state = load_state(self.file)
        except (OSError, DamagedError) as error:  # none yet, or a network disk in between
            if self.file.exists():
                torchrl_logger.warning(f"keeping the older policy: {error}")
            return None
        self._seen = seen
        return state

    def load(self, state: Mapping[str, Any], policy: nn.Module) -> int:
        """Load a state into a policy; return its version.

        Raises:
            ValueError: naming the differences, if task or network are not the learner's.
        """
        saved = facts({"weights": state["weights"]}, state["settings"])
        check_same(self.file, saved, facts(*_own(policy, self.settings)))
        policy.load_state_dict({**state["weights"], **state["counters"]}, strict=False)
        return state["version"]


def describe(
    policy: nn.Module, version: int, settings: Mapping[str, Any], **more: Any
) -> dict[str, Any]:
    """Return all that workers need of a policy."""
    weights, settings = _own(policy, settings)
    tensors = {name: x for name, x in policy.state_dict().items() if isinstance(x, Tensor)}
    counters = {name: x for name, x in tensors.items() if name not in weights["weights"]}
    return {**weights, "counters": counters, "settings": settings, "version": version, **more}


def _own(policy: nn.Module, settings: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    described = describe_policy(policy)
    return {"weights": described["weights"]}, {**settings, **described["settings"]}
