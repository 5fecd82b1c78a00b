"""Branches that differ between CPUs and GPUs, each behind a named predicate, and reused memory.

A predicate is True for tensors on a CPU: there memory and random numbers are expensive, and
branches on data are free, while a GPU would wait for the data. :func:`cpu_paths` overrides it.
"""

from __future__ import annotations

import math
import weakref
from collections import defaultdict, deque
from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager
from functools import partial

import numpy as np
import torch
from tensordict import is_batchedtensor
from torch import Tensor

#: Rows that pass through a network together: their intermediate results fit the caches and take
#: memory that was used before, where fresh pages cost about as much as the products.
CHUNK_ROWS = 2048

_override: bool | None = None


@contextmanager
def cpu_paths(enabled: bool | None) -> Iterator[None]:
    """Take the CPU's branches on every device, or the GPU's.

    Compiled functions compile again when the choice changes. None stands for the tensor's device.
    """
    global _override
    before, _override = _override, enabled
    try:
        yield
    finally:
        _override = before


def is_traced(x: Tensor) -> bool:
    """Return True where no branch may depend on `x`: under `torch.compile`, `export` and `vmap`."""
    return torch.compiler.is_compiling() or is_batchedtensor(x)


def reads_are_free(x: Tensor) -> bool:
    """Look at values on the host, for checks and shortcuts: it would wait for a GPU."""
    return _on_cpu(x) and not is_traced(x)


def float32_attention(x: Tensor) -> bool:
    """Attend in float32 if gradients follow: the CPU kernel's backward is up to 5 times as fast."""
    return _on_cpu(x)


def shared_dropout_bits(x: Tensor) -> bool:
    """Let one random number drop four features: torch's draws take longer than a matrix product."""
    return _on_cpu(x)


def skip_empty_cuts(x: Tensor) -> bool:
    """Cut a scan's segment only if it has a reset: most have none."""
    return _on_cpu(x)


def compact_batches(mask: Tensor) -> bool:
    """Put a batch's real steps in one row, without padding, in shapes that depend on the data."""
    return _on_cpu(mask) and not is_traced(mask)


def chunk_rows(x: Tensor) -> bool:
    """Pass rows through a network in chunks that fit the caches."""
    return _on_cpu(x) and not torch.compiler.is_compiling()


def in_chunks(
    function: Callable[[Tensor, Tensor], Tensor], state: Tensor, action: Tensor, dim: int = 0
) -> Tensor:
    """Call ``function(state, action)`` on a CPU for `CHUNK_ROWS` actions at a time.

    The function takes ``[M, ...]`` and ``[K, M, ..., A]`` and returns M in dimension `dim`.
    """
    if not chunk_rows(state) or (num_actions := math.prod(action.shape[:-1])) <= CHUNK_ROWS:
        return function(state, action)
    steps = max(1, CHUNK_ROWS * len(state) // num_actions)
    chunks = zip(state.split(steps), action.split(steps, 1), strict=True)
    return torch.cat([function(*chunk) for chunk in chunks], dim)


def _on_cpu(x: Tensor) -> bool:
    return x.device.type == "cpu" if _override is None else _override


class ReusedMemory:
    """Memory for one tensor of each batch, used again once no tensor refers to it.

    The system needs longer to hand out fresh pages than a batch of long slices takes to fill them.
    """

    smallest = 1 << 16  # bytes; new memory is as fast for less
    num_blocks = 4  # batches in use and drawn ahead, whole trials that are relabelled

    def __init__(self) -> None:
        self._blocks = defaultdict(partial(deque, maxlen=self.num_blocks))

    def take(self, key: Hashable, shape: torch.Size, dtype: torch.dtype) -> Tensor | None:
        """Return memory to which no tensor refers, for an entry of batches; None for little."""
        size, blocks = shape.numel() * dtype.itemsize, self._blocks[key]
        if size < self.smallest:
            return None
        block = next((x for x in blocks if x[1]() is None and len(x[0]) >= size), None)
        if block is None:
            blocks.append(block := [np.empty(size, np.uint8), None])
        used = block[0][:size]  # lives as long as the tensor's storage, which views share
        block[1] = weakref.ref(used)
        return torch.from_numpy(used).view(dtype).view(shape)
