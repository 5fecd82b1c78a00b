"""The trials of a storage at one moment, as a sampler sees them: ours, or any of TorchRL's.

Legend: N trials, B of them drawn, T steps of a slice.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import TensorStorage

from torchrl_amago import keys
from torchrl_amago.data.replay.layout import trial_ends
from torchrl_amago.data.replay.table import ENTRY, EvictedError, TrialTable

if TYPE_CHECKING:
    from torchrl_amago.data.replay.storage import TrialStorage


class Drawn(NamedTuple):
    """Trials that were drawn, ``[B]`` each: numbers, where they begin, lengths, importance weights."""

    number: Tensor
    first: Tensor
    length: Tensor
    weight: Tensor | None = None


class Windows(NamedTuple):
    """Slices of trials: first step in the trial and number of steps, ``[B]`` each; T; padding's side."""

    offset: Tensor
    real: Tensor
    width: int
    pad_left: bool = False

    def steps(self, beyond: int = 0) -> tuple[Tensor, Tensor]:
        """Find the step at each place of the slices ``[B, T + beyond]``, and whether it is real.

        Padding repeats the nearest step; on the right, that `beyond` the last real one.
        """
        place = torch.arange(self.width + beyond).expand(len(self.real), -1)
        if self.pad_left:
            place = place - (self.width - self.real.unsqueeze(-1))
        inside = torch.minimum(place.clamp(min=0), self.real.unsqueeze(-1) - 1 + beyond)
        return self.offset.unsqueeze(-1) + inside, inside == place


class StoredTrials:
    """Those of a :class:`TrialStorage`.

    Args:
        storage: where they are.
        table: its table; None before the first write.
    """

    def __init__(self, storage: TrialStorage, table: TrialTable | None) -> None:
        self.storage, self.table = storage, table
        self.begin, self.end = (0, 0) if table is None else (table.begin, table.end)
        self.version = (id(table), self.begin, self.end)
        #: How many were written so far: once there were enough, draws go on whatever is evicted.
        self.seen = self.end

    def __len__(self) -> int:
        return self.end - self.begin

    @cached_property
    def entries(self) -> np.ndarray:
        """Their entries in the table, ``[N]``."""
        return np.empty(0, ENTRY) if self.table is None else self.table.read(self.number)

    @property
    def number(self) -> np.ndarray:
        """Number of each ``[N]``, which no other trial of the storage ever has."""
        return np.arange(self.begin, self.end)

    @property
    def length(self) -> np.ndarray:
        """Steps of each ``[N]``."""
        return self.entries["length"].astype(np.int64)

    @property
    def steps(self) -> tuple[int, int]:
        """Number of the first step that is there among all ever written, and of the one to come."""
        stop = 0 if self.table is None else self.table.start_of(self.end)
        return int(self.table.read([self.begin])["start"][0]) if len(self) else stop, stop

    def take(self, position_B: np.ndarray) -> Drawn:
        """Look up trials by their places."""
        number_B = self.begin + position_B
        entries = self.table.read(number_B)
        columns = (number_B, entries["first"].astype(np.int64), entries["length"].astype(np.int64))
        return Drawn(*map(torch.from_numpy, columns))

    def check(self, number: np.ndarray | Tensor) -> None:
        """Raise EvictedError unless these trials are still there, and so all that was read of them."""
        if len(number) and int(number.min()) < self.table.begin:
            raise EvictedError

    def index(self, drawn: Drawn, step_BT: Tensor) -> Tensor:
        """Give the storage's index of steps: their numbers in the order of writing."""
        start = self.table.read(drawn.number.numpy())["start"].astype(np.int64)
        return torch.from_numpy(start).unsqueeze(-1) + step_BT

    def label(self, drawn: Drawn, step_BT: Tensor) -> Tensor:
        """Give each step what :meth:`position` finds its trial by."""
        return drawn.number.unsqueeze(-1).expand(step_BT.shape)

    def position(self, label: np.ndarray) -> np.ndarray:
        """Find places of trials; -1 for those that are gone."""
        return np.where((label >= self.begin) & (label < self.end), label - self.begin, -1)

    def read(
        self, drawn: Drawn, windows: Windows, entries: Sequence[NestedKey] | None = None
    ) -> TensorDictBase:
        """Copy slices ``[B, T]``, or some of their entries."""
        row = drawn.first.unsqueeze(-1) + windows.steps(beyond=1)[0]
        return self.storage.layout.unpack(self.storage.read_rows(row, entries))


class SlotTrials:
    """Those of TorchRL's one-dimensional :class:`~torchrl.data.TensorStorage`, whoever filled it.

    A trajectory's steps are joined in the order of writing, wherever they lie. A trial ends where a flag
    under ``next`` says so, or where another trajectory or ``is_init`` begins the next one. Whole are
    those whose first and last steps are there.

    Where ``is_init`` isn't stored and the ring is full, nothing but its place tells that a trial has lost
    its first steps: then the oldest step's trial counts as cut, and trials must lie side by side.
    Where no flag is stored, all trajectories but the newest step's count as finished.

    Args:
        storage: where they are.
        whole: leave out what isn't whole.
        traj_key: entry with a number for each trajectory; without it, trials must lie side by side.

    Raises:
        KeyError: where neither trajectories nor ends are stored.
        ValueError: where the storage's items are batches of steps.
    """

    def __init__(self, storage: TensorStorage, whole: bool, traj_key: NestedKey) -> None:
        self.storage, self.version, size = storage, slot_version(storage), len(storage)
        data = storage[:] if size else None
        if size and data.ndim != 1:
            raise ValueError(
                f"trials are found among single steps, but each item of the storage is a batch "
                f"{list(data.shape[1:])} of them. Write steps [N]: collect with trajs_per_batch=1, with "
                "TrialCollector, or with postproc=lambda batch: batch.reshape(-1)."
            )
        known = None if data is None else data.get(traj_key, None)
        ends = None if data is None else trial_ends(data)
        if size and known is None and ends is None:
            raise KeyError(
                f"trials are told apart by {traj_key!r}, or by 'done', 'terminated' or 'truncated' under "
                f"'next', and there are only {sorted(map(str, data.keys(True, True)))}. Store one of them."
            )
        is_full, last = size == storage.max_size, self.version[-1]
        slot = np.roll(np.arange(size), -(last + 1) if is_full and last is not None else 0)
        trajectory = np.zeros(size, np.int64) if known is None else _column(known)[slot]
        order = np.argsort(trajectory, kind="stable")
        self.slot, trajectory = slot[order], trajectory[order]
        begins = np.ones(size, bool)
        begins[1:] = trajectory[1:] != trajectory[:-1]
        if ends is not None:
            ends = _column(ends)[self.slot]
            begins[1:] |= ends[:-1]
        init = None if data is None else data.get(keys.IS_INIT, None)
        if init is not None:
            init = _column(init)[self.slot]
            begins |= init
        first = np.flatnonzero(begins)
        length = np.diff(first, append=size)
        if whole and size:
            newest = trajectory[np.argmax(order)]
            is_whole = trajectory[first] != newest if ends is None else ends[first + length - 1]
            if init is not None:
                is_whole &= init[first]
            elif is_full:
                is_whole &= order[first] != 0
            first, length = first[is_whole], length[is_whole]
        self.first, self.length, self.seen = first, length, len(first)
        # Unique as long as numbers of trajectories are; slots alone are used again.
        self.number = trajectory[first] * storage.max_size + self.slot[first]

    def __len__(self) -> int:
        return len(self.first)

    def take(self, position_B: np.ndarray) -> Drawn:
        """Look up trials by their places."""
        columns = (self.number, self.first, self.length)
        return Drawn(*(torch.from_numpy(column[position_B]) for column in columns))

    def check(self, number: Tensor) -> None:
        """Nothing to check: TorchRL's storages take writes of other processes as they come."""

    def index(self, drawn: Drawn, step_BT: Tensor) -> Tensor:
        """Give the storage's index of steps."""
        return torch.from_numpy(self.slot[(drawn.first.unsqueeze(-1) + step_BT).numpy()])

    label = index

    def position(self, label: np.ndarray) -> np.ndarray:
        """Find places of trials by slots of their steps; -1 for those that are gone."""
        found = np.full(len(self.storage), -1)
        trial = np.repeat(np.arange(len(self)), self.length)
        step = np.arange(len(trial)) - np.repeat(np.cumsum(self.length) - self.length, self.length)
        found[self.slot[self.first[trial] + step]] = trial
        return found[label]

    def read(
        self, drawn: Drawn, windows: Windows, entries: Sequence[NestedKey] | None = None
    ) -> TensorDictBase:
        """Copy slices ``[B, T]``, or some of their entries."""
        index = self.index(drawn, windows.steps()[0])
        if entries is None:
            return self.storage.get(index)
        return self.storage[:].select(*entries)[index]


def slot_version(storage: TensorStorage) -> tuple:
    """Tell states of a storage apart: the same as long as nothing was written, by any process.

    The last item is the slot written last. TorchRL 0.14 has no public names for these.
    """
    revision = getattr(storage, "_mutation_revision", None)
    last = getattr(storage, "_last_cursor_index", None)
    return id(storage), len(storage), object() if revision is None else int(revision), last


def _column(value: Tensor) -> np.ndarray:
    value = value.cpu().reshape(len(value), -1)
    return value.any(-1).numpy() if value.dtype == torch.bool else value[:, 0].numpy()
