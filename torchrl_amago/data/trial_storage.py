"""Whole trials in a folder that outlives the process, one copy of each value.

A write gives up the trials that must go (journal), copies the new rows, then announces the new trials
(journal): whatever moment a process dies at, the trials that the journal lists are whole. Rows that
were copied survive the death of a process, not that of the machine, unless ``flush`` is set.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from torchrl_amago.data.journal import (
    EVICT,
    RECORD,
    START,
    TRIAL,
    Journal,
    exclusive,
    make_records,
    sync_folder,
    write_file,
)
from torchrl_amago.data.mapped_rows import MappedRows
from torchrl_amago.data.row_layout import RowLayout
from torchrl_amago.data.trial_copies import CopyableTrials
from torchrl_amago.data.trial_folder import (
    FORMAT,
    JOURNAL,
    ROWS,
    SCHEMA,
    check_remains,
    full_disk_explained,
    make_temporary,
    make_writable,
    read_schema,
)
from torchrl_amago.data.trial_table import TrialTable

Mode = Literal["create", "continue", "read"]

# Rows of more bytes are not copied whole where some of their entries are wanted.
_NARROW_ROW = 1024
# How often steps are read that are overwritten meanwhile.
_ATTEMPTS = 20
# Records of evicted trials that make the journal worth rewriting.
_STALE_RECORDS = 4096


class TrialStorage(CopyableTrials):
    """Trials in memory-mapped rows, first in, first out, for any number of processes.

    Every process opens the folder for itself; an object that is sent to another process opens it there.
    Writers take turns, readers never wait: :meth:`follow` reads what the others have done.

    Args:
        capacity: most steps kept; None takes that of the folder.
        path: the folder; None for a temporary one, removed at exit.
        mode: ``"create"`` begins a new one; ``"continue"`` goes on with what is there, if anything;
            ``"read"`` never writes.
        flush: wait for the disk at each write, so that a trial survives the failure of the machine, too.

    Raises:
        FileExistsError: for ``"create"`` where trials are there already.
        FileNotFoundError: for ``"read"`` where there are none.
        PermissionError: where the folder can't be written to, but for ``"read"``.
        ValueError: for a folder of another format or capacity.
        RuntimeError: for a damaged one.
        OSError: where the disk has no room for ``capacity`` steps.

    Example:
        >>> storage = TrialStorage(capacity=100)
        >>> steps = TensorDict({"x": torch.arange(5), "next": {"x": torch.arange(1, 6)}}, [5])
        >>> _ = storage.write(steps, [2, 3])
        >>> len(storage), len(storage.follow()), storage[:]["next", "x"].tolist()
        (5, 2, [1, 2, 3, 4, 5])
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        path: str | Path | None = None,
        mode: Mode = "create",
        flush: bool = False,
    ) -> None:
        self.mode, self.flush = mode, flush
        self.path = make_temporary(self) if path is None else Path(path).absolute()
        self.layout: RowLayout | None = None
        self._journal: Journal | None = None
        check_remains(self.path)
        if mode != "create":
            capacity = self._stored_capacity(capacity)
        elif (self.path / SCHEMA).exists():
            raise FileExistsError(
                f"a new replay buffer needs a folder without one, and {self.path} holds one. Choose "
                "another path, go on with mode='continue', or only read it with mode='read'."
            )
        if capacity is None or capacity < 1:
            raise ValueError(
                f"capacity must be at least 1, got {capacity}. It is the number of steps to keep."
            )
        super().__init__(capacity)
        self.table = TrialTable(capacity, 3 * capacity + 2)
        if mode != "read":
            make_writable(self.path)
        if (self.path / SCHEMA).exists():
            self._open()

    # -- opening ---------------------------------------------------------------------------------

    def _stored_capacity(self, capacity: int | None) -> int | None:
        if not (self.path / SCHEMA).exists():
            if self.mode == "continue":
                return capacity
            raise FileNotFoundError(
                f"mode='read' needs a folder with trials, and {self.path} has no {SCHEMA}. Check the "
                "path; mode='continue' waits for the first trial."
            )
        stored = read_schema(self.path)["capacity"]
        if capacity not in (None, stored):
            raise ValueError(
                f"capacity must be that of the folder, {stored} steps in {self.path}, got "
                f"{capacity}. Pass None to take what is there."
            )
        return stored

    def _open(self) -> None:
        schema = read_schema(self.path)
        if schema["capacity"] != self.max_size:
            raise ValueError(
                f"capacity must be that of the folder, {schema['capacity']} steps in {self.path}, got "
                f"{self.max_size}. Another process began it with that capacity: use the same one."
            )
        for name in (JOURNAL, ROWS):
            if not (self.path / name).is_file():
                raise RuntimeError(
                    f"{self.path / name} must be there, as {SCHEMA} is: the folder is incomplete. Bring the "
                    "file back, or use another copy of the folder."
                )
        journal = Journal(self.path / JOURNAL, writable=self.mode != "read")
        records = journal.read()
        if not len(records) or records["kind"][0] != START:
            raise RuntimeError(
                f"{journal.path} must begin with its first record, and doesn't: the journal is damaged. "
                "Nothing was changed. Use another copy of the folder, or load a checkpoint into a new one."
            )
        self.layout = RowLayout.from_json(schema)
        self._apply(records)
        self._map()
        self._journal, self._inode = journal, journal.inode

    def _map(self) -> None:
        table = self.table
        self._rows = MappedRows(
            self.path / ROWS,
            self.layout.row_bytes,
            needed=int((table.first + table.steps + 1).max(initial=0)),
            size=None if self.mode == "read" else table.max_rows,
        )

    def _create(self, layout: RowLayout) -> None:
        self._check_space(layout)
        check_remains(self.path)
        schema = {"format": FORMAT, "capacity": self.max_size, **layout.to_json()}
        beside = self.path / f".{SCHEMA}.partial"
        with full_disk_explained(self.path):
            write_file(self.path / JOURNAL, make_records(START, 0).tobytes(), self.flush)
            with (self.path / ROWS).open("wb") as rows:
                rows.truncate(self.table.max_rows * layout.row_bytes)
                if self.flush:
                    os.fsync(rows.fileno())
            # Last, and at once: the folder counts as a buffer from here on.
            write_file(beside, json.dumps(schema, indent=1).encode(), self.flush)
            os.replace(beside, self.path / SCHEMA)
            if self.flush:
                sync_folder(self.path)

    def _check_space(self, layout: RowLayout) -> None:
        needed = self.max_size * layout.row_bytes
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"the disk of {self.path} must have room for capacity={self.max_size} steps of "
                f"{layout.row_bytes} bytes, {needed} in all, and has {free}. Lower the capacity, or "
                "give the path of a larger disk",
            )

    # -- following -------------------------------------------------------------------------------

    def follow(self) -> TrialTable:
        """The table of trials, with what this and other processes did until now."""
        if self._journal is None:
            if (self.path / SCHEMA).exists():
                self._open()
            return self.table
        records = self._journal.read()
        if self._journal.inode != self._inode:
            # Rewritten, or a buffer was saved into this folder: then the rows are in another file, too.
            self._open()
        elif len(records):
            self._apply(records)
            trials = records[records["kind"] == TRIAL]
            last = int((trials["first"] + trials["steps"]).max(initial=-1))
            if last >= len(self._rows):  # a saved folder that another process goes on with
                self._map()
        return self.table

    def _apply(self, records: np.ndarray) -> None:
        table, position = self.table, 0
        for stop in [*np.nonzero(records["kind"] != TRIAL)[0].tolist(), len(records)]:
            if stop > position:
                trials = records[position:stop]
                table.extend(trials["first"], trials["steps"])
            if stop < len(records):
                number, first, steps = (int(records[x][stop]) for x in ("number", "first", "steps"))
                if records["kind"][stop] == EVICT:
                    table.evict(number)
                else:
                    table.restart(number, first, steps)
            position = stop + 1

    def __len__(self) -> int:
        return self.follow().total_steps

    # -- writing ---------------------------------------------------------------------------------

    def write(self, steps: TensorDictBase, lengths: list[int]) -> np.ndarray:
        """Store trials; the oldest ones make room.

        Args:
            steps: ``[N]``, the trials' steps side by side.
            lengths: number of steps of each.

        Returns:
            The trials' numbers.

        Raises:
            ValueError: for more steps than the capacity, for entries other than those stored, or where
                ``next`` of a step isn't the root of the step after it. Nothing is stored then.
            OSError: where the disk is full. Nothing is stored then.
            PermissionError: in mode ``"read"``.
        """
        self._check_write(steps, lengths)
        layout = RowLayout.of(steps)
        last_K = torch.tensor(lengths).cumsum(0) - 1
        layout.check_pairs(steps, last_K)
        with exclusive(self.path):
            if not (self.path / SCHEMA).exists():
                self._create(layout)
            table = self.follow()
            difference = self.layout.differences(layout)
            if difference:
                raise ValueError(
                    f"steps must have the entries of those in {self.path}, and differ in {difference}. "
                    "Use the environment and policy that they were collected with, or a new folder."
                )
            with full_disk_explained(self.path):
                number = self._write_rows(steps, lengths, last_K)
            if self._journal.num_records > 2 * len(table) + _STALE_RECORDS:
                # The trials are there, with room for this or without; the next write tries again.
                with contextlib.suppress(OSError):
                    self._journal.prepare(self._snapshot())
                    self._journal.replace(self.flush)
        return number

    def _write_rows(self, steps: TensorDictBase, lengths: list[int], last_K: Tensor) -> np.ndarray:
        table = self.table
        first, begin = table.plan(lengths)
        self._rows.claim(int((first + np.asarray(lengths)).max()) + 1)
        is_evicting = begin != table.begin
        # All at once: trials must not be given up for some that there is no room to list.
        self._journal.reserve(is_evicting + len(lengths))
        if is_evicting:
            self._journal.append(make_records(EVICT, begin), sync=self.flush)
            self.follow()
        length_K = torch.tensor(lengths)
        shift_K = torch.from_numpy(first) - (length_K.cumsum(0) - length_K)
        row_N = torch.arange(len(steps)) + shift_K.repeat_interleave(length_K)
        self.layout.write(self._rows.tensor, steps, row_N, last_K)
        if self.flush:
            self._rows.flush()
        number = np.arange(table.end, table.end + len(lengths))
        self._journal.append(make_records(TRIAL, number, first, lengths), sync=self.flush)
        self.follow()
        return number

    def _check_write(self, steps: TensorDictBase, lengths: list[int]) -> None:
        self._check_writable()
        if steps.ndim != 1 or sum(lengths) != len(steps) or min(lengths, default=0) < 1:
            raise ValueError(
                "a write must be the steps [N] of whole trials, side by side, and their lengths, got "
                f"steps {[*steps.shape]} and lengths {lengths[:5]}{'...' * (len(lengths) > 5)}. Use "
                "TrialCollector, or Collector(..., trajs_per_batch=1)."
            )
        if len(steps) > self.max_size:
            raise ValueError(
                f"a write must fit into the storage, got {len(steps)} steps at once for a capacity "
                f"of {self.max_size}. Raise the capacity, or write fewer trials at once."
            )

    def _check_writable(self) -> None:
        if self.mode == "read":
            raise PermissionError(
                f"a buffer of mode='read' can't be written to ({self.path}). Open it with "
                "mode='continue', or write to another one."
            )

    def _snapshot(self) -> np.ndarray:
        """Records that give the table as it is."""
        table = self.table
        number, round_steps, written = table.counters
        numbers = np.arange(table.begin, table.end)
        return np.concatenate(
            [
                make_records(START, number, round_steps, written),
                make_records(TRIAL, numbers, table.first, table.steps)
                if len(table)
                else np.empty(0, RECORD),
            ]
        )

    # -- reading ---------------------------------------------------------------------------------

    def read_slices(
        self, first_B: Tensor, real_B: Tensor, width: int, *, pad_left: bool = False
    ) -> TensorDict:
        """Slices of trials, each copied as one piece.

        Args:
            first_B: row of each slice's first step.
            real_B: number of its steps.
            width: steps of the result; padding repeats what the slice's last step led to, on the
                left its first step.
            pad_left: pad on the left.

        Returns:
            ``[B, width]``.
        """
        return self.layout.read(self._rows.slices(first_B, real_B, width, pad_left))

    def read_columns(self, first_B: Tensor, length_B: Tensor, keys: list[NestedKey]) -> TensorDict:
        """Some entries of whole trials, padded on the right to the longest of them: ``[B, L]``."""
        longest = int(length_B.max())
        if self.layout.row_bytes <= _NARROW_ROW:
            rows_BWR = self._rows.slices(first_B, length_B, longest)
            return self.layout.read(rows_BWR, keys)
        step_W = torch.minimum(torch.arange(longest + 1), length_B.unsqueeze(-1))
        return self.layout.read(self._rows.tensor, keys, row=first_B.unsqueeze(-1) + step_W)

    def get(self, index: Any) -> TensorDict:
        """Steps by their place in the order of writing, over all trials that are there.

        Args:
            index: integer, slice, or an array of integers of any shape.

        Raises:
            IndexError: for a place where there is no step.
            RuntimeError: in mode ``"read"``, where other processes are faster than the reading.
        """
        for attempt in range(_ATTEMPTS):
            with self._writers_wait() if attempt else contextlib.nullcontext():
                steps, oldest = self._get(index)
                if oldest >= self.follow().begin:
                    return steps
        raise RuntimeError(
            f"steps of {self.path} must stay while they are read, and other processes have overwritten "
            f"some of these in each of {_ATTEMPTS} attempts. Ask for fewer or newer ones, or open the "
            "folder with mode='continue', which makes the others wait."
        )

    def _get(self, index: Any) -> tuple[TensorDict, int]:
        """Steps, and the number of the oldest trial that they are from."""
        table = self.follow()
        total = table.total_steps
        if isinstance(index, slice):
            place = np.arange(*index.indices(total))
        else:
            place = _places(index, total)
            is_outside = (place < -total) | (place >= total)
            if is_outside.any():
                raise IndexError(
                    f"the place of a step must be from {-total} to {total - 1}, with {total} steps stored, "
                    f"got {place[is_outside].flat[0]}. Ask for one that is there; len() tells how many."
                )
            place = np.where(place < 0, place + total, place)
        if self.layout is None:
            return TensorDict(batch_size=place.shape), table.begin
        stop = np.cumsum(table.steps)
        trial = np.searchsorted(stop, place, side="right")
        row = table.first[trial] + place - (stop - table.steps)[trial]
        oldest = table.begin + int(trial.min(initial=len(table)))
        pairs = self._rows.tensor[torch.as_tensor(row).unsqueeze(-1) + torch.arange(2)]
        return self.layout.read(pairs).squeeze(-1), oldest

    def newest(self, count: int) -> TensorDict:
        """The steps written last, at most as many as are there, in the order of writing."""
        return self.get(slice(-count, None) if count > 0 else slice(0))

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        raise TypeError(
            "stored trials can't be changed in place. Write new ones with extend, or change batches "
            "with rb.append_transform."
        )

    def contains(self, item: int) -> bool:
        return 0 <= item < len(self)

    def __getstate__(self) -> dict[str, Any]:
        mode = "read" if self.mode == "read" else "continue"
        return {"capacity": self.max_size, "path": self.path, "mode": mode, "flush": self.flush}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not state["path"].is_dir():
            raise FileNotFoundError(
                f"a copied replay buffer opens the folder of its original, and {state['path']} isn't "
                "there: a temporary one goes with its owner. Make the buffer with path=, or copy it "
                "with save_replay and load_replay."
            )
        self.__init__(**state)

    def __repr__(self) -> str:
        return (
            f"TrialStorage(capacity={self.max_size}, path={str(self.path)!r}, mode={self.mode!r})"
        )


def _places(index: Any, total: int) -> np.ndarray:
    """Places of steps, of integers or of a mask over all steps."""
    place = np.asarray(index)
    if place.dtype == bool:
        if place.shape != (total,):
            raise IndexError(
                f"a mask must have one value for each of the {total} steps stored, got the shape "
                f"{list(place.shape)}. Ask for rb[mask] with len(mask) == len(rb)."
            )
        return np.flatnonzero(place)
    if place.size and not np.issubdtype(place.dtype, np.integer):
        raise IndexError(
            f"steps are asked for by integers, a slice or a mask, got {place.dtype}. Convert them first."
        )
    return place.astype(np.int64)
