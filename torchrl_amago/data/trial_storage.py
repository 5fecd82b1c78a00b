"""Whole trials in a folder that outlives the process, one copy of each value.

A write gives up the trials that must go (journal), copies the new rows, then announces the new trials
(journal): whatever moment a process dies at, the trials that the journal lists are whole. Rows that
were copied survive the death of a process, not that of the machine, unless ``flush`` is set.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Storage

from torchrl_amago.data.journal import (
    EVICT,
    RECORD,
    START,
    TRIAL,
    Journal,
    exclusive,
    make_records,
)
from torchrl_amago.data.row_layout import RowLayout
from torchrl_amago.data.trial_folder import (
    FORMAT,
    JOURNAL,
    ROWS,
    SCHEMA,
    allocate,
    full_disk_explained,
    make_temporary,
    make_writable,
    read_schema,
)
from torchrl_amago.data.trial_table import TrialTable

Mode = Literal["create", "continue", "read"]

# Disk space is claimed in pieces of at least this many bytes.
_CLAIM = 1 << 18
# Rows of more bytes are not copied whole where some of their entries are wanted.
_NARROW_ROW = 1024
# Records of evicted trials that make the journal worth rewriting.
_STALE_RECORDS = 4096


class TrialStorage(Storage):
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
        self._claimed = 0
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
        self.layout = RowLayout.from_json(schema)
        self._journal = Journal(self.path / JOURNAL, writable=self.mode != "read")
        self.follow()
        self._map()

    def _map(self) -> None:
        file, row_bytes = self.path / ROWS, self.layout.row_bytes
        table = self.table
        needed = int((table.first + table.steps + 1).max(initial=0)) * row_bytes
        size = file.stat().st_size
        if size < needed:
            raise RuntimeError(
                f"{file} must have the {needed} bytes that its journal speaks of, it has {size}: the "
                "folder is incomplete. Bring the file back, or use another copy of the folder."
            )
        if self.mode == "read":
            shape = (size // row_bytes, row_bytes)
        else:
            shape = (self.table.max_rows, row_bytes)
            if size < shape[0] * row_bytes:  # a saved folder: only as long as its content
                os.truncate(file, shape[0] * row_bytes)
        if shape[0] == 0:
            self._memory = np.empty(shape, np.uint8)
        else:
            access = "r" if self.mode == "read" else "r+"
            self._memory = np.memmap(file, np.uint8, access, shape=shape)
        with warnings.catch_warnings():
            # Tensors don't know read-only memory; these never leave this object.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self._rows = torch.from_numpy(self._memory)

    def _create(self, layout: RowLayout) -> None:
        self._check_space(layout)
        size = self.table.max_rows * layout.row_bytes
        with (self.path / ROWS).open("wb") as rows:
            rows.truncate(size)
        records = make_records(START, 0)
        (self.path / JOURNAL).write_bytes(records.tobytes())
        schema = {"format": FORMAT, "capacity": self.max_size, **layout.to_json()}
        # Last, and at once: the folder counts as a buffer from here on.
        beside = self.path / f".{SCHEMA}.partial"
        beside.write_text(json.dumps(schema, indent=1))
        os.replace(beside, self.path / SCHEMA)

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
        if len(records):
            self._apply(records)
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
                self._journal.rewrite(self._snapshot())
        return number

    def _write_rows(self, steps: TensorDictBase, lengths: list[int], last_K: Tensor) -> np.ndarray:
        table = self.table
        first, begin = table.plan(lengths)
        self._claim(int((first + np.asarray(lengths)).max()) + 1)
        if begin != table.begin:
            self._journal.append(make_records(EVICT, begin), sync=self.flush)
            self.follow()
        length_K = torch.tensor(lengths)
        shift_K = torch.from_numpy(first) - (length_K.cumsum(0) - length_K)
        row_N = torch.arange(len(steps)) + shift_K.repeat_interleave(length_K)
        self.layout.write(self._rows, steps, row_N, last_K)
        if self.flush:
            self._memory.flush()
        number = np.arange(table.end, table.end + len(lengths))
        self._journal.append(make_records(TRIAL, number, first, lengths), sync=self.flush)
        self.follow()
        return number

    def _check_write(self, steps: TensorDictBase, lengths: list[int]) -> None:
        if self.mode == "read":
            raise PermissionError(
                f"a buffer of mode='read' can't be written to ({self.path}). Open it with "
                "mode='continue', or write to another one."
            )
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

    def _claim(self, num_rows: int) -> None:
        """Take disk space for the first rows: writing to mapped memory without it ends the process."""
        wanted = num_rows * self.layout.row_bytes
        if wanted > self._claimed:
            stop = min(max(wanted, self._claimed + _CLAIM), self._memory.nbytes)
            allocate(self.path / ROWS, self._claimed, stop)
            self._claimed = stop

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
        return self.layout.read(self._copy(first_B, real_B, width, pad_left))

    def _copy(self, first_B: Tensor, real_B: Tensor, width: int, pad_left: bool = False) -> Tensor:
        """The rows of slices and the row after each, ``[B, width + 1, R]``."""
        memory = np.asarray(self._memory)  # slices faster than a memmap
        out_BWR = torch.empty(len(first_B), width + 1, memory.shape[1], dtype=torch.uint8)
        slices = zip(out_BWR.numpy(), first_B.tolist(), real_B.tolist(), strict=True)
        for out_WR, first, real in slices:
            begin = width - real if pad_left else 0
            stop = begin + real + 1
            out_WR[begin:stop] = memory[first : first + real + 1]
            if begin:
                out_WR[:begin] = memory[first]
            elif stop <= width:
                out_WR[stop:] = memory[first + real]
        return out_BWR

    def read_columns(self, first_B: Tensor, length_B: Tensor, keys: list[NestedKey]) -> TensorDict:
        """Some entries of whole trials, padded on the right to the longest of them: ``[B, L]``."""
        longest = int(length_B.max())
        if self.layout.row_bytes <= _NARROW_ROW:
            rows_BWR = self._copy(first_B, length_B, longest)
            return self.layout.read(rows_BWR, keys)
        step_W = torch.minimum(torch.arange(longest + 1), length_B.unsqueeze(-1))
        return self.layout.read(self._rows, keys, row=first_B.unsqueeze(-1) + step_W)

    def get(self, index: Any) -> TensorDict:
        """Steps by their place in the order of writing, over all trials that are there.

        Args:
            index: integer, slice, or an array of integers of any shape.
        """
        table = self.follow()
        total = table.total_steps
        if isinstance(index, slice):
            place = np.arange(*index.indices(total))
        else:
            place = np.asarray(index)
            place = np.where(place < 0, place + total, place)
        if self.layout is None:
            return TensorDict(batch_size=place.shape)
        stop = np.cumsum(table.steps)
        trial = np.searchsorted(stop, place, side="right")
        row = table.first[trial] + place - (stop - table.steps)[trial]
        pairs = self._rows[torch.as_tensor(row).unsqueeze(-1) + torch.arange(2)]
        return self.layout.read(pairs).squeeze(-1)

    def newest(self, count: int) -> TensorDict:
        """The steps written last, at most as many as are there, in the order of writing."""
        total = self.follow().total_steps
        return self.get(slice(max(0, total - count), total))

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        raise TypeError(
            "stored trials can't be changed in place. Write new ones with extend, or change batches "
            "with rb.append_transform."
        )

    def contains(self, item: int) -> bool:
        return 0 <= item < len(self)

    # -- saving ----------------------------------------------------------------------------------

    def _content(self) -> tuple[str | None, np.ndarray, np.ndarray]:
        """Schema, the rows up to the last one in use, and the journal."""
        table = self.follow()
        if self.layout is None:
            return None, np.empty(0, np.uint8), np.empty(0, RECORD)
        used = int((table.first + table.steps + 1).max(initial=0))
        schema = {"format": FORMAT, "capacity": self.max_size, **self.layout.to_json()}
        return json.dumps(schema, indent=1), self._memory[:used], self._snapshot()

    def _replace_content(self, schema: str | None, rows: np.ndarray, records: np.ndarray) -> None:
        self.check_fits(schema)
        if schema is None:
            self._empty()
            return
        with exclusive(self.path):
            if self.layout is None:
                if not (self.path / SCHEMA).exists():
                    self._create(RowLayout.from_json(json.loads(schema)))
                self._open()
            with full_disk_explained(self.path):
                self._claim(len(rows))
            # Nothing is listed while rows are copied.
            self._journal.rewrite(make_records(START, self.table.end))
            self._memory[: len(rows)] = rows
            self._journal.rewrite(records)
            self.follow()

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and JSON."""
        schema, rows, records = self._content()
        return {
            "schema": schema,
            "rows": torch.from_numpy(rows.copy()),
            "journal": torch.from_numpy(records.view(np.uint8)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the content by what :meth:`state_dict` gave.

        Raises:
            ValueError: where capacity or entries differ; the content stays as it was.
        """
        records = state_dict["journal"].numpy().view(RECORD)
        self._replace_content(state_dict["schema"], state_dict["rows"].numpy(), records)

    def check_fits(self, schema: str | None) -> None:
        """Raise ValueError unless a saved schema is this storage's own."""
        if schema is None:
            return
        saved = json.loads(schema)
        if saved["capacity"] != self.max_size:
            raise ValueError(
                "saved trials must be loaded into a buffer of the same capacity: they were saved with "
                f"{saved['capacity']} steps, this buffer has {self.max_size}. Make the buffer with "
                "the saved capacity."
            )
        self.follow()
        if self.layout is None:
            return
        difference = RowLayout.from_json(saved).differences(self.layout)
        if difference:
            raise ValueError(
                f"saved trials must have the entries of the buffer's, and differ in {difference}. Use "
                "the environment and policy they were collected with, or a new buffer."
            )

    def dumps(self, path: str | Path) -> None:
        """Write a folder that is a storage of its own: it can be opened, too."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        schema, rows, records = self._content()
        if schema is not None:
            rows.tofile(path / ROWS)
            records.tofile(path / JOURNAL)
            (path / SCHEMA).write_text(schema)

    def loads(self, path: str | Path) -> None:
        """Replace the content by that of a folder that :meth:`dumps` wrote."""
        path = Path(path)
        if not (path / SCHEMA).exists():
            self._empty()
            return
        self._replace_content(*TrialStorage(path=path, mode="read")._content())

    def _empty(self) -> None:
        if self._journal is None:
            return
        with exclusive(self.path):
            self.follow()
            self._journal.rewrite(make_records(START, self.table.end))
            self.follow()

    def __getstate__(self) -> dict[str, Any]:
        mode = "read" if self.mode == "read" else "continue"
        return {"capacity": self.max_size, "path": self.path, "mode": mode, "flush": self.flush}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__init__(**state)

    def __repr__(self) -> str:
        return (
            f"TrialStorage(capacity={self.max_size}, path={str(self.path)!r}, mode={self.mode!r})"
        )
