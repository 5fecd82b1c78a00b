"""The end of a role by a signal: after the running piece of work, unless that takes too long."""

from __future__ import annotations

import time
from typing import Literal

Outcome = Literal["finished", "interrupted", "preempted"]

#: Codes that shells and batch systems expect; 75 asks for another try (EX_TEMPFAIL).
EXIT_CODES = {"finished": 0, "interrupted": 130, "preempted": 75}

_LAST_SECONDS = 10.0


class LeaveError(Exception):
    """A signal came a while ago, and the piece of work still runs."""


class Stop:
    """A request to stop: its outcome, and the time from which :meth:`check` raises."""

    def __init__(self) -> None:
        self.outcome: Outcome | None = None
        self._deadline = float("inf")

    def request(self, outcome: Outcome) -> None:
        """Ask for the end, as a handler of signals."""
        self.outcome, self._deadline = outcome, time.monotonic() + _LAST_SECONDS

    def check(self) -> None:
        """Raise :class:`LeaveError` once the running piece of work has had its time."""
        if time.monotonic() > self._deadline:
            raise LeaveError
