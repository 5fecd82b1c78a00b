"""The newest policy of a run, a file that is replaced in one step, and the roles that follow it."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torchrl import logger as torchrl_logger

from torchrl_amago._facts import check_same, describe_policy, facts
from torchrl_amago._files import DamagedError
from torchrl_amago._signals import Outcome
from torchrl_amago._state_file import load_state, save_state

_LAST_SECONDS = 10.0


class Board:
    """Writer and reader of ``<run_dir>/board/policy.npz``.

    Its version is the number of updates; ``finished`` tells workers and evaluators to end.
    """

    def __init__(self, run_dir: str | Path, settings: Mapping[str, Any] | None = None) -> None:
        self.file, self.settings = Path(run_dir) / "board" / "policy.npz", settings or {}
        self._seen: tuple | None = None

    def publish(self, policy: nn.Module, version: int, finished: bool = False) -> None:
        """Replace the policy on the board, with the counters of its exploration."""
        save_state(self.file, self.describe(policy, version, finished))

    def describe(self, policy: nn.Module, version: int, finished: bool = False) -> dict[str, Any]:
        """Return all that workers need of a policy."""
        tensors = {name: x for name, x in policy.state_dict().items() if isinstance(x, Tensor)}
        own = {"policy": tensors, "facts": self._facts(policy)}
        return own | {"version": version, "finished": finished}

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
        check_same(self.file, state["facts"], self._facts(policy))
        policy.load_state_dict(state["policy"], strict=False)
        return state["version"]

    def _facts(self, policy: nn.Module) -> dict[str, Any]:
        own = describe_policy(policy)
        return facts({"weights": own["weights"]}, {**self.settings, **own["settings"]})


class LeaveError(Exception):
    """A signal came a while ago, and the piece of work still runs."""


class Role(Board):
    """A collector or evaluator: its copy of the newest policy, and the signals that end it."""

    def __init__(
        self, run_dir: str | Path, policy: nn.Module, settings: Mapping[str, Any] | None
    ) -> None:
        super().__init__(run_dir, settings)
        self.policy, self.version, self.is_last = policy, -1, False
        self.outcome: Outcome | None = None
        self._deadline = float("inf")

    def update(self) -> bool:
        """Load the newest policy; return False if it has been loaded before."""
        state = self.newer()
        if state is not None:
            self.version, self.is_last = self.load(state, self.policy), state["finished"]
        return state is not None

    def request_stop(self, outcome: Outcome) -> None:
        """End after the running piece of work, as a handler of signals."""
        self.outcome, self._deadline = outcome, time.monotonic() + _LAST_SECONDS

    def check(self) -> None:
        """Raise :class:`LeaveError` once the running piece of work has had 10 seconds."""
        if time.monotonic() > self._deadline:
            raise LeaveError
