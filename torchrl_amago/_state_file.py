"""A nested state in one file: tensors by path in numpy's `.npz` format, without pickle.

The file ends with the SHA-256 of everything before, so that any damage is found before anything is
loaded. `numpy.load` reads the file too.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import numpy as np
import torch
from torch import Tensor

from torchrl_amago._files import DamagedError, digest, replace_file

_TREE, _MARK = "tree", b"\nSHA-256 "
_TRAILER_SIZE = len(_MARK) + 64
# numpy has no such numbers: their bytes are stored.
_AS_BYTES = {
    getattr(torch, name)
    for name in ("bfloat16", "float8_e4m3fn", "float8_e5m2")
    if hasattr(torch, name)
}


def save_state(path: Path, state: Any) -> None:
    """Write a nested state in one step: a crash leaves the old file or the new one.

    Args:
        path: file to replace.
        state: dicts, lists and tuples of tensors (dense, any dtype, any device), bool, int, float,
            str and None.

    Raises:
        TypeError: for a value of another type; it is named by its path.
        OSError: where the disk is full.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     save_state(Path(folder) / "x.npz", {"w": torch.ones(2), "updates": 3})
        ...     load_state(Path(folder) / "x.npz")
        {'w': tensor([1., 1.]), 'updates': 3}
    """
    arrays: dict[str, np.ndarray] = {}
    tree = json.dumps(_encode(state, "state", arrays))
    with replace_file(path, "w+b") as file:
        np.savez(file, **{_TREE: np.frombuffer(tree.encode(), np.uint8)}, **arrays)
        end = file.seek(0, 2)
        trailer = _MARK + digest(file, end).encode()
        file.seek(end)
        file.write(trailer)


def load_state(path: Path) -> Any:
    """Read a file of :func:`save_state`, tensors on the CPU.

    Raises:
        FileNotFoundError: if there is no such file.
        DamagedError: if it is another file, or has changed.
    """
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
    raise DamagedError(
        f"{path} must be complete and unchanged, but {problem}. Take another file, such as an "
        "older checkpoint's or a copy"
    )


# Containers and tensors become lists that begin with their type; plain values stay as they are.


def _encode(value: Any, path: str, arrays: dict[str, np.ndarray]) -> Any:
    if isinstance(value, Mapping):
        below = {key: f"{path}/{quote(str(key), safe=' ')}" for key in value}
        items = ((_encode(k, f"{below[k]} (a key)", arrays), v, below[k]) for k, v in value.items())
        return ["dict", [[key, _encode(x, name, arrays)] for key, x, name in items]]
    if isinstance(value, torch.Size):
        return ["size", list(value)]
    if isinstance(value, list | tuple):
        name = "list" if isinstance(value, list) else "tuple"
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
    parts: Iterator[Any] = (_decode(x, arrays) for x in content)
    return {"list": list, "tuple": tuple, "size": torch.Size}[kind](parts)
