"""A nested state in one file: tensors by path in numpy's `.npz` format, without pickle.

The file ends with the SHA-256 of everything before. `numpy.load` reads it too.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from torchrl_amago._files import DamagedError, digest, replace_file

_TREE, _MARK = "tree", b"\nSHA-256 "
_TRAILER_SIZE = len(_MARK) + 64
_CONTAINERS = {"size": torch.Size, "list": list, "tuple": tuple}
# numpy has no such numbers: their bytes are stored.
_AS_BYTES = {torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2}


def save_state(path: Path, state: Any) -> None:
    """Write a nested state in one step: a crash leaves the old file or the new one.

    It may hold dicts, lists and tuples of dense tensors, bool, int, float, str and None. A value of
    another type raises TypeError, which names its path.
    """
    arrays: dict[str, np.ndarray] = {}
    tree = json.dumps(_encode(state, "state", arrays))
    with replace_file(path, "w+b") as file:
        np.savez(file, **{_TREE: np.frombuffer(tree.encode(), np.uint8)}, **arrays)
        file.write(_MARK + digest(file, file.seek(0, 2)).encode())


def load_state(path: Path) -> Any:
    """Read a file of :func:`save_state`, tensors on the CPU; DamagedError if it has changed."""
    with path.open("rb") as file:
        end = max(file.seek(0, 2) - _TRAILER_SIZE, 0)
        file.seek(end)
        is_intact = file.read() == _MARK + digest(file, end).encode()
        file.seek(0)
        try:
            if is_intact:
                with np.load(file, allow_pickle=False) as arrays:
                    # A file made by something else may be packed, and fill the memory.
                    if sum(entry.file_size for entry in arrays.zip.infolist()) <= end:
                        return _decode(json.loads(arrays[_TREE].tobytes()), arrays)
            problem = "its content is packed" if is_intact else "its checksum is missing or differs"
        except (LookupError, TypeError, ValueError, RuntimeError, MemoryError) as error:
            problem = f"it holds no state ({error!r})"
    raise DamagedError(f"{path} must be complete and unchanged, but {problem}. Use an older file")


def _encode(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    """Turn containers and tensors into lists that begin with their type; keep plain values."""
    if isinstance(value, Mapping):
        items = []
        for key, x in value.items():
            name = f"{path}/{quote(str(key), safe=' ')}"
            items.append([_encode(key, f"{name} (a key)", arrays), _encode(x, name, arrays)])
        return ["dict", items]
    for name, container in _CONTAINERS.items():
        if isinstance(value, container):
            return [name, [_encode(x, f"{path}/{i}", arrays) for i, x in enumerate(value)]]
    if isinstance(value, torch.device):
        return ["device", str(value)]
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        as_bytes = value.dtype in _AS_BYTES
        stored = value.reshape(-1).view(torch.uint8) if as_bytes else value
        name = path if path not in arrays else f"{path}~{len(arrays)}"
        arrays[name] = stored.numpy()
        return ["tensor", name, str(value.dtype).removeprefix("torch."), list(value.shape)]
    if type(value) in (bool, int, str, type(None)) or isinstance(value, float):
        return value
    raise TypeError(
        "a saved state must be dicts, lists and tuples of tensors, numbers, strings and None, got "
        f"{type(value).__name__} at {path}. Return plain values from state_dict()."
    )


def _decode(node: Any, arrays: Mapping[str, np.ndarray]) -> Any:
    if not isinstance(node, list):
        return node
    kind, content, *details = node
    if kind == "tensor":
        dtype, shape = getattr(torch, details[0]), details[1]
        stored = torch.from_numpy(arrays[content])
        if not stored.numel():
            return torch.empty(shape, dtype=dtype)
        return (stored.view(dtype) if dtype in _AS_BYTES else stored).reshape(shape)
    if kind == "dict":
        return {_decode(key, arrays): _decode(value, arrays) for key, value in content}
    if kind == "device":
        return torch.device(content)
    return _CONTAINERS[kind](_decode(x, arrays) for x in content)
