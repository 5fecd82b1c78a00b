"""The trials of a storage at one moment, as a sampler sees them: N trials, B of them drawn, T steps of a slice."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from tensordict import NestedKey
from torch import Tensor
from torchrl.data import TensorStorage

from torchrl_amago import keys
from torchrl_amago.data._trial_ends import trial_ends


class Trials(NamedTuple):
    """Trials ``[N]``: their numbers, which no others have, the rows or places where they begin, and lengths."""

    version: Any  # tells states of the storage apart
    seen: int  # trials written so far
    number: np.ndarray
    start: np.ndarray
    length: np.ndarray
    slot: np.ndarray | None = None  # the storage's index of each place, where that is another one

    def index(self, position_B: np.ndarray, step_BT: Tensor) -> Tensor:
        """Give the storage's index of steps of some of them."""
        place_BT = torch.from_numpy(self.start[position_B]).unsqueeze(-1) + step_BT
        return place_BT if self.slot is None else torch.from_numpy(self.slot[place_BT.numpy()])


def trials_in(storage: TensorStorage, whole: bool, traj_key: NestedKey) -> Trials:
    """Find the trials in one of TorchRL's one-dimensional storages, whoever filled it.

    A trajectory's steps are joined in the order of writing, wherever they lie. A trial ends where a flag under ``next``
    says so, or where another trajectory or ``is_init`` begins the next one. With `whole`, those are left out whose
    first or last step isn't there. Where ``is_init`` isn't stored and the ring is full, nothing else tells
    that a trial has lost its first steps: then the oldest step's counts as cut, and trials must lie side by side.
    Where no flag is stored, all trajectories but the newest step's count as finished.

    Raises:
        KeyError: where neither trajectories nor ends are stored.
        ValueError: where an element isn't a step.
    """
    version, size = version_of(storage), len(storage)
    if not size:
        return Trials(version, 0, *(np.empty(0, np.int64) for _ in range(3)))
    data, last = storage[:], version[-1]
    if data.ndim > 1:
        raise ValueError(
            f"each item of the storage is a batch {[*data.shape[1:]]} of steps, and must be one step. Use "
            "TrialCollector, trajs_per_batch=1, or postproc=lambda batch: batch.reshape(-1)."
        )
    ids, ends, init = data.get(traj_key, None), trial_ends(data), data.get(keys.IS_INIT, None)
    if ids is None and ends is None:
        raise KeyError(
            f"trials are told apart by {traj_key!r}, or by 'done', 'terminated' or 'truncated' under "
            f"'next', and there are only {sorted(map(str, data.keys(True, True)))}. Store one of them."
        )
    is_full = size == storage.max_size
    ids = np.zeros(size, np.int64) if ids is None else _column(ids)
    if last is None:  # of a storage that was loaded: any place where no trajectory goes on will do
        last = int(np.argmax(np.append(ids[:-1] != ids[1:], True)))
    slot = np.roll(np.arange(size), -(last + 1) if is_full else 0)
    ids = ids[slot]
    order = np.argsort(ids, kind="stable")
    slot, ids = slot[order], ids[order]
    begins = np.append(True, ids[1:] != ids[:-1])
    if ends is not None:
        ends = _column(ends)[slot]
        begins[1:] |= ends[:-1]
    if init is not None:
        init = _column(init)[slot]
        begins |= init
    start = np.flatnonzero(begins)
    length = np.diff(start, append=size)
    if whole:
        is_ended = ids[start] != ids[order.argmax()] if ends is None else ends[start + length - 1]
        is_begun = init[start] if init is not None else (order[start] > 0) | (not is_full)
        start, length = start[is_ended & is_begun], length[is_ended & is_begun]
    # Unique as long as the trajectories' numbers are: slots alone are used again.
    number = ids[start] * storage.max_size + slot[start]
    return Trials(version, len(start), number, start, length, slot)


def version_of(storage: TensorStorage) -> tuple:
    """Tell states of a storage apart, whichever process wrote. The last item is the slot written last."""
    # TorchRL 0.14 has no public names for these.
    revision = getattr(storage, "_mutation_revision", None)
    last = getattr(storage, "_last_cursor_index", None)
    return id(storage), len(storage), object() if revision is None else int(revision), last


def _column(value: Tensor) -> np.ndarray:
    value = value.cpu().reshape(len(value), -1)
    return value.any(-1).numpy() if value.dtype == torch.bool else value[:, 0].numpy()
