"""Whole trials in a folder that outlives the process, each value once: a LazyMemmapStorage of their rows.

::

    trials/schema.json   format, capacity and the entries of a step, with a checksum
    trials/rows/         the rows of all trials, a file for each entry (see layout)
    trials/table.bin     which trials are there (see table)
    lock                 held by whoever writes

A write gives up the trials that must go, copies the new rows, then announces the new trials. Loading makes `trials`
anew beside, and renames it into place.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal
from urllib.parse import quote

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torchrl.data import LazyMemmapStorage

from torchrl_amago import _files as files
from torchrl_amago._validation import check_counts
from torchrl_amago.data.replay import _layout as layout
from torchrl_amago.data.replay._table import ENTRY, TrialTable
from torchrl_amago.data.replay._trials import Trials

Mode = Literal["create", "continue", "read"]

IN_PLACE = (
    "stored trials can't be changed in place. Write new ones with extend, or change batches with "
    "rb.append_transform."
)
_FORMAT = "torchrl_amago trials 3"
_CLAIM = 1 << 16  # disk space is claimed in pieces of at least so many bytes a file
_EPISODES = 20  # how often steps are read that are overwritten meanwhile
_PATIENCE = 1.0  # seconds to wait for what another process is about to put in place


class EvictedError(IndexError):
    """Steps that are not there any more."""


class TrialStorage(LazyMemmapStorage):
    """Trials in memory-mapped rows, first in, first out, for any number of processes.

    TorchRL's storage, but for four things: rows are written as whole trials, a table says which are there, files are
    opened by a checked description, and disk space is claimed before it is written to.

    Every process opens the folder for itself; an object that is sent to another process opens it there. Writers take
    turns, readers never wait. For arguments and errors see :func:`make_trial_buffer`.
    """

    def __init__(
        self,
        capacity: int | None = None,
        *,
        path: str | Path | None = None,
        mode: Mode = "create",
        flush: bool = False,
    ) -> None:
        path = files.temporary_folder(self, "trials_") if path is None else Path(path).absolute()
        self.path, self.mode, self.flush = path, mode, flush
        self._here, self._inode = path / "trials", -1
        self._table: TrialTable | None = None
        self._trials: Trials | None = None
        self.spec: layout.Spec = {}
        if mode != "read":
            files.make_writable(path)
            with self._lock():
                files.recover(path, self._here.name)
        deadline, previous = time.monotonic() + _PATIENCE, path / ".trials.previous"
        while not self._here.exists() and previous.exists() and time.monotonic() < deadline:
            pass  # another process is replacing it
        if self._here.exists() and mode == "create":
            raise FileExistsError(
                f"a new replay buffer needs a folder without one, and {path} holds one. Choose another "
                "path, go on with mode='continue', or only read it with mode='read'."
            )
        if mode == "read" and not self._here.exists():
            raise FileNotFoundError(
                f"mode='read' needs a folder with trials, and {path} has none. Check the path; "
                "mode='continue' waits for the first trial, and mends what a crash left."
            )
        if self._here.exists() and capacity is None:
            capacity = _read_schema(self._here)["capacity"]
        check_counts("It is the number of steps to keep.", capacity=capacity)
        super().__init__(capacity, scratch_dir=self._here / "rows", auto_cleanup=False)
        # Collectors of several processes would prepare a storage that awaits its first write.
        self._storage, self.initialized = TensorDict(batch_size=[0]), True
        self.table()

    # -- opening ---------------------------------------------------------------------------------

    def table(self) -> TrialTable | None:
        """Return the table of the trials that are there now; None before the first write."""
        try:
            # Loading, here or elsewhere, puts other files in place.
            while (inode := os.stat(self._here / "table.bin").st_ino) != self._inode:
                self._open(inode)
        except FileNotFoundError as error:
            if self._inode == -1 and self._here.exists():
                problem = f"{self._here} is incomplete: {error}. Use another copy of the folder"
                raise files.DamagedError(problem) from error
        return self._table

    def _open(self, inode: int) -> None:
        """Open the folder's files; do nothing if others have replaced them meanwhile."""
        try:
            opened = self._opened()
        except (files.DamagedError, FileNotFoundError, ValueError):  # a file grew shorter
            if os.stat(self._here / "table.bin").st_ino == inode:
                raise
            return
        if os.stat(self._here / "table.bin").st_ino == inode:
            self.spec, self._table, self._storage, self._maps = opened
            self._inode, self._trials, self._claimed = inode, None, {}

    def _opened(self) -> tuple[layout.Spec, TrialTable, TensorDict, dict[Path, np.ndarray]]:
        schema = _read_schema(self._here)
        if schema["capacity"] != self.max_size:
            raise ValueError(
                f"capacity must be that of the folder, {schema['capacity']} steps in {self.path}, got "
                f"{self.max_size}. None takes what is there."
            )
        table = TrialTable(self._here / "table.bin", self.max_size, self.mode != "read")
        spec = {tuple(key): text for key, text in schema["entries"]}
        return spec, table, *self._mapped(spec, _last_row(table.look()[1]))

    def _mapped(self, spec: layout.Spec, used: int) -> tuple[TensorDict, dict[Path, np.ndarray]]:
        """Map the rows' files, of which so many rows are used, into memory."""
        # By the checked schema alone: what tensordict writes beside could make it unpickle something.
        num_rows, is_reader = 3 * self.max_size + 2, self.mode == "read"
        row, maps = layout.empty_row(spec), {}
        row_files = {key: _rows_file(self._here, key) for key in row.keys(True, True)}
        for key, file in row_files.items():
            size, width = file.stat().st_size if file.exists() else -1, row[key].nbytes
            if size < used * width:
                raise files.DamagedError(
                    f"{file} must have at least the {used * width} bytes of its trials, it "
                    f"{'is missing' if size < 0 else f'has {size}'}. Use another copy of the folder"
                )
            if is_reader and width:
                num_rows = min(num_rows, size // width)
            elif size < num_rows * width:  # a new or a saved one is as long as its content
                os.truncate(file, num_rows * width)
        rows = TensorDict(batch_size=[num_rows])
        for key, file in row_files.items():
            shape, mode = (num_rows, row[key].nbytes), "r" if is_reader else "r+"
            memory = np.memmap(file, np.uint8, mode, 0, shape) if min(shape) else np.empty(shape)
            with warnings.catch_warnings():
                # Tensors don't know read-only memory; these are never written to then.
                warnings.filterwarnings("ignore", "The given NumPy array is not writable")
                values = torch.from_numpy(memory).reshape(-1).view(row[key].dtype)
            maps[file] = memory
            rows.set(key, values.reshape(num_rows, *row[key].shape))
        return rows, maps

    def _create(self, spec: layout.Spec) -> TrialTable:
        """Begin without trials; the files take no disk space until they are filled."""
        row = layout.empty_row(spec)
        needed = self.max_size * sum(x.nbytes for x in row.values(True, True))
        if shutil.disk_usage(self.path).free < needed:
            with files.explain_full_disk(self.path, needed):
                raise OSError(errno.ENOSPC, f"no room for capacity={self.max_size} steps")
        with self._replaced(self._here, spec) as folder:
            for key in row.keys(True, True):
                _rows_file(folder, key).touch()
            TrialTable.create(folder / "table.bin", self.max_size)
        return self.table()

    @contextlib.contextmanager
    def _replaced(self, here: Path, spec: layout.Spec) -> Any:
        """Give a folder for rows and table that takes the place of `here` when they are complete."""
        schema = {"format": _FORMAT, "byteorder": sys.byteorder, "capacity": self.max_size}
        with files.replace_folder(here, flush=self.flush) as folder:
            (folder / "rows").mkdir()
            yield folder
            files.write_json(folder / "schema.json", schema | {"entries": [*spec.items()]})

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        """Keep writers away; a reader can't, as its folder may be read-only."""
        return contextlib.nullcontext() if self.mode == "read" else files.lock(self.path / "lock")

    # -- writing ---------------------------------------------------------------------------------

    def write(self, steps: TensorDictBase, lengths: list[int]) -> np.ndarray:
        """Store trials ``[N]`` of these lengths that lie side by side; return their numbers."""
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
        entries = layout.entries_of(steps)
        spec, rows = layout.spec_of(entries), layout.pack(entries, lengths)
        count_K = np.asarray(lengths) + 1
        start_K = np.cumsum(count_K) - count_K
        values_K = _checksums(rows, start_K, count_K)
        with self._lock():
            table = self.table() or self._create(spec)
            layout.check_same(self.spec, spec, self.path)
            trials, begin = table.place(lengths)
            trials["values"] = values_K
            # All of it first: trials must not be given up for some that there is no room for.
            self._claim(table.file, table.bytes_for(len(trials)))
            for file, memory in self._maps.items():
                self._claim(file, _last_row(trials) * memory.shape[1])
            if begin != table.begin:
                table.evict(begin)
            shift_R = np.repeat(trials["first"] - start_K, count_K)
            self._storage[torch.from_numpy(np.arange(len(rows)) + shift_R)] = rows
            for memory in self._maps.values() if self.flush else ():
                memory.flush()
            numbers = table.announce(trials)
            if self.flush:
                table.flush()
        return numbers

    def _claim(self, file: Path, stop: int) -> None:
        """Take disk space: writing to mapped memory that has none ends the process."""
        claimed = self._claimed.get(file, 0)
        if stop > claimed:
            stop = min(max(stop, claimed + _CLAIM), file.stat().st_size)
            files.reserve(file, claimed, stop)
            self._claimed[file] = stop

    def _check_writable(self) -> None:
        if self.mode == "read":
            raise PermissionError(f"mode='read' can't be written to ({self.path}). Use 'continue'.")

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        raise TypeError(IN_PLACE)

    # -- reading ---------------------------------------------------------------------------------

    def trials(self) -> Trials:
        """Give the trials that are there now, which begin at rows."""
        trials = self._look()
        if trials.seen and not len(trials.length):
            # A writer has given up all of them for those that it's about to announce.
            deadline = time.monotonic() + (_PATIENCE if self.mode == "read" else 0)
            with self._lock():
                while not len((trials := self._look()).length) and time.monotonic() < deadline:
                    pass
        return trials

    def _look(self) -> Trials:
        begin, entries = self.entries()
        version, trials, used = (self._inode, begin, len(entries)), self._trials, _last_row(entries)
        if trials is None or trials.version != version:
            if len(entries) and used > len(self._storage):  # others went on with a saved one
                self._inode = -1
                return self._look()
            first, length = (entries[x].astype(np.int64) for x in ("first", "length"))
            number = begin + np.arange(len(entries))
            trials = self._trials = Trials(version, begin + len(entries), number, first, length)
        return trials

    def entries(self) -> tuple[int, np.ndarray]:
        """Return the number of the oldest trial, and the table's entries of all."""
        table = self.table()
        return table.look() if table else (0, np.empty(0, ENTRY))

    @property
    def written(self) -> int:
        """Steps written so far, by all processes."""
        table = self.table()
        return table.written if table else 0

    def get(self, row: Any, keys: Sequence[NestedKey] | None = None) -> TensorDict:
        """Read steps, or some entries of them, by the rows where they begin; see :meth:`check`."""
        row = torch.as_tensor(row)
        out, here = TensorDict(batch_size=row.shape), row.reshape(-1)
        ahead = here + 1
        for key in self.spec if keys is None else map(layout.as_tuple, keys):
            if key not in self.spec:
                raise KeyError(f"trials have the entries {[*self.spec]}, and {key!r} was asked for")
            is_twice = layout.is_twice(key, self.spec)
            values = self._storage.get(key[is_twice:])
            shape = row.shape + values.shape[1:]
            if values.numel() == len(values):
                values = values.reshape(-1)  # three times as fast
            out.set(key, values.index_select(0, ahead if is_twice else here).reshape(shape))
        return out

    def check(self, trials: Trials, number: np.ndarray) -> None:
        """Raise EvictedError unless trials with these numbers have been there since :meth:`trials`."""
        if trials.version[0] != self._inode or number.min(initial=trials.seen) < self._table.begin:
            raise EvictedError("trials that are read must stay, and some have left")

    def __getitem__(self, index: Any) -> TensorDict:
        """Read steps by their places among those stored: an integer, a slice, a mask, or integers."""
        for episode in range(_EPISODES):
            lock = self._lock() if episode else contextlib.nullcontext()
            with lock, contextlib.suppress(EvictedError):
                trials = self._look() if episode else self.trials()
                length = trials.length
                shift = trials.start - np.cumsum(length) + length
                row = np.repeat(shift, length) + np.arange(length.sum())
                steps = self.get(row[index if isinstance(index, slice) else np.asarray(index)])
                self.check(trials, trials.number[:1])
                return steps
        raise RuntimeError(
            f"steps must stay while they are read, and others have overwritten some in {self.path} in "
            f"each of {_EPISODES} episodes. Open it with mode='continue', which makes them wait."
        )

    def __len__(self) -> int:
        return int(self.trials().length.sum())

    # -- copies ------------------------------------------------------------------------------------

    def checksum(self) -> int:
        """Combine the checksums of all trials, taken when they were written."""
        _, entries = self.entries()
        return zlib.crc32(entries["values"].tobytes(), zlib.crc32(entries["length"].tobytes()))

    def verify(self) -> None:
        """Compare all values to their checksums; raise DamagedError where some have changed."""
        with self._lock():
            begin, entries = self.entries()
            first, length = (entries[x].astype(np.int64) for x in ("first", "length"))
            found = _checksums(self._storage, first, length + 1)
            differing = begin + np.flatnonzero(found != entries["values"])
            if (
                differing >= (self._table.begin if len(entries) else 0)
            ).any():  # a reader may be late
                raise files.DamagedError(
                    f"{self._here / 'rows'} has changed since it was written, in {len(differing)} "
                    "trials. Use another copy of the folder, or load a checkpoint"
                )

    def dumps(self, path: str | Path) -> None:
        """Write a folder that is a storage of its own: it can be opened, too."""
        here = Path(path) / "trials"
        if self.table():
            with self._replaced(here, self.spec) as folder:
                self._copy_to(folder)
        elif here.exists():
            files.remove_folder(here)

    def _copy_to(self, folder: Path) -> None:
        """Write the trials of one moment; a reader leaves out what others evict meanwhile."""
        with self._lock():
            begin, entries = self.entries()
            for file, memory in self._maps.items():
                with (folder / "rows" / file.name).open("wb") as copy:
                    copy.write(np.ascontiguousarray(memory[: _last_row(entries)]))
            self._table.copy_to(folder / "table.bin", begin, entries)

    def loads(self, path: str | Path) -> None:
        """Replace the content by that of a folder that :meth:`dumps` wrote, at once, if it fits."""
        self._check_writable()
        if not Path(path, "trials").exists():
            return self._empty()
        saved = TrialStorage(self.max_size, path=path, mode="read")
        layout.check_same(saved.spec, self.spec if self.table() else saved.spec, path)
        with self._lock(), self._replaced(self._here, saved.spec) as folder:
            saved._copy_to(folder)

    def _empty(self) -> None:
        if self.table():
            with self._lock():
                self._create(self.spec)

    def state_dict(self) -> dict[str, Any]:
        """Refused: trials are saved to folders."""
        raise NotImplementedError("stored trials are saved to folders. Use save_replay, or dumps.")

    def __getstate__(self) -> dict[str, Any]:
        mode = "read" if self.mode == "read" else "continue"
        return {"capacity": self.max_size, "path": self.path, "mode": mode, "flush": self.flush}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not state["path"].is_dir():
            raise FileNotFoundError(
                f"a copied replay buffer opens the folder of its original, and {state['path']} isn't "
                "there: a temporary one goes with its owner. Make the buffer with path=."
            )
        self.__init__(**state)


def _read_schema(folder: Path) -> dict[str, Any]:
    schema = files.read_json(folder / "schema.json")
    wanted = {"format": _FORMAT, "byteorder": sys.byteorder}
    found = {key: schema.get(key) for key in wanted}
    if found != wanted:
        raise ValueError(
            f"{folder} must be of {wanted}, got {found}. Open it with the version of torchrl_amago and "
            "the kind of processor that wrote it, or choose another path."
        )
    return schema


def _rows_file(folder: Path, key: NestedKey) -> Path:
    parts = [quote(part, safe="").replace(".", "%2E") for part in layout.as_tuple(key)]
    return folder / "rows" / f"{'.'.join(parts)}.memmap"


def _last_row(entries: np.ndarray) -> int:
    return int((entries["first"].astype(np.int64) + entries["length"] + 1).max(initial=0))


def _checksums(rows: TensorDictBase, first: np.ndarray, count: np.ndarray) -> np.ndarray:
    """CRC-32 of the values of runs of rows."""
    columns = [rows.get(key) for key in sorted(map(layout.as_tuple, rows.keys(True, True)))]
    columns = [x.reshape(len(rows), -1).view(torch.uint8).numpy() for x in columns if x.numel()]
    sums = np.zeros(len(first), "<u4")
    for n, (start, stop) in enumerate(zip(first.tolist(), (first + count).tolist(), strict=True)):
        for column in columns:
            sums[n] = zlib.crc32(column[start:stop], int(sums[n]))
    return sums
