"""Whole trials in a folder that outlives the process: a LazyMemmapStorage of their rows.

::

    trials/schema.json   format, capacity and the entries of a step, with a checksum
    trials/rows/         the rows of all trials, one file for each entry (see _layout)
    trials/table.bin     which trials are there (see _layout)
    lock, queue          held while trials are written or read, and before that
"""

from __future__ import annotations

import contextlib
import os
import reprlib
import sys
from pathlib import Path
from typing import Any, Literal, NoReturn, get_args
from urllib.parse import quote

import numpy as np
import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyMemmapStorage

from torchrl_amago import _files as files
from torchrl_amago._cpu import ReusedMemory
from torchrl_amago._facts import check_same
from torchrl_amago._validation import check_choice, check_counts
from torchrl_amago.data._trials import Trials
from torchrl_amago.data.replay import _layout as layout
from torchrl_amago.data.replay._layout import TrialTable, fail

Mode = Literal["create", "continue", "read"]

_FORMAT = "torchrl_amago trials 4"
_CLAIM = 1 << 16  # disk space is claimed in pieces of at least so many bytes a file


class TrialStorage(LazyMemmapStorage):
    """Trials in memory-mapped rows, first in, first out, for any number of processes.

    Each process opens the folder itself; a pickled object opens it anew. For arguments and errors
    see :func:`make_trial_buffer`.
    """

    def __init__(self, capacity=None, *, path=None, mode: Mode = "create", flush=False) -> None:
        check_choice("mode", mode, get_args(Mode))
        folder = files.temporary_folder(self, "trials_") if path is None else Path(path)
        self.path, self.mode, self.flush = folder.absolute(), mode, flush
        self._here, self._inode, self._memory = self.path / "trials", None, ReusedMemory()
        if mode != "read":
            files.make_writable(self.path)
        with self.lock():
            if mode != "read":
                files.recover(self.path, self._here.name)
            found = files.read_json(self._here / "schema.json") if self._here.exists() else {}
            if mode == "create" and found.get("entries"):
                rule = f"a new replay buffer needs a folder without one, not {self.path}."
                raise FileExistsError(f"{rule} Choose another, mode='continue' or mode='read'.")
            if (mode != "create" and path is None) or (mode == "read" and not found):
                raise FileNotFoundError(
                    f"mode={mode!r} needs the path of a folder with trials, and {path} has none. "
                    "Check the path; mode='continue' accepts a folder that has no trials yet."
                )
            capacity = found.get("capacity") if capacity is None else capacity
            check_counts("It is the number of steps to keep.", capacity=capacity)
            super().__init__(capacity, scratch_dir=self._here / "rows", auto_cleanup=False)
            # Collectors of several processes would prepare a storage that awaits its first write.
            self.initialized = True
            self._facts = {"format": _FORMAT, "byteorder": sys.byteorder, "capacity": capacity}
            if mode == "create" or not found:
                self._create({})
            self.table()

    def lock(self, writes: bool = False) -> contextlib.AbstractContextManager[None]:
        """Keep other processes from writing; in mode="read", they may read."""
        if writes and self.mode == "read":
            raise PermissionError(f"mode='read' can't write to {self.path}. Use mode='continue'.")
        return files.folder_lock(self.path, shared=self.mode == "read")

    def table(self) -> TrialTable:
        """Return the table of the trials that are there now."""
        file, inode = self._here / "table.bin", self._inode
        with contextlib.suppress(FileNotFoundError):  # while others replace the folder
            inode = os.stat(file).st_ino
        if inode is None or inode != self._inode:  # first, and after a load in any process
            self._open(file)
            self._inode = inode
        return self._table

    def _open(self, file: Path) -> None:
        found = files.read_json(self._here / "schema.json")
        facts = {name: found.get(name) for name in self._facts}
        remedy = "Use its capacity (None takes it), and the version and processor of then."
        check_same(self.path, facts, self._facts, "format, byte order and capacity", remedy)
        table = TrialTable(file, self.max_size, self.mode != "read")
        spec = {tuple(key): text for key, text in found["entries"]}
        # By the checked schema alone: tensordict's own metadata could make it unpickle something.
        row, used = layout.empty_row(spec), table.look().num_rows
        columns = {key: self._map(self._file(key), x, used) for key, x in row.items()}
        num_rows = min(map(len, columns.values()), default=0)
        self._storage = TensorDict({key: x[:num_rows] for key, x in columns.items()}, [num_rows])
        self._content = {self._file(key): layout.as_bytes(x) for key, x in columns.items()}
        self.spec, self._table, self._claimed, self._rows = spec, table, {}, {}
        for key, x in columns.items():
            rows = x.view(-1) if x.numel() == len(x) else x  # single numbers: three times as fast
            for later, name in enumerate((key, ("next", *key))):  # by so many rows
                self._rows[name] = rows, x.shape[1:], later

    def _map(self, file: Path, entry: Tensor, used: int) -> Tensor:
        """Map the file of an entry's rows, of which so many are used, into memory."""
        size, num_rows = file.exists() and file.stat().st_size, 4 * self.max_size
        if size is False or size < used * entry.nbytes:
            fail(f"{file} must have the {used * entry.nbytes} bytes of its trials, it has {size}")
        if self.mode != "read":  # from_file would zero the first byte of a file that is too short
            os.truncate(file, max(size, num_rows * entry.nbytes))
        elif entry.nbytes:
            num_rows = size // entry.nbytes
        options = {"shared": os.access(file, os.W_OK), "dtype": entry.dtype}
        values = torch.from_file(str(file), size=num_rows * entry.numel(), **options)
        return values.view(num_rows, *entry.shape)

    def _file(self, key: layout.Key) -> Path:
        parts = [quote(part, safe="").replace(".", "%2E") for part in key]
        return self._here / "rows" / f"{'.'.join(parts)}.memmap"

    def _create(self, spec: layout.Spec) -> TrialTable:
        """Start without trials; the files take no disk space until they are filled."""
        row = layout.empty_row(spec).values()
        files.check_space(self.path, self.max_size * sum(x.nbytes for x in row))
        self._write_folder(self._here, None, spec)
        return self.table()

    def _write_folder(self, here: Path, table: TrialTable | None, spec: layout.Spec) -> None:
        """Write a folder with these trials or none, which replaces `here` once it is complete."""
        num_rows = 0 if table is None else table.look().num_rows
        with files.replace_folder(here, flush=self.flush) as folder:
            (folder / "rows").mkdir()
            for file in map(self._file, layout.empty_row(spec)):
                content = self._content[file][:num_rows].numpy() if num_rows else b""
                (folder / "rows" / file.name).write_bytes(content)
            TrialTable.create(folder / "table.bin", self.max_size, table)
            files.write_json(folder / "schema.json", self._facts | {"entries": [*spec.items()]})

    def write(self, steps: TensorDictBase, lengths: list[int]) -> np.ndarray:
        """Store trials ``[N]`` of these lengths that lie side by side; return their numbers."""
        num_steps = sum(lengths)
        if steps.shape != (num_steps,) or min(lengths, default=0) < 1 or num_steps > self.max_size:
            got = f"got steps {[*steps.shape]} and lengths {reprlib.repr(lengths)}"
            raise ValueError(
                "a write must be the steps [N] of whole trials, side by side, and their lengths, "
                f"at most capacity={self.max_size} steps at once, {got}. Use TrialCollector."
            )
        entries, spec = layout.entries_of(steps)
        rows = layout.pack(entries, lengths).detach()  # stored steps have no history
        with self.lock(writes=True):
            table = self.table()
            os.stat(table.file)  # raises if it was deleted: nothing of the write would stay
            table = table if self.spec else self._create(spec)
            check_same(self.path, self.spec, spec, *layout.ENTRIES)
            trials, begin = table.place(lengths)
            first = int(trials["first"][0])
            stop = first + len(rows)
            trials["values"] = layout.checksums(rows, trials, first)
            # All of it first: no trial may be evicted for one that there is no room for.
            slot = table.counters()[1] % len(table.ring)
            self._claim(table.file, (1 + slot + len(trials)) * trials.itemsize)
            for file, content in self._content.items():
                self._claim(file, stop * content.shape[1])
            if begin > table.counters()[0]:
                table.evict(begin)
                self._sync(table.file)  # before the rows of evicted trials are overwritten
            self._storage[first:stop] = rows
            self._sync(*self._content)
            numbers = table.announce(trials)
            self._sync(table.file)
        return numbers

    def _sync(self, *paths: Path) -> None:
        for path in paths if self.flush else ():
            files.sync(path)

    def _claim(self, file: Path, stop: int) -> None:
        """Claim disk space: writing to mapped memory that has none ends the process."""
        claimed = self._claimed.get(file, 0)
        if stop > claimed:
            stop = min(max(stop, claimed + _CLAIM), file.stat().st_size)
            files.reserve(file, claimed, stop)
            self._claimed[file] = stop

    def set(self, *_: Any, **__: Any) -> NoReturn:
        raise TypeError("stored trials can't be changed in place. Write new ones with extend.")

    def trials(self) -> Trials:
        """Return the trials that are there now, by the rows where they begin."""
        while (trials := self.table().look()).num_rows > len(self._storage):
            self._inode = None  # others write to a saved folder, whose files have grown
        return trials

    def get(self, row: Any, keys: Any = None, *, reuse: bool = False) -> TensorDict:
        """Read steps, or some of their entries, by their rows, into memory that may be reused."""
        row = torch.as_tensor(row)
        out, here = TensorDict(batch_size=row.shape), row.reshape(-1)
        places = here, here + 1
        for key in self.spec if keys is None else map(layout.as_tuple, keys):
            if key not in self._rows:
                raise KeyError(f"{key} not found among {[*self.spec]}")
            x, shape, later = self._rows[key]
            memory = self._memory.take(key, here.shape + x.shape[1:], x.dtype) if reuse else None
            found = torch.index_select(x, 0, places[later], out=memory)
            out.set(key, found.view(row.shape + shape))
        return out

    def __getitem__(self, index: Any) -> TensorDict:
        """Read steps by their places among those stored: integers, a slice, or a mask."""
        with self.lock():
            trials = self.trials()
            shift = trials.start - np.cumsum(trials.length) + trials.length
            row = np.repeat(shift, trials.length) + np.arange(trials.length.sum())
            return self.get(row[index if isinstance(index, slice) else np.asarray(index)])

    def __len__(self) -> int:
        return int(self.trials().length.sum())

    def verify(self) -> None:
        """Compare all values with their checksums; raise DamagedError if some have changed."""
        with self.lock():
            entries = self.trials().entries
            if changed := (layout.checksums(self._storage, entries) != entries["values"]).sum():
                fail(f"{self._here} has changed since it was written, in {changed} trials")

    def dumps(self, path: str | Path) -> None:
        """Write a folder that is a storage of its own, which can be opened."""
        with self.lock():
            self._write_folder(Path(path) / "trials", self.table(), self.spec)

    def loads(self, path: str | Path) -> None:
        """Load a folder of :meth:`dumps` at once; raise ValueError if it doesn't fit."""
        saved = TrialStorage(self.max_size, path=path, mode="read", flush=self.flush)
        with self.lock(writes=True):
            self.table()
            if saved.spec and self.spec:
                check_same(path, saved.spec, self.spec, *layout.ENTRIES)
            if saved.path != self.path:
                saved.dumps(self.path)

    def _empty(self) -> None:
        with self.lock(writes=True):
            self.table()
            self._create(self.spec)

    def state_dict(self) -> NoReturn:
        raise NotImplementedError("stored trials are saved to folders. Use dumps.")

    def __getstate__(self) -> dict[str, Any]:
        mode = "read" if self.mode == "read" else "continue"
        return {"capacity": self.max_size, "path": self.path, "mode": mode, "flush": self.flush}

    def __setstate__(self, state: dict[str, Any]) -> None:
        if not state["path"].is_dir():
            rule = f"pickled trials must be there, and {state['path']} isn't. Temporary folders go"
            raise FileNotFoundError(f"{rule} with their owner. Make the buffer with path=.")
        self.__init__(**state)
