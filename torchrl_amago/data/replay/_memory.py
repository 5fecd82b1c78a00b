"""Memory for batches that is used again.

The system takes several times longer to hand out fresh pages than a large sample takes to fill
them.
"""

from __future__ import annotations

import math
import threading
import weakref
from collections import defaultdict, deque
from collections.abc import Hashable
from functools import partial

import numpy as np
import torch
from torch import Tensor

_SMALLEST = 1 << 16  # bytes; the allocator itself keeps smaller blocks
_NUM_BLOCKS = 4  # of each entry: batches in use and drawn ahead, whole trials that are relabelled


class ReusedMemory:
    """Blocks of memory by key, each used again once no tensor refers to it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        blocks = partial(deque[tuple[np.ndarray, weakref.ref]], maxlen=_NUM_BLOCKS)
        self._blocks: defaultdict[Hashable, deque] = defaultdict(blocks)

    def take(self, key: Hashable, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor | None:
        """Return a tensor with arbitrary values; None for a small one, which is as fast anew."""
        size = math.prod(shape) * dtype.itemsize
        if size < _SMALLEST:
            return None
        with self._lock:
            blocks = self._blocks[key]
            for place, (block, user) in enumerate(blocks):
                if user() is None and len(block) >= size:
                    del blocks[place]
                    break
            else:
                block = np.empty(size, np.uint8)
            user = block[:size]  # lives as long as the tensor's storage, which views share
            blocks.append((block, weakref.ref(user)))
            return torch.from_numpy(user).view(dtype).view(shape)
