"""Which trials lie where, oldest first, and where the next ones go.

Trials are numbered by the order in which they were written and never renumbered. The oldest leave
first, so the trials that are there are always a run of numbers: one array slot each, found by
subtraction.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np


class Plan(NamedTuple):
    """Where new trials go, and the oldest number that is still there afterwards."""

    first: np.ndarray
    begin: int


class TrialTable:
    """First rows and lengths of the trials in a storage of `capacity` steps.

    A trial of L steps takes L + 1 rows side by side, the last one for what its last step led to.
    Rows are filled from the front; once a round has placed `capacity` steps and there is room at
    the front again, the next round begins there. So the oldest trials always lie right ahead of the
    newest, and hardly more rows are ever touched than `capacity` steps need.

    Args:
        capacity: most steps kept.
        max_rows: number of rows; `3 * capacity + 2` are always enough.

    Attributes:
        begin: number of the oldest trial that is there.
        end: number that the next trial gets.
        written: steps written so far, those of evicted trials included.
        restarts: how often it was begun anew: a number may mean another trial then.

    Example:
        >>> table = TrialTable(capacity=10, max_rows=32)
        >>> plan = table.plan([4, 5])
        >>> table.extend(plan.first, [4, 5])
        >>> plan.first.tolist(), table.steps.tolist()
        ([0, 5], [4, 5])
        >>> plan = table.plan([4])  # room for it only without the oldest
        >>> plan.begin, plan.first.tolist()
        (1, [0])
    """

    def __init__(self, capacity: int, max_rows: int) -> None:
        self.capacity, self.max_rows = capacity, max_rows
        self.restarts = -1
        self.restart(0)

    def restart(self, number: int, round_steps: int = 0, written: int = 0) -> None:
        """Forget everything; the next trial gets this number."""
        self.restarts += 1
        self.begin = self.end = self._base = number
        self._round_steps, self.written = round_steps, written
        self._total = 0
        self._first = np.empty(16, np.int64)
        self._steps = np.empty(16, np.int64)

    def __len__(self) -> int:
        return self.end - self.begin

    @property
    def total_steps(self) -> int:
        """Steps of all trials that are there."""
        return self._total

    @property
    def first(self) -> np.ndarray:
        """First row of every trial, `[N]`, oldest first."""
        return self._first[self.begin - self._base : self.end - self._base]

    @property
    def steps(self) -> np.ndarray:
        """Length of every trial, `[N]`, oldest first."""
        return self._steps[self.begin - self._base : self.end - self._base]

    @property
    def counters(self) -> tuple[int, int, int]:
        """Arguments of :meth:`restart` that, with the trials that are there, give this table again."""
        # A round that began with a trial that is there is counted from that one.
        began_here = bool((self.first == 0).any())
        return (
            self.begin,
            0 if began_here else self._round_steps - self._total,
            self.written - self._total,
        )

    def extend(self, first: np.ndarray, steps: np.ndarray) -> None:
        """Take in trials that were written, `[N]` each."""
        steps = np.asarray(steps, np.int64)
        self._make_room(len(steps))
        stop = self.end - self._base + len(steps)
        self._first[stop - len(steps) : stop] = first
        self._steps[stop - len(steps) : stop] = steps
        self.end += len(steps)
        self._total += int(steps.sum())
        self.written += int(steps.sum())
        (starts,) = np.nonzero(np.asarray(first) == 0)
        if len(starts):
            self._round_steps = int(steps[starts[-1] :].sum())
        else:
            self._round_steps += int(steps.sum())

    def evict(self, begin: int) -> None:
        """Forget the trials before this number."""
        begin = min(max(begin, self.begin), self.end)
        gone = self._steps[self.begin - self._base : begin - self._base]
        self._total -= int(gone.sum())
        self.begin = begin

    def _make_room(self, count: int) -> None:
        used = self.end - self._base
        if used + count <= len(self._first):
            return
        alive = len(self)
        size = max(len(self._first), 2 * (alive + count))
        for name in ("_first", "_steps"):
            grown = np.empty(size, np.int64)
            grown[:alive] = getattr(self, name)[used - alive : used]
            setattr(self, name, grown)
        self._base = self.begin

    # -- placing ---------------------------------------------------------------------------------

    def plan(self, steps: list[int]) -> Plan:
        """Rows for trials of these lengths, together at most `capacity` steps; nothing is changed."""
        plan = self._plan_ahead(steps)
        if plan is None:
            # They would get in one another's way, which an empty storage rules out.
            rows = np.asarray(steps, np.int64) + 1
            plan = Plan(np.cumsum(rows) - rows, self.end)
        return plan

    def _plan_ahead(self, steps: list[int]) -> Plan | None:
        old, count = self.first, len(self)
        oldest, total = 0, self._total
        placed: list[int] = []
        round_steps = self._round_steps
        cursor = int(old[-1] + self.steps[-1] + 1) if count else 0
        for length in steps:
            rows = length + 1
            while True:
                if oldest == count and not placed:
                    cursor = round_steps = 0
                front = old[oldest] if oldest < count else placed[0] if placed else self.max_rows
                is_behind = cursor <= front  # this round follows the last one's oldest trials
                if total + length > self.capacity:
                    fits = False
                elif is_behind:
                    fits = cursor + rows <= front
                elif round_steps + length > self.capacity and rows <= front:
                    fits, cursor, round_steps = True, 0, 0
                else:
                    fits = cursor + rows <= self.max_rows
                if fits:
                    break
                if oldest == count:
                    return None
                total -= int(self.steps[oldest])
                oldest += 1
            placed.append(cursor)
            cursor, total, round_steps = cursor + rows, total + length, round_steps + length
        return Plan(np.array(placed, np.int64), self.begin + oldest)
