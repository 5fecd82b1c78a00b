"""How the entries of a step lie in the bytes of a row, each value once.

TorchRL's steps say everything twice: ``next`` of step t is the root of step t + 1. Here a trial of
L steps is L + 1 rows. Row t has the root entries of step t and what step t brought about (reward);
the last row has what the last step led to. One row is one run of bytes, so that a slice of a trial is
one copy, whatever the number of entries.

Legend: B slices, W rows of a slice, N steps, R bytes of a row.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, is_leaf_nontensor
from torch import Tensor

Kind = Literal["both", "root", "next"]

# How many pairs (next of step t, root of step t + 1) of a write are compared.
_CHECKED_PAIRS = 64


class Column(NamedTuple):
    """One entry: where it comes from, and where its bytes begin in a row."""

    key: tuple[str, ...]
    kind: Kind
    dtype: torch.dtype
    shape: tuple[int, ...]
    offset: int

    @property
    def num_bytes(self) -> int:
        """Bytes of one value."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def view(self, rows: Tensor) -> Tensor:
        """Bytes ``[*, R]`` seen as this entry ``[*, *shape]``; nothing is copied."""
        values = rows[..., self.offset : self.offset + self.num_bytes].view(self.dtype)
        if len(self.shape) == 1:
            return values
        return values.squeeze(-1) if not self.shape else values.unflatten(-1, self.shape)


class RowLayout:
    """The entries of a storage and their places.

    Entries that TorchRL keeps for itself are left out: those under ``"collector"`` and those whose name
    begins with an underscore.

    Args:
        columns: the entries.

    Example:
        >>> steps = TensorDict({"x": torch.arange(2.0), "next": {"x": torch.arange(1.0, 3.0),
        ...                     "reward": torch.ones(2, 1)}}, [2])
        >>> layout = RowLayout.of(steps)
        >>> {column.key: column.kind for column in layout.columns}
        {('reward',): 'next', ('x',): 'both'}
        >>> layout.row_bytes
        8
    """

    def __init__(self, columns: Sequence[Column]) -> None:
        self.columns = tuple(columns)
        end = max((column.offset + column.num_bytes for column in self.columns), default=1)
        widest = max((column.dtype.itemsize for column in self.columns), default=1)
        self.row_bytes = -(-end // widest) * widest

    @classmethod
    def of(cls, steps: TensorDictBase) -> RowLayout:
        """The layout that holds steps like these.

        Raises:
            TypeError: for entries that aren't tensors.
            ValueError: for an entry that is of another shape or dtype under ``next``, or for none.
        """
        root, following = _entries(steps)
        found = []
        for key in sorted(root.keys() | following.keys()):
            here, there = root.get(key), following.get(key)
            if here is not None and there is not None:
                if here.shape != there.shape or here.dtype != there.dtype:
                    raise ValueError(
                        f"{key} must be of one shape and dtype in the root and under 'next', got "
                        f"{[*here.shape[1:]]} {here.dtype} and {[*there.shape[1:]]} {there.dtype}. "
                        "Make the environment's specs agree, or leave one of them out."
                    )
                kind: Kind = "both"
            else:
                kind = "next" if here is None else "root"
            value = there if here is None else here
            found.append((key, kind, value.dtype, tuple(value.shape[1:])))
        if not found:
            raise ValueError(
                "a replay buffer needs steps with at least one entry, got none. Write what a "
                "collector gives."
            )
        # Wide types first: every entry is then aligned without gaps.
        found.sort(key=lambda entry: -entry[2].itemsize)
        columns, offset = [], 0
        for entry in found:
            columns.append(Column(*entry, offset))
            offset += columns[-1].num_bytes
        return cls(columns)

    # -- description -----------------------------------------------------------------------------

    def to_json(self) -> dict[str, Any]:
        """Everything as plain values."""
        return {
            "byteorder": sys.byteorder,
            "row_bytes": self.row_bytes,
            "columns": [
                {
                    **column._asdict(),
                    "key": list(column.key),
                    "dtype": str(column.dtype).removeprefix("torch."),
                    "shape": list(column.shape),
                }
                for column in self.columns
            ],
        }

    @classmethod
    def from_json(cls, description: dict[str, Any]) -> RowLayout:
        """The inverse of :meth:`to_json`."""
        return cls(
            [
                Column(
                    tuple(column["key"]),
                    column["kind"],
                    getattr(torch, column["dtype"]),
                    tuple(column["shape"]),
                    column["offset"],
                )
                for column in description["columns"]
            ]
        )

    def differences(self, other: RowLayout) -> str:
        """What differs between this layout and another one, for a message; empty if nothing does."""
        mine, others = ({c.key: c for c in layout.columns} for layout in (self, other))
        return "; ".join(
            f"{'.'.join(key)}: {_describe(mine.get(key))} stored, {_describe(others.get(key))} here"
            for key in sorted(mine.keys() | others.keys())
            if _describe(mine.get(key)) != _describe(others.get(key))
        )

    def __getitem__(self, key: NestedKey) -> Column:
        """The column of a root key, or of a key under ``next``."""
        parts = _parts(key)
        under_next = parts[0] == "next"
        wanted = parts[1:] if under_next else parts
        for column in self.columns:
            if column.key == wanted and column.kind in ("both", "next" if under_next else "root"):
                return column
        raise KeyError(
            f"an entry must be one that the trials have, got {key!r}. There are "
            f"{sorted('.'.join(column.key) for column in self.columns)}."
        )

    # -- writing ---------------------------------------------------------------------------------

    def write(self, rows: Tensor, steps: TensorDictBase, row_N: Tensor, last_K: Tensor) -> None:
        """Put steps into rows.

        Args:
            rows: all rows, uint8 ``[C, R]``; changed.
            steps: ``[N]``, trials side by side.
            row_N: row of each step.
            last_K: which of the steps end the K trials.
        """
        root, following = _entries(steps)
        after_K = row_N[last_K] + 1
        for column in self.columns:
            values = column.view(rows)
            here = following[column.key] if column.kind == "next" else root[column.key]
            values[row_N] = here
            # What a last step brought about is nowhere else, the rest only has to be finite there.
            ahead = following[column.key] if column.kind == "both" else here
            values[after_K] = ahead[last_K]

    def check_pairs(self, steps: TensorDictBase, last_K: Tensor) -> None:
        """Compare ``next`` of some steps to the root of the steps after them.

        Args:
            steps: ``[N]``, trials side by side.
            last_K: which of them end a trial.

        Raises:
            ValueError: where they differ: only one of them would be kept.
        """
        root, following = _entries(steps)
        has_next = torch.ones(len(steps), dtype=torch.bool)
        has_next[last_K] = False
        step = has_next.nonzero().squeeze(-1)
        step = step[:: max(1, len(step) // _CHECKED_PAIRS)]
        for column in self.columns:
            if column.kind != "both":
                continue
            ahead, then = following[column.key][step], root[column.key][step + 1]
            same = (ahead == then) | ((ahead != ahead) & (then != then))  # NaN equals NaN here
            if not same.all():
                raise ValueError(
                    f"('next', {'.'.join(column.key)!r}) of a step must equal {'.'.join(column.key)!r} "
                    f"of the step after it, and differs in {int((~same).sum())} values: only one of "
                    "them is stored. Let the environment show the same in both, leave the entry "
                    "out of 'next', or rename it there."
                )

    # -- reading ---------------------------------------------------------------------------------

    def read(
        self, rows: Tensor, keys: Sequence[NestedKey] | None = None, row: Tensor | None = None
    ) -> TensorDict:
        """Steps ``[*, W - 1]`` in rows ``[*, W, R]``.

        Args:
            rows: bytes.
            keys: entries of root and ``next`` to read; all by default.
            row: ``[*, W]``, which of the rows ``[C, R]`` to read. Without, nothing is copied: what is given
                are views of ``rows``.
        """
        columns = self.columns if keys is None else {self[key]: None for key in keys}
        wanted = None if keys is None else {_parts(key) for key in keys}
        shape = rows.shape[:-1] if row is None else row.shape
        dim, length = len(shape) - 1, shape[-1] - 1
        root: dict[str, Any] = {}
        following: dict[str, Any] = {}
        for column in columns:
            values = column.view(rows) if row is None else column.view(rows)[row]
            here = values.narrow(dim, 0, length)
            if column.kind != "next" and (wanted is None or column.key in wanted):
                _set(root, column.key, here)
            if column.kind != "root" and (wanted is None or ("next", *column.key) in wanted):
                ahead = values.narrow(dim, 1, length) if column.kind == "both" else here
                _set(following, column.key, ahead)
        return TensorDict({**root, "next": following} if following else root, (*shape[:-1], length))


def _entries(steps: TensorDictBase) -> tuple[dict, dict]:
    """The tensors to keep of the root, and of ``next``, by their key as a tuple."""
    root: dict[tuple[str, ...], Tensor] = {}
    following: dict[tuple[str, ...], Tensor] = {}
    for key, value in steps.items(True, True, is_leaf=is_leaf_nontensor):
        parts = _parts(key)
        under_next = parts[0] == "next"
        name = parts[1:] if under_next else parts
        if name[0] == "collector" or any(part.startswith("_") for part in name):
            continue
        if not isinstance(value, Tensor):
            raise TypeError(
                f"a replay buffer stores tensors, got {type(value).__name__} at {key!r}. Encode it "
                "as a tensor, or exclude it."
            )
        (following if under_next else root)[name] = value
    return root, following


def _parts(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)


def _set(entries: dict[str, Any], key: tuple[str, ...], value: Tensor) -> None:
    for part in key[:-1]:
        entries = entries.setdefault(part, {})
    entries[key[-1]] = value


def _describe(column: Column | None) -> str:
    if column is None:
        return "nothing"
    where = {"both": "root and next", "root": "root only", "next": "next only"}[column.kind]
    return f"{[*column.shape]} {str(column.dtype).removeprefix('torch.')} ({where})"
