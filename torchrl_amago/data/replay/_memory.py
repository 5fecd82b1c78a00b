"""Memory for batches: the system hands out fresh pages slower than a large sample fills them."""

from __future__ import annotations

import math
import weakref
from collections import defaultdict, deque
from functools import partial

import numpy as np
import torch
from torch import Tensor

_SMALLEST = 1 << 16  # bytes; the allocator itself keeps smaller blocks
_NUM_BLOCKS = 4  # of each entry: batches in use and drawn ahead, whole trials that are relabelled


class ReusedMemory(defaultdict):
    """Blocks of memory by key, each used again once no tensor refers to it."""

    def __init__(self) -> None:
        super().__init__(partial(deque, maxlen=_NUM_BLOCKS))

    def take(self, key: object, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return a tensor with arbitrary values; None for a small one, which is as fast anew."""
        size = math.prod(shape) * dtype.itemsize
        if size < _SMALLEST:
            return None
        blocks = self[key]
        entry = next((x for x in blocks if x[1]() is None and len(x[0]) >= size), None)
        if entry is None:
            blocks.append(entry := [np.empty(size, np.uint8), None])
        used = entry[0][:size]  # lives as long as the tensor's storage, which views share
        entry[1] = weakref.ref(used)
        return torch.from_numpy(used).view(dtype).view(shape)
