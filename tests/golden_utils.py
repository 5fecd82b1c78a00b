"""Numbers recorded from the reference implementation: where they are, how close we must come.

The repository holds a subset in `tests/golden/` (its README says what the numbers are). Where the whole
set lies in `shared/golden` beside the checkout, its other cases are used as well.
"""

from __future__ import annotations

import io
import json
import lzma
from collections.abc import Mapping
from fnmatch import fnmatchcase
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

_TESTS = Path(__file__).resolve().parent
ROOTS = (_TESTS / "golden", _TESTS.parents[1] / "shared" / "golden")

RTOL = 1e-4
ATOL = 1e-5  # times the array's largest magnitude


@cache
def _manifest() -> dict[str, dict[str, Any]]:
    """Hyper-parameters and notes of every recorded case that is there, by name."""
    known: dict[str, dict[str, Any]] = {}
    for root in reversed(ROOTS):
        if (root / "manifest.json").exists():
            known |= json.loads((root / "manifest.json").read_text())["cases"]
    return {name: entry for name, entry in known.items() if _path(name) is not None}


def _path(name: str) -> Path | None:
    paths = (root / f"{name}{suffix}" for root in ROOTS for suffix in (".npz.xz", ".npz"))
    return next((path for path in paths if path.exists()), None)


@lru_cache(maxsize=4)
def _arrays(name: str) -> dict[str, Tensor]:
    path = _path(name)
    raw = lzma.decompress(path.read_bytes()) if path.suffix == ".xz" else path.read_bytes()
    with np.load(io.BytesIO(raw), allow_pickle=False) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


class GoldenCase(Mapping):
    """One recorded case: arrays as tensors by name (a copy each time), and its hyper-parameters."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.hyperparameters: dict[str, Any] = _manifest()[name]["hyperparameters"]

    def __getitem__(self, key: str) -> Tensor:
        return _arrays(self.name)[key].clone()

    def __iter__(self):
        return iter(_arrays(self.name))

    def __len__(self) -> int:
        return len(_arrays(self.name))

    def __str__(self) -> str:
        return self.name

    def starting(self, prefix: str) -> dict[str, Tensor]:
        """Entries whose name starts with `prefix`, without it."""
        return {key.removeprefix(prefix): self[key] for key in self if key.startswith(prefix)}


def cases(*patterns: str) -> list[GoldenCase]:
    """Recorded cases that are there and match any of the glob patterns, for `parametrize`.

    At least one must be: a test must not vanish because files did.
    """
    names = sorted(n for n in _manifest() if any(fnmatchcase(n, p) for p in patterns))
    assert names, f"no recorded case matches {patterns} under {ROOTS}"
    return [GoldenCase(name) for name in names]


def load(name: str) -> GoldenCase:
    """Read one case, for example `load("functional/rope")["out"]`."""
    return cases(name)[0]


def assert_close(
    actual: Tensor,
    expected: Tensor,
    msg: str = "",
    scale: Tensor | float | None = None,
    atol: float = ATOL,
) -> None:
    """Compare with recorded numbers, within the tolerances that they were recorded with.

    `scale` is the magnitude that the absolute tolerance refers to; default the largest expected.
    """
    expected = expected.to(actual.dtype)
    if scale is None:
        scale = expected.abs().max() if expected.numel() else 0.0
    torch.testing.assert_close(
        actual,
        expected,
        rtol=RTOL,
        atol=atol * float(scale),
        msg=lambda text: f"{msg}: {text}" if msg else text,
    )
