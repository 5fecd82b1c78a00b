"""Nested states in one file: exact round trips, and no damage unnoticed."""

from __future__ import annotations

import hashlib
import random
from collections import OrderedDict

import numpy as np
import pytest
import torch

from tests.data.trials import flipped
from torchrl_amago._files import DamagedError
from torchrl_amago._state_file import load_state, save_state

DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn,
    torch.float8_e5m2, torch.complex64, torch.complex128, torch.int8, torch.int16,
    torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool,
]  # fmt: skip


def same(a, b) -> bool:
    if isinstance(a, torch.Tensor):
        is_alike = type(b) is torch.Tensor and (a.dtype, a.shape) == (b.dtype, b.shape)
        # Bytes: NaN isn't equal to itself, and not all dtypes know equality.
        stored = [x.contiguous().reshape(-1).view(torch.uint8) for x in (a, b)]
        return is_alike and torch.equal(*stored)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return type(a) is type(b) and len(a) == len(b) and all(map(same, a, b))
    return type(a) is type(b) and repr(a) == repr(b)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_tensors_of_every_dtype_come_back(tmp_path, dtype):
    full = (torch.arange(24) % 7).to(torch.float32).reshape(2, 3, 4).to(dtype)
    state = {"full": full, "scalar": full[1, 2, 3], "empty": full[:0], "cut": full[:, ::2].mT}
    save_state(tmp_path / "x.npz", state)
    assert same(state, load_state(tmp_path / "x.npz"))


def test_nested_values_come_back_exactly(tmp_path):
    nested = {
        "numbers": [0.1 + 0.2, float("inf"), -float("inf"), float("nan"), -0.0, 1e-320, 2**80, -1],
        "others": (None, True, False, "text with / and \u2713", ()),
        "odd keys": {0: 1, 0.5: 2, None: 3, True: 4, ("a", 1): 5, "a/b": torch.ones(1),
                     "a": {"b": torch.zeros(1)}},
        "same names": {"0": torch.ones(1), 0: torch.zeros(1)},
        "sizes": (torch.Size([2, 3]), torch.device("cpu")),
        "empty": [{}, [], ""],
        "file": torch.tensor([float("nan"), -0.0]),
    }  # fmt: skip
    for state in (nested, torch.ones(2), OrderedDict(a=1)):
        save_state(tmp_path / "x.npz", state)
        assert same(state, load_state(tmp_path / "x.npz"))


def test_numpy_reads_it_without_pickle(tmp_path):
    save_state(tmp_path / "x.npz", {"net": {"weight": torch.ones(2)}})
    with np.load(tmp_path / "x.npz", allow_pickle=False) as arrays:
        assert arrays["state/net/weight"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": [object()]}, "got object at state/a/0"),
        ({np.int64(1): 1}, r"got int64 at state/1 \(a key\)"),
        ({"a": np.int64(1)}, "got int64 at state/a"),
    ],
)
def test_other_values_are_refused_and_the_old_file_stays(tmp_path, value, message):
    save_state(tmp_path / "x.npz", {"a": 1})
    with pytest.raises(TypeError, match=message):
        save_state(tmp_path / "x.npz", value)
    assert load_state(tmp_path / "x.npz") == {"a": 1}


def assert_all_refused(path, contents):
    for content in contents:
        path.write_bytes(content)
        with pytest.raises(DamagedError, match=r"x\.npz must be complete and unchanged"):
            load_state(path)


def test_any_flipped_bit_and_any_truncation_is_found(tmp_path):
    path = tmp_path / "x.npz"
    save_state(path, {"w": torch.randn(50), "b": torch.randn(3).bfloat16(), "n": 3})
    content, rng = path.read_bytes(), random.Random(0)
    places = ((rng.randrange(len(content)), rng.randrange(8)) for _ in range(200))
    assert_all_refused(path, (flipped(content, *place) for place in places))
    lengths = [0, 1, 72, 73, *rng.sample(range(len(content)), 100)]
    assert_all_refused(path, (content[:length] for length in lengths))


def test_other_files_are_refused(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(FileNotFoundError):
        load_state(path)
    torch.save({"a": torch.ones(100)}, path)
    assert_all_refused(path, (path.read_bytes(), b"", b"some text", b"x" * 5000))


def write_with_checksum(path, savez, tree, array):
    with path.open("wb") as file:
        savez(file, tree=np.frombuffer(tree.encode(), np.uint8), array=array)
    content = path.read_bytes()
    path.write_bytes(content + b"\nSHA-256 " + hashlib.sha256(content).hexdigest().encode())


@pytest.mark.parametrize(
    "tree",
    [
        "{", "[" * 10_000, '["tensor", "w", "float32", [1]]', '["exec", "w"]', '["size", 3]',
        '["tensor", "array", "load", [1]]', '["tensor", "array", "float32", [1000000000000]]',
    ],
)  # fmt: skip
def test_other_content_with_a_checksum_that_fits_is_refused(tmp_path, tree):
    write_with_checksum(tmp_path / "x.npz", np.savez, tree, np.zeros(0))
    with pytest.raises(DamagedError, match="it holds no state"):
        load_state(tmp_path / "x.npz")


def test_a_packed_file_is_not_unpacked(tmp_path):
    """A few kilobytes may hold gigabytes."""
    path, tree = tmp_path / "x.npz", '["tensor", "array", "uint8", [10000000]]'
    write_with_checksum(path, np.savez_compressed, tree, np.zeros(10_000_000, np.uint8))
    assert path.stat().st_size < 20_000
    with pytest.raises(DamagedError, match="its content is packed"):
        load_state(path)
