"""A count of what makes the host wait for a GPU, on a CPU that takes the GPU's branches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from torchrl_amago._cpu import cpu_paths

# Operators whose result is a number on the host, or a shape that depends on data.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "unique_dim", "_unique2"}
# Methods that read memory without an operator, and copies of Python numbers to the device.
READING = {torch.Tensor.tolist, torch.Tensor.numpy, torch.Tensor.cpu, torch.tensor, torch.as_tensor}


class _Dispatched(TorchDispatchMode):
    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indices = args[1] if name in ("index", "index_put", "index_put_") else ()
        by_mask = any(index is not None and index.dtype == torch.bool for index in indices)
        if name in WAITING or by_mask:
            self.found[name] += 1
        return func(*args, **(kwargs or {}))


class _Called(TorchFunctionMode):
    def __init__(self, found: Counter) -> None:
        super().__init__()
        self.found = found

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func in READING:
            self.found[func.__name__] += 1
        return func(*args, **(kwargs or {}))


@contextmanager
def synchronisations() -> Iterator[Counter]:
    """Take the GPU's branches, and count the waits for it by operator."""
    found: Counter = Counter()
    with cpu_paths(False), _Called(found), _Dispatched(found):
        yield found
