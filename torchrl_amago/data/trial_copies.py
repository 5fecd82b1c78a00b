"""Copies of all trials of a storage: taken while others may write, and put back.

A copy is a schema, rows and the records of a journal, so that a folder with them is a storage again.
"""

from __future__ import annotations

import contextlib
import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torchrl.data import Storage

from torchrl_amago.data.journal import EVICT, RECORD, START, exclusive, make_records
from torchrl_amago.data.row_layout import RowLayout
from torchrl_amago.data.trial_folder import FORMAT, JOURNAL, ROWS, SCHEMA, full_disk_explained

if TYPE_CHECKING:
    from torchrl_amago.data.journal import Journal
    from torchrl_amago.data.mapped_rows import MappedRows
    from torchrl_amago.data.trial_table import TrialTable


class CopyableTrials(Storage):
    """Saving, loading and comparing of a :class:`TrialStorage`, which adds the trials."""

    path: Path
    mode: str
    flush: bool
    layout: RowLayout | None
    table: TrialTable
    _journal: Journal | None
    _rows: MappedRows

    def _writers_wait(self) -> contextlib.AbstractContextManager[None]:
        """Hold the lock, but for a reader, whose folder may be read-only."""
        return contextlib.nullcontext() if self.mode == "read" else exclusive(self.path)

    def _copy_content(
        self, copy: Callable[[np.ndarray], Any]
    ) -> tuple[str | None, Any, np.ndarray]:
        """Schema, what `copy` makes of the rows up to the last one in use, and the journal.

        They belong together whatever other processes do, provided that `copy` reads all rows.
        """
        with self._writers_wait():
            table = self.follow()
            if self.layout is None:
                return None, None, np.empty(0, RECORD)
            schema = {"format": FORMAT, "capacity": self.max_size, **self.layout.to_json()}
            used, begin = int((table.first + table.steps + 1).max(initial=0)), table.begin
            records = self._snapshot()
            rows = copy(self._rows.memory[:used])
            if self.follow().begin != begin:
                # Nobody waited: the rows of what was given up meanwhile may be overwritten.
                records = np.concatenate([records, make_records(EVICT, table.begin)])
        return json.dumps(schema, indent=1), rows, records

    def _replace_content(
        self, schema: str | None, rows: np.ndarray | None, records: np.ndarray
    ) -> None:
        self._check_writable()
        self.check_fits(schema)
        if schema is None:
            self._empty()
            return
        with exclusive(self.path):
            if self.layout is None:
                if not (self.path / SCHEMA).exists():
                    self._create(RowLayout.from_json(json.loads(schema)))
                self._open()
            self.follow()
            with full_disk_explained(self.path):  # takes all the space before anything is changed
                self._rows.claim(len(rows))
                self._journal.reserve(1)
                self._journal.prepare(records)
            # Nothing is listed while rows are copied.
            self._journal.append(make_records(EVICT, self.table.end))
            self._rows.memory[: len(rows)] = rows
            if self.flush:
                self._rows.flush()
            self._journal.replace(self.flush)
            self.follow()

    def state_dict(self) -> dict[str, Any]:
        """Everything, as tensors and JSON."""
        schema, rows, records = self._copy_content(np.array)
        return {
            "schema": schema,
            "rows": torch.from_numpy(np.empty(0, np.uint8) if rows is None else rows),
            "journal": torch.from_numpy(records.view(np.uint8)),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Replace the content by what :meth:`state_dict` gave.

        Raises:
            ValueError: where capacity or entries differ; the content stays as it was.
        """
        records = state_dict["journal"].numpy().view(RECORD)
        self._replace_content(state_dict["schema"], state_dict["rows"].numpy(), records)

    def checksum(self) -> int:
        """CRC-32 of the lengths and rows of all trials in their order, wherever in the folder they lie."""
        table = self.follow()
        checksum = zlib.crc32(table.steps.tobytes())
        if len(table):
            memory = np.asarray(self._rows.memory)  # slices faster than a memmap
            for first, steps in zip(table.first.tolist(), table.steps.tolist(), strict=True):
                checksum = zlib.crc32(memory[first : first + steps + 1], checksum)
        return checksum

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
        # Put in place as new files: others may have those that are there in their memory.
        beside = {name: path / f".{name}.partial" for name in (ROWS, JOURNAL, SCHEMA)}
        schema, _, records = self._copy_content(lambda rows: rows.tofile(beside[ROWS]))
        if schema is None:
            for name in (SCHEMA, JOURNAL, ROWS):
                (path / name).unlink(missing_ok=True)
            return
        records.tofile(beside[JOURNAL])
        beside[SCHEMA].write_text(schema)
        for name, file in beside.items():
            os.replace(file, path / name)

    def loads(self, path: str | Path) -> None:
        """Replace the content by that of a folder that :meth:`dumps` wrote."""
        path = Path(path)
        if not (path / SCHEMA).exists():
            self._replace_content(None, None, np.empty(0, RECORD))
            return
        saved = type(self)(path=path, mode="read")
        self._replace_content(*saved._copy_content(lambda rows: rows))

    def _empty(self) -> None:
        if self._journal is None:
            return
        with exclusive(self.path):
            self.follow()
            with full_disk_explained(self.path):
                self._journal.prepare(make_records(START, self.table.end))
            self._journal.replace(self.flush)
            self.follow()
