"""Trial-uniform, padded slices from a flat storage of whole trials.

The sampler answers with a two-dimensional index `[B, T]` into the one-dimensional storage, so that
one gather per key is all that a batch costs, and with a mask that says which of the steps are real.
A padded position repeats a real step of the same trial: what lies there is finite, and nothing else.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from tensordict import NestedKey
from torch import Tensor
from torchrl.data.replay_buffers import Sampler, Storage

from torchrl_amago.data.trial_table import TrialTable

Padding = Literal["right", "left"]
Overhang = Literal["none", "left", "right", "both"]

_STATE_FILE = "trial_slice_sampler.json"


class TrialSliceSampler(Sampler):
    """Draws a trial uniformly, then a slice of it uniformly among those that fit.

    A trial that is shorter than `slice_len` is taken whole and padded; every batch is `[B, T]` with
    T = `slice_len` (unless `trim`), and has the mask, whatever the trials' lengths. Only complete trials are drawn:
    neither one that is still being written, nor one that the write cursor has begun to overwrite.

    The storage must be one-dimensional and hold the steps of a trial side by side, the last one
    marked by `end_key`, which is what `Collector(..., trajs_per_batch=1, replay_buffer=rb)` writes.
    The table of trials follows the writes and only reads the steps that are new. Where another
    process, or somebody's `rb[...] = x`, wrote behind the sampler's back, it is built anew from
    `end_key` and `init_key`.

    Randomness comes from `ReplayBuffer(generator=...)` where one is given, else from torch's global
    generator. With `prefetch`, batches are drawn in threads: only an own generator is reproducible.

    Args:
        slice_len: steps T of each slice.
        padding: side of the slice that is padded.
        trim: make T the longest slice of the batch where that is less than `slice_len`: steps that
            would be padding in every row cost nothing then. Leave it off where shapes must not
            change, as under `torch.compile`.
        overhang: sides on which the window of T steps may stick out of a longer trial. With
            `"none"`, the steps near a trial's ends lie in fewer windows than those in the middle;
            `"left"`, `"right"` and `"both"` even that out, at the price of more padding. (The
            argument of AMAGO, arXiv 2310.09971, is called `padded_sampling`.)
        end_key: True on the last step of a trial.
        init_key: True on the first step of a trial, where the storage has such a key; None never
            looks.
        mask_key: where the mask goes in the sample.
        warn_short: whether to warn, once, when no stored trial is as long as `slice_len`.

    Raises:
        RuntimeError: from sampling, before the first complete trial (ask `rb.can_sample()`).
        ValueError: for a storage that isn't flat, or was given more steps at once than it holds.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> rb = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(100), sampler=TrialSliceSampler(3), batch_size=2
        ... )
        >>> trial = TensorDict(
        ...     {"step": torch.arange(5), "next": {"done": torch.arange(5)[:, None] == 4}}, [5]
        ... )
        >>> _ = rb.extend(trial)
        >>> batch = rb.sample()
        >>> batch.shape, batch["collector", "mask"].all().item()
        (torch.Size([2, 3]), True)
    """

    def __init__(
        self,
        slice_len: int,
        *,
        padding: Padding = "right",
        trim: bool = False,
        overhang: Overhang = "none",
        end_key: NestedKey = ("next", "done"),
        init_key: NestedKey | None = "is_init",
        mask_key: NestedKey = ("collector", "mask"),
        warn_short: bool = True,
    ):
        if slice_len < 1:
            raise ValueError(
                f"slice_len must be at least 1, got {slice_len}. It is the number of steps of each "
                "sampled slice; use the context length of the sequence model."
            )
        _check_choice("padding", padding, Padding)
        _check_choice("overhang", overhang, Overhang)
        self.slice_len = slice_len
        self.padding = padding
        self.trim = trim
        self.overhang = overhang
        self.end_key = end_key
        self.init_key = init_key
        self.mask_key = mask_key
        self._warn_short = warn_short
        self._empty()

    # -- drawing -------------------------------------------------------------------------------

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict]:
        """Draw `batch_size` slices: index `[B, T]` int64 and `{mask_key: [B, T] bool}`."""
        table = self._follow(storage)
        if table is None or not len(table):
            raise RuntimeError(
                "Sampling needs at least one complete trial, and of the "
                f"{len(storage)} steps in the buffer none form one. Collect until "
                "`rb.can_sample()` is True; if it stays False, trials are longer than the "
                f"capacity of {storage.max_size} steps, or {self.end_key!r} never marks an end."
            )
        self._warn_if_all_short(table)
        step_BT, mask_BT = self._draw(table, batch_size)
        return table.slot(step_BT), {self.mask_key: mask_BT}

    def can_sample(self, storage: Storage, batch_size: int) -> bool:
        """Whether there is a complete trial to draw from (slices are drawn with replacement)."""
        return self.num_trials(storage) > 0

    def num_trials(self, storage: Storage) -> int:
        """Number of complete trials in the storage."""
        table = self._follow(storage)
        return 0 if table is None else len(table)

    def _draw(self, table: TrialTable, batch_size: int) -> tuple[Tensor, Tensor]:
        rng, slice_len = self._rng, self.slice_len
        trial_B = torch.randint(len(table), (batch_size,), generator=rng)
        start_B, length_B = table.start[trial_B], table.length[trial_B]
        # Windows begin in [low, high]. A trial that fits into one has one window, beginning at 0.
        spare_B = length_B - slice_len
        is_long_B = spare_B > 0
        low, high_B = 0, spare_B
        if self.overhang in ("left", "both"):
            low = 1 - slice_len
        if self.overhang in ("right", "both"):
            high_B = length_B - 1
        # float64 keeps the draw uniform for any length; float32 would skip windows past 2^24.
        uniform_B = torch.rand(batch_size, dtype=torch.float64, generator=rng)
        begin_B = low + (uniform_B * (high_B - low + 1)).floor().to(torch.int64)
        begin_B = torch.where(is_long_B, begin_B, 0)
        # What sticks out is cut off: first and last step of the slice, both inside the trial.
        first_B = begin_B.clamp(min=0)
        last_B = torch.minimum(begin_B + slice_len, length_B) - 1
        real_B = last_B - first_B + 1
        width = int(real_B.max()) if self.trim else slice_len
        offset_BT = first_B.unsqueeze(-1) + torch.arange(width)
        if self.padding == "left":
            offset_BT = offset_BT - (width - real_B).unsqueeze(-1)
        inside_BT = offset_BT.clamp(first_B.unsqueeze(-1), last_B.unsqueeze(-1))
        return start_B.unsqueeze(-1) + inside_BT, inside_BT == offset_BT

    def _warn_if_all_short(self, table: TrialTable) -> None:
        if not self._warn_short:
            return
        longest = int(table.length.max())
        if longest < self.slice_len:
            warnings.warn(
                f"Slices of slice_len={self.slice_len} steps are longer than any stored trial "
                f"(the longest of {len(table)} has {longest}): every slice is padded. If trials "
                "stay that short, a smaller slice_len saves compute; warn_short=False silences "
                "this.",
                stacklevel=2,
            )
        # Either way the answer is known: later trials only make slices fit better.
        self._warn_short = False

    # -- following the writes ------------------------------------------------------------------

    def extend(self, index: Tensor) -> None:
        """Note that these slots were written; they are read when the next batch is drawn."""
        index = index.reshape(-1)
        if self._new_steps == 0:
            self._new_first = int(index[0])
        self._new_steps += index.numel()
        self._new_writes += 1
        self._largest_write = max(self._largest_write, index.numel())

    def add(self, index: int | Tensor) -> None:
        """Note that this slot was written."""
        self.extend(torch.as_tensor(index))

    def _follow(self, storage: Storage) -> TrialTable | None:
        """The table, brought up to date with the storage; None while there is nothing in it."""
        if len(storage) == 0:
            return None
        if storage.ndim != 1:
            raise ValueError(
                "TrialSliceSampler needs a flat storage (ndim=1) that holds the steps of a trial "
                f"side by side, got ndim={storage.ndim}. Use LazyMemmapStorage(capacity) and "
                "Collector(..., trajs_per_batch=1)."
            )
        if self._largest_write > storage.max_size:
            raise ValueError(
                "A write must fit into the storage, got "
                f"{self._largest_write} steps at once for a capacity of {storage.max_size}: they "
                "overwrote each other. Raise the capacity, or write fewer trials at once "
                "(Collector(..., trajs_per_write=1))."
            )
        # TorchRL's count of changes to the content, shared between processes.
        revision = storage._mutation_revision
        if revision == self._seen_revision:
            return self._table
        if self._saw_every_write(storage, revision):
            self._read_new_steps(storage)
        else:
            self._table = self._scan(storage, revision)
        self._seen_revision = revision
        self._new_steps = self._new_writes = 0
        return self._table

    def _nobody_else_wrote(self, revision: int) -> bool:
        return self._seen_revision in (None, revision - self._new_writes)

    def _saw_every_write(self, storage: Storage, revision: int) -> bool:
        table = self._table or TrialTable(storage.max_size)
        return (
            self._nobody_else_wrote(revision)
            and table.capacity == storage.max_size
            and self._new_steps <= storage.max_size
            and (not self._new_steps or self._new_first == table.written % table.capacity)
            # False for a sampler that was put onto a storage that had content already.
            and min(table.written + self._new_steps, storage.max_size) == len(storage)
        )

    def _read_new_steps(self, storage: Storage) -> None:
        if self._table is None:
            self._table = TrialTable(storage.max_size)
        if not self._new_steps:
            return
        first = self._table.written % storage.max_size
        ends = self._flags(storage, self.end_key)
        # At most two runs of slots: up to the ring's end, and from its beginning.
        stop = first + self._new_steps
        new_ends = torch.cat([ends[first:stop], ends[: max(0, stop - storage.max_size)]])
        self._table.extend(new_ends)

    def _scan(self, storage: Storage, revision: int) -> TrialTable:
        last = storage._last_cursor_index
        if self._new_steps and self._nobody_else_wrote(revision):
            cursor = self._new_first + self._new_steps
        elif last is not None:
            cursor = last + 1
        else:  # nothing was written since the storage was loaded
            cursor = 0 if self._table is None else self._table.written
        begins = None
        if self.init_key is not None and self.init_key in storage[:].keys(True):
            begins = self._flags(storage, self.init_key)
        ends = self._flags(storage, self.end_key)
        return TrialTable.scan(storage.max_size, cursor, ends, begins)

    @staticmethod
    def _flags(storage: Storage, key: NestedKey) -> Tensor:
        """A bool column of the filled part of the storage, `[n]`: a view, nothing is copied."""
        steps = storage[:]
        flags = steps.get(key, None)
        if flags is None:
            raise KeyError(
                f"The storage must mark the last step of each trial in {key!r}, but holds only "
                f"{sorted(map(str, steps.keys(True, True)))}. Pass end_key=..., or write with a "
                "Collector, which stores ('next', 'done')."
            )
        return flags.reshape(-1)

    # -- saving --------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """The table of trials, plus the steps not read yet, as plain numbers and lists."""
        return {
            "table": None if self._table is None else self._table.state_dict(),
            "new": [self._new_first, self._new_steps],
            "warn_short": self._warn_short,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        table = state_dict["table"]
        self._empty()
        self._table = None if table is None else TrialTable.from_state_dict(table)
        self._new_first, self._new_steps = state_dict["new"]
        self._warn_short = state_dict["warn_short"]

    def dumps(self, path: str | Path) -> None:
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / _STATE_FILE).write_text(json.dumps(self.state_dict()))

    def loads(self, path: str | Path) -> None:
        self.load_state_dict(json.loads((Path(path) / _STATE_FILE).read_text()))

    def _empty(self) -> None:
        self._table: TrialTable | None = None
        # The storage's revision that the table describes; None takes the next one on trust.
        self._seen_revision: int | None = None
        self._new_first = self._new_steps = self._new_writes = self._largest_write = 0

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(slice_len={self.slice_len}, padding={self.padding!r}, "
            f"overhang={self.overhang!r})"
        )


def _check_choice(name: str, value: str, choices: Any) -> None:
    allowed = get_args(choices)
    if value not in allowed:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, allowed))}, got {value!r}. "
            f"Use {allowed[0]!r} where in doubt."
        )
