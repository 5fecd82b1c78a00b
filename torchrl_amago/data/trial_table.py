"""Where the complete trials lie in a FIFO ring of steps.

Steps are numbered by the order in which they were written and never renumbered: step `p` lies in
slot `p % capacity`, and is gone once `p < written - capacity`. A trial is then two numbers, its
first step and its length, and the oldest trials fall off one end of two sorted tensors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TrialTable:
    """First steps and lengths of the complete trials in a ring of `capacity` steps.

    The table is told which of the newly written steps end a trial and does the rest: it joins
    trials that were written in several parts, and drops a trial as soon as one of its steps has
    been overwritten.

    Args:
        capacity: number of slots of the ring.

    Attributes:
        written: number of steps written so far, so the next one goes to slot `written % capacity`.
        start: `[N]` int64, number of each trial's first step, ascending.
        length: `[N]` int64, steps of each trial.

    Example:
        >>> table = TrialTable(capacity=8)
        >>> table.extend(torch.tensor([False, True, False, False, True, False]))
        >>> table.start.tolist(), table.length.tolist()
        ([0, 2], [2, 3])
        >>> table.extend(torch.tensor([False, False, True]))  # overwrites step 0
        >>> table.start.tolist(), table.length.tolist()
        ([2, 5], [3, 4])
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.written = 0
        self.start = torch.empty(0, dtype=torch.int64)
        self.length = torch.empty(0, dtype=torch.int64)
        # First step of the trial being written, or None where that trial's beginning is lost.
        self._open_start: int | None = 0

    def __len__(self) -> int:
        return self.start.numel()

    @classmethod
    def scan(
        cls, capacity: int, cursor: int, ends: Tensor, begins: Tensor | None = None
    ) -> TrialTable:
        """Build the table from the ring's content alone.

        Args:
            capacity: number of slots of the ring.
            cursor: slot that the next step goes to; matters for a full ring only.
            ends: `[n]` bool in slot order, True on the last step of a trial; n is the number of
                filled slots.
            begins: `[n]` bool, True on the first step of a trial. Without it, a full ring's oldest
                run of steps cannot be told from the tail of an overwritten trial, and is left out.
        """
        table = cls(capacity)
        if ends.numel() == capacity:
            table.written = cursor = cursor % capacity
            ends = ends.roll(-cursor)
            table._open_start = None if begins is None else cursor
        table.extend(ends)
        if begins is not None:
            is_whole = begins[table.slot(table.start)]
            table.start, table.length = table.start[is_whole], table.length[is_whole]
        return table

    def extend(self, ends: Tensor) -> None:
        """Take in the steps written since the last call, at most `capacity` of them.

        Args:
            ends: `[n]` bool in the order of writing, True on the last step of a trial.
        """
        end = ends.nonzero().squeeze(-1) + self.written
        self.written += ends.numel()
        if end.numel():
            first = self._open_start
            # The steps before the first end belong to the trial that was open, if it has a start.
            head = end.new_empty(0) if first is None else end.new_tensor([first])
            start = torch.cat([head, end[:-1] + 1])
            self.start = torch.cat([self.start, start])
            self.length = torch.cat([self.length, end[end.numel() - start.numel() :] - start + 1])
            self._open_start = int(end[-1]) + 1
        self._drop_overwritten()

    def slot(self, step: Tensor) -> Tensor:
        """Slots in which the steps of these numbers lie."""
        return step % self.capacity

    def _drop_overwritten(self) -> None:
        oldest = self.written - self.capacity
        if self._open_start is not None and self._open_start < oldest:
            self._open_start = None
        dropped = int(torch.searchsorted(self.start, oldest))
        if dropped:
            self.start, self.length = self.start[dropped:], self.length[dropped:]

    def state_dict(self) -> dict[str, Any]:
        """Everything, as plain numbers and lists (fit for JSON)."""
        return {
            "capacity": self.capacity,
            "written": self.written,
            "open_start": self._open_start,
            "start": self.start.tolist(),
            "length": self.length.tolist(),
        }

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> TrialTable:
        """The table that :meth:`state_dict` described."""
        table = cls(state["capacity"])
        table.written = state["written"]
        table._open_start = state["open_start"]
        table.start = torch.tensor(state["start"], dtype=torch.int64)
        table.length = torch.tensor(state["length"], dtype=torch.int64)
        return table
