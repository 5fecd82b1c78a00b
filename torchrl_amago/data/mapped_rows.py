"""Rows of bytes in a file, as memory that all processes share."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from torchrl_amago.data.trial_folder import allocate

# Disk space is claimed in pieces of at least this many bytes.
_CLAIM = 1 << 18


class MappedRows:
    """A file of rows, mapped into memory.

    Args:
        file: it exists.
        row_bytes: R, bytes of a row.
        needed: rows that it must have.
        size: rows that it is to have, which makes them writable: a saved file is only as long as its
            content, and grows. None to read what is there.

    Raises:
        RuntimeError: for a file that is shorter than needed.
    """

    def __init__(self, file: Path, row_bytes: int, needed: int, size: int | None) -> None:
        self.file, self._claimed = file, 0
        present = file.stat().st_size
        if present < needed * row_bytes:
            raise RuntimeError(
                f"{file} must have the {needed * row_bytes} bytes that its journal speaks of, it has "
                f"{present}: the folder is incomplete. Bring the file back, or use another copy of the "
                "folder."
            )
        if size is not None and present < size * row_bytes:
            os.truncate(file, size * row_bytes)
        shape = (present // row_bytes if size is None else size, row_bytes)
        if shape[0] == 0:
            self.memory = np.empty(shape, np.uint8)
        else:
            self.memory = np.memmap(file, np.uint8, "r" if size is None else "r+", shape=shape)
        with warnings.catch_warnings():
            # Tensors don't know read-only memory; these are never written to then.
            warnings.filterwarnings("ignore", "The given NumPy array is not writable")
            self.tensor = torch.from_numpy(self.memory)

    def __len__(self) -> int:
        return len(self.memory)

    def claim(self, num_rows: int) -> None:
        """Take disk space for the first rows: writing to mapped memory without it ends the process."""
        wanted = num_rows * self.memory.shape[1]
        if wanted > self._claimed:
            stop = min(max(wanted, self._claimed + _CLAIM), self.memory.nbytes)
            allocate(self.file, self._claimed, stop)
            self._claimed = stop

    def flush(self) -> None:
        """Wait until the rows are on the disk."""
        self.memory.flush()

    def slices(self, first_B: Tensor, real_B: Tensor, width: int, pad_left: bool = False) -> Tensor:
        """Copies of rows that follow each other, and of the row after them, ``[B, width + 1, R]``.

        Args:
            first_B: first row of each.
            real_B: their number. Padding repeats the row after them, on the left the first.
            width: at least the largest number.
            pad_left: pad on the left.
        """
        memory = np.asarray(self.memory)  # slices faster than a memmap
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
