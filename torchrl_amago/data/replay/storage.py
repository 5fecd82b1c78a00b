"""Whole trials in a folder that outlives the process, each value once, on TorchRL's memory-mapped storage.

::

    trials/schema.json   format, capacity and the entries of a step, with a checksum
    trials/rows/         the rows of all trials: a LazyMemmapStorage
    trials/table.bin     which trials are there (see table)
    lock                 held by whoever writes

A write gives up the trials that must go, copies the new rows, then announces the new trials. Loading
makes `trials` anew, beside, and renames it into place. Rows survive the death of the process at once,
the failure of the machine with ``flush``.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import sys
import tempfile
import time
import warnings
import weakref
import zlib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import LazyMemmapStorage, Storage, TensorStorage

from torchrl_amago import files
from torchrl_amago.data.replay.layout import Layout
from torchrl_amago.data.replay.table import EvictedError, TrialTable
from torchrl_amago.data.replay.trials import StoredTrials

Mode = Literal["create", "continue", "read"]

FORMAT = "torchrl_amago trials 2"
_CLAIM = 1 << 16  # disk space is claimed in pieces of at least so many bytes a file
_ATTEMPTS = 20  # how often steps are read that are overwritten meanwhile
_PATIENCE = 1.0  # seconds that a reader waits for what another process is about to put in place


class TrialStorage(Storage):
    """Trials in memory-mapped rows, first in, first out, for any number of processes.

    Every process opens the folder for itself; an object that is sent to another process opens it there.
    Writers take turns, readers never wait.

    Args:
        capacity: most steps kept; None takes that of the folder.
        path: the folder; None for a temporary one, removed at exit.
        mode: ``"create"`` begins a new one; ``"continue"`` goes on with what is there, if anything;
            ``"read"`` never writes.
        flush: wait for the disk at each write.

    Raises:
        FileExistsError: for ``"create"`` where trials are there already.
        FileNotFoundError: for ``"read"`` where there are none.
        PermissionError: where the folder can't be written to, but for ``"read"``.
        ValueError: for a folder of another format or capacity.
        DamagedError: for a damaged one, a :class:`RuntimeError`.
        OSError: where the disk has no room for ``capacity`` steps.

    Example:
        >>> storage = TrialStorage(capacity=100)
        >>> steps = TensorDict({"x": torch.arange(5), "next": {"x": torch.arange(1, 6)}}, [5])
        >>> _ = storage.write(steps, [2, 3])
        >>> len(storage), len(storage.trials()), storage[:]["next", "x"].tolist()
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
        self.path = _make_temporary(self) if path is None else Path(path).absolute()
        self.layout: Layout | None = None
        self._table: TrialTable | None = None
        self._file, self._inode = self.path / "trials" / "table.bin", -1
        if mode != "read":
            _make_writable(self.path)
            with self._lock():
                files.recover(self.path)
        there = self._wait_for_trials() if mode == "read" else self._file.parent.exists()
        if there and mode == "create":
            raise FileExistsError(
                f"a new replay buffer needs a folder without one, and {self.path} holds one. Choose "
                "another path, go on with mode='continue', or only read it with mode='read'."
            )
        stored = _read_schema(self._file.parent)["capacity"] if there else capacity
        if stored is None or stored < 1:
            raise ValueError(
                f"capacity must be at least 1, got {stored}. It is the number of steps to keep."
            )
        super().__init__(stored)
        if capacity not in (None, stored):
            raise ValueError(self._other_capacity(capacity))
        self.table()

    # -- opening ---------------------------------------------------------------------------------

    def _wait_for_trials(self) -> bool:
        deadline = time.monotonic() + _PATIENCE
        while not self._file.parent.exists():
            replaced = self.path.joinpath(".trials.previous").exists()
            if not replaced or time.monotonic() > deadline:
                raise FileNotFoundError(
                    f"mode='read' needs a folder with trials, and {self.path} has none"
                    + " but a half-replaced copy. Open it once with mode='continue'." * replaced
                    + ". Check the path; mode='continue' waits for the first trial."
                    * (not replaced)
                )
            time.sleep(0.01)
        return True

    def table(self) -> TrialTable | None:
        """Return the table of the trials that are there now; None before the first write."""
        try:
            # Loading, here or elsewhere, puts other files in place.
            if os.stat(self._file).st_ino != self._inode:
                self._open()
        except FileNotFoundError:
            if self._table is None and self._file.parent.exists():
                raise files.DamagedError(
                    f"{self._file.parent} is incomplete: a file is missing. Use another copy of the folder"
                ) from None
        return self._table

    def _open(self) -> None:
        while True:
            inode, folder = os.stat(self._file).st_ino, self._file.parent
            schema = _read_schema(folder)
            if schema["capacity"] != self.max_size:
                raise ValueError(self._other_capacity(schema["capacity"]))
            table = TrialTable(self._file, self.max_size, self.mode != "read")
            layout = Layout.from_json(schema["entries"])
            maps = self._map(layout, int(_row_ranges(table.verify()[1])[1].max(initial=0)))
            if os.stat(self._file).st_ino == inode:
                break
        self.layout, self._table, self._inode = layout, table, inode
        self._set_maps(layout, maps)

    def _map(self, layout: Layout, used: int) -> list[np.ndarray]:
        """Map the rows' files, of which so many rows are used, into memory."""
        maps, num_rows = [], _max_rows(self.max_size)
        for entry in layout.entries:
            file = self._file.parent / "rows" / entry.file
            size = file.stat().st_size if file.exists() else -1
            if size < used * entry.num_bytes:
                raise files.DamagedError(
                    f"{file} must have at least the {used * entry.num_bytes} bytes of its trials, it "
                    f"{'is missing' if size < 0 else f'has {size}'}. Use another copy of the folder"
                )
            if self.mode == "read":
                num_rows = size // entry.num_bytes if entry.num_bytes else used
            elif size < num_rows * entry.num_bytes:  # a saved one is as long as its content
                os.truncate(file, num_rows * entry.num_bytes)
            shape = (num_rows, entry.num_bytes)
            mode = "r" if self.mode == "read" else "r+"
            maps.append(
                np.memmap(file, np.uint8, mode, shape=shape)
                if min(shape)
                else np.empty(shape, np.uint8)
            )
        return maps

    def _set_maps(self, layout: Layout, maps: list[np.ndarray]) -> None:
        rows = TensorDict(batch_size=[min(map(len, maps))])
        with warnings.catch_warnings():
            # Tensors don't know read-only memory; these are never written to then.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            for entry, memory in zip(layout.entries, maps, strict=True):
                values = torch.from_numpy(memory[: len(rows)]).reshape(-1).view(entry.dtype)
                rows.set(entry.row_key, values.reshape(len(rows), *entry.shape))
        self._maps, self.rows = maps, TensorStorage(rows)
        self._claimed: dict[Path, int] = {}

    def _create(self, layout: Layout) -> TrialTable:
        row_bytes = sum(entry.num_bytes for entry in layout.entries)
        needed, free = self.max_size * row_bytes, shutil.disk_usage(self.path).free
        if free < needed:
            raise OSError(
                errno.ENOSPC,
                f"the disk of {self.path} must have room for capacity={self.max_size} steps of "
                f"{row_bytes} bytes, {needed} in all, and has {free}. Lower the capacity, or "
                "give the path of a larger disk",
            )
        partial = self.path / ".trials.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        with files.explain_full_disk(self.path):
            self._make_files(partial, layout)
            for path in [*partial.rglob("*"), partial] if self.flush else []:
                files.sync(path)
        # At once: the folder holds trials from here on.
        os.replace(partial, self._file.parent)
        return self.table()

    def _make_files(self, folder: Path, layout: Layout) -> None:
        """Make a storage without trials; its files take no disk space until they are filled."""
        row = TensorDict(batch_size=[])
        for entry in layout.entries:
            row.set(entry.row_key, torch.zeros(entry.shape, dtype=entry.dtype))
        LazyMemmapStorage(_max_rows(self.max_size), scratch_dir=folder / "rows").set(0, row)
        TrialTable.create(folder / "table.bin", self.max_size)
        _write_schema(folder, self.max_size, layout)

    def _lock(self) -> contextlib.AbstractContextManager[None]:
        """Keep writers away; a reader can't, as its folder may be read-only."""
        return contextlib.nullcontext() if self.mode == "read" else files.lock(self.path / "lock")

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
        layout = Layout.of(steps)
        rows = layout.pack(steps, lengths)
        rows_K = np.asarray(lengths) + 1
        stop_K = np.cumsum(rows_K)
        values_K = _checksums(layout, rows, zip((stop_K - rows_K).tolist(), stop_K, strict=True))
        with self._lock():
            table = self.table() or self._create(layout)
            self.layout.check_same(
                layout,
                f"steps must have the entries of those in {self.path}",
                "Use the environment and policy that they were collected with, or a new folder.",
            )
            entries, begin = table.place(lengths)
            entries["values"] = values_K
            first_K = entries["first"].astype(np.int64)
            # All of it first: trials must not be given up for some that there is no room for.
            self._claim(table.file, table.slot_bytes(len(entries)))
            for entry in self.layout.entries:
                self._claim(self._rows_file(entry), int((first_K + rows_K).max()) * entry.num_bytes)
            if begin != table.begin:
                table.evict(begin)
            shift_R = np.repeat(first_K - (stop_K - rows_K), rows_K)
            self.rows.set(torch.from_numpy(np.arange(len(rows)) + shift_R), rows, set_cursor=False)
            for memory in self._maps if self.flush else ():
                memory.flush()
            end = table.end
            table.announce(entries)
            if self.flush:
                table.flush()
        return np.arange(end, end + len(entries))

    def _rows_file(self, entry: Any) -> Path:
        return self._file.parent / "rows" / entry.file

    def _claim(self, file: Path, stop: int) -> None:
        """Take disk space: writing to mapped memory that has none ends the process."""
        claimed = self._claimed.get(file, 0)
        if stop > claimed:
            stop = min(max(stop, claimed + _CLAIM), file.stat().st_size)
            files.reserve(file, claimed, stop)
            self._claimed[file] = stop

    def _check_writable(self) -> None:
        if self.mode == "read":
            raise PermissionError(
                f"a buffer of mode='read' can't be written to ({self.path}). Open it with "
                "mode='continue', or write to another one."
            )

    def _other_capacity(self, other: int) -> str:
        return (
            f"capacity must be that of the folder: {self.path} is for {self.max_size} and {other} steps, in "
            "one place and the other. Use the same one everywhere; None takes what is there."
        )

    # -- reading ---------------------------------------------------------------------------------

    def trials(self) -> StoredTrials:
        """Give the trials that are there now."""
        table = self.table()
        if table is not None and table.begin == table.end > 0:
            # A writer may have given up all of them for those that it's about to announce.
            with self._lock():
                deadline = time.monotonic() + _PATIENCE
                while (
                    self.mode == "read" and table.begin == table.end and time.monotonic() < deadline
                ):
                    time.sleep(0.002)
                table = self.table()
        return StoredTrials(self, table)

    def get(self, index: Any) -> TensorDict:
        """Read steps by their numbers in the order of writing, those that are gone counted.

        Args:
            index: integers of any shape, such as :meth:`TrialSliceSampler.sample` gives.

        Raises:
            IndexError: for a step that isn't there, or not any more.
        """
        trials, number = self.trials(), np.asarray(index, np.int64)
        oldest, stop = trials.steps
        is_outside = (number < oldest) | (number >= stop)
        if is_outside.any():
            raise IndexError(
                f"the number of a step must be from {oldest} to {stop - 1}, got "
                f"{number[is_outside].flat[0]}. The oldest steps leave; rb[...] counts those that are there."
            )
        start, first = (trials.entries[x].astype(np.int64) for x in ("start", "first"))
        trial = np.searchsorted(start, number, side="right") - 1
        row = torch.as_tensor(first[trial] + number - start[trial])
        steps = self.layout.unpack(self.read_rows(row.unsqueeze(-1) + torch.arange(2)))
        trials.check(trials.begin + trial.reshape(-1))
        return steps.squeeze(-1)

    def read_rows(self, row: Tensor, keys: Sequence[NestedKey] | None = None) -> TensorDictBase:
        """Copy rows, or some entries of them."""
        if row.numel() and int(row.max()) >= len(
            self.rows
        ):  # another process went on with a saved one
            self._set_maps(self.layout, self._map(self.layout, int(row.max()) + 1))
        if keys is None:
            return self.rows.get(row)
        return self.rows[:].select(*self.layout.row_keys(keys))[row]

    def __getitem__(self, index: Any) -> TensorDict:
        """Read steps by their place among those stored, the oldest first.

        Args:
            index: integer, slice, mask, or an array of integers of any shape.

        Raises:
            IndexError: for a place where there is no step.
            RuntimeError: in mode ``"read"``, where other processes are faster than the reading.
        """
        for attempt in range(_ATTEMPTS):
            with (
                self._lock() if attempt else contextlib.nullcontext(),
                contextlib.suppress(EvictedError),
            ):
                oldest, stop = self.trials().steps
                place = _places(index, stop - oldest)
                return self.get(oldest + place) if stop else TensorDict(batch_size=place.shape)
        raise RuntimeError(
            f"steps of {self.path} must stay while they are read, and other processes have overwritten "
            f"some of these in each of {_ATTEMPTS} attempts. Ask for fewer or newer ones, or open the "
            "folder with mode='continue', which makes the others wait."
        )

    def __len__(self) -> int:
        oldest, stop = self.trials().steps
        return stop - oldest

    def contains(self, item: int) -> bool:
        return 0 <= item < len(self)

    def set(self, cursor: Any, data: Any, *, set_cursor: bool = True) -> None:
        raise TypeError(
            "stored trials can't be changed in place. Write new ones with extend, or change batches "
            "with rb.append_transform."
        )

    # -- copies ------------------------------------------------------------------------------------

    def checksum(self) -> int:
        """Compute a checksum of all trials, from those of each that were taken when it was written."""
        entries = self.trials().entries
        return zlib.crc32(entries["values"].tobytes(), zlib.crc32(entries["length"].tobytes()))

    def verify(self) -> None:
        """Compare all values to their checksums.

        Raises:
            DamagedError: where some have changed since they were written.
        """
        if self.table() is None:
            return
        with self._lock():
            begin, entries = self.table().verify()
            first, stop = _row_ranges(entries)
            found = _checksums(self.layout, self.rows[:], zip(first, stop, strict=True))
            differing = begin + np.flatnonzero(np.array(found) != entries["values"])
            # A reader doesn't keep writers away.
            differing = differing[differing >= self.table().begin]
            if len(differing):
                raise files.DamagedError(
                    f"{self._file.parent / 'rows'} has changed since it was written, in {len(differing)} "
                    "trials. Use another copy of the folder, or load a checkpoint"
                )

    def _copy_to(self, folder: Path) -> None:
        """Write `trials` as they are at one moment; a reader leaves out what others evict meanwhile."""
        with self._lock():
            table = self.table()
            used = int(_row_ranges(table.verify()[1])[1].max(initial=0))
            for entry, memory in zip(self.layout.entries, self._maps, strict=True):
                file = folder / "rows" / entry.file
                file.parent.mkdir(parents=True, exist_ok=True)
                np.asarray(memory[:used]).tofile(file)
            table.copy_to(folder / "table.bin")
            _write_schema(folder, self.max_size, self.layout)

    def check_fits(self, saved: TrialStorage) -> None:
        """Raise ValueError unless a saved storage can be loaded into this one."""
        if saved.max_size != self.max_size:
            raise ValueError(
                "saved trials must be loaded into a buffer of the same capacity: they were saved with "
                f"{saved.max_size} steps, this buffer has {self.max_size}. Make the buffer with "
                "the saved capacity."
            )
        if self.table() is not None:
            saved.layout.check_same(
                self.layout,
                "saved trials must have the entries of the buffer's",
                "Use the environment and policy they were collected with, or a new buffer.",
            )

    def dumps(self, path: str | Path) -> None:
        """Write a folder that is a storage of its own: it can be opened, too."""
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        if self.table() is not None:
            with files.replace_folder(path / "trials") as folder:
                self._copy_to(folder)
        elif (path / "trials").exists():
            files.remove_folder(path / "trials")

    def loads(self, path: str | Path) -> None:
        """Replace the content by that of a folder that :meth:`dumps` wrote, at once.

        Raises:
            ValueError: where capacity or entries differ; the content stays as it was.
        """
        self._check_writable()
        if not (Path(path) / "trials").exists():
            self._empty()
            return
        saved = TrialStorage(path=path, mode="read")
        self.check_fits(saved)
        with self._lock(), files.replace_folder(self._file.parent) as folder:
            saved._copy_to(folder)
        self.table()

    def _empty(self) -> None:
        if self.table() is not None:
            with self._lock(), files.replace_folder(self._file.parent) as folder:
                self._make_files(folder, self.layout)
            self.table()

    def state_dict(self) -> dict[str, Any]:
        """Give everything as the bytes of the files that :meth:`dumps` writes."""
        with tempfile.TemporaryDirectory() as folder:
            self.dumps(folder)
            found = [file for file in Path(folder).rglob("*") if file.is_file()]
            return {
                file.relative_to(folder).as_posix(): torch.from_numpy(np.fromfile(file, np.uint8))
                for file in found
            }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the content by what :meth:`state_dict` gave."""
        with tempfile.TemporaryDirectory() as folder:
            for name, content in state_dict.items():
                file = Path(folder) / name
                file.parent.mkdir(parents=True, exist_ok=True)
                content.numpy().tofile(file)
            self.loads(folder)

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


def _max_rows(capacity: int) -> int:
    return 3 * capacity + 2


def _row_ranges(entries: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """First row of each trial, and the one after its last."""
    first = entries["first"].astype(np.int64)
    return first, first + entries["length"] + 1


def _places(index: Any, total: int) -> np.ndarray:
    """Find places of steps by integers, a slice, or a mask over all steps."""
    if isinstance(index, slice):
        return np.arange(*index.indices(total))
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
    place = place.astype(np.int64)
    is_outside = (place < -total) | (place >= total)
    if is_outside.any():
        raise IndexError(
            f"the place of a step must be from {-total} to {total - 1}, with {total} steps stored, "
            f"got {place[is_outside].flat[0]}. Ask for one that is there; len() tells how many."
        )
    return np.where(place < 0, place + total, place)


def _checksums(
    layout: Layout, rows: TensorDictBase, pieces: Iterable[tuple[int, int]]
) -> list[int]:
    """CRC-32 of the values of some runs of rows."""
    columns = [
        rows.get(entry.row_key).reshape(len(rows), -1).view(torch.uint8).numpy()
        for entry in layout.entries
        if entry.num_bytes
    ]
    sums = []
    for start, stop in pieces:
        checksum = 0
        for column in columns:
            checksum = zlib.crc32(column[start:stop], checksum)
        sums.append(checksum)
    return sums


def _write_schema(folder: Path, capacity: int, layout: Layout) -> None:
    schema = {"capacity": capacity, "byteorder": sys.byteorder, "entries": layout.to_json()}
    text = json.dumps({"format": FORMAT, "crc32": _crc32(schema), "schema": schema}, indent=1)
    (folder / "schema.json").write_text(text, encoding="utf-8")


def _read_schema(folder: Path) -> dict[str, Any]:
    """Read what :func:`_write_schema` wrote.

    Raises:
        DamagedError: where it can't be read, or isn't what was written.
        ValueError: where it is of another format or another kind of machine.
    """
    file = folder / "schema.json"
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        version, checksum, schema = found["format"], found["crc32"], found["schema"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise files.DamagedError(
            f"{file} must describe the trials of its folder, and can't be read ({error}). "
            "Bring the file back, or use another copy of the folder."
        ) from error
    if version != FORMAT:
        raise ValueError(
            f"{folder} must be of the format {FORMAT!r}, got {version!r}. Open it with the version of "
            "torchrl_amago that wrote it, or choose another path."
        )
    if _crc32(schema) != checksum:
        raise files.DamagedError(f"{file} isn't what was written. Use another copy of the folder")
    if schema["byteorder"] != sys.byteorder:
        raise ValueError(
            f"{folder} was written on a {schema['byteorder']}-endian machine, and this one isn't. Copy the "
            "trials with extend."
        )
    return schema


def _crc32(value: Any) -> int:
    return zlib.crc32(json.dumps(value, sort_keys=True).encode())


def _make_temporary(owner: object) -> Path:
    """Make a folder that is removed with its owner, or at exit."""
    path = Path(tempfile.mkdtemp(prefix="trials_"))
    weakref.finalize(owner, _remove, path, os.getpid())
    return path


def _remove(path: Path, process: int) -> None:
    if os.getpid() == process:  # not in a process that was forked off
        shutil.rmtree(path, ignore_errors=True)


def _make_writable(path: Path) -> None:
    try:
        path.mkdir(parents=True, exist_ok=True)
        with (path / "lock").open("ab"):
            pass
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        raise PermissionError(
            error.errno,
            f"a buffer that is written to needs a folder that can be, and {path} can't "
            f"({error.strerror}). Choose another path, or only read it with mode='read'",
        ) from error
