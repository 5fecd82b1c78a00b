"""The trials of a storage at one moment: N trials, B of them drawn, T steps of a slice."""

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
    """Trials ``[N]``; a new object whenever the storage's content has changed."""

    source: Any  # version of TorchRL's storage
    seen: int  # trials written so far
    number: np.ndarray  # unique among all trials, evicted ones too
    start: np.ndarray  # row, or place in `slot`, of the first step
    length: np.ndarray
    slot: np.ndarray | None = None  # the storage's index of each place

    def index(self, position_B: np.ndarray, step_BT: Tensor) -> Tensor:
        """Return the storage's index of steps of some of them."""
        place_BT = torch.from_numpy(self.start[position_B]).unsqueeze(-1) + step_BT
        return place_BT if self.slot is None else torch.from_numpy(self.slot[place_BT.numpy()])


def trials_in(storage: TensorStorage, whole: bool, traj_key: NestedKey) -> Trials:
    """Find the trials in one of TorchRL's one-dimensional storages.

    The steps of a trajectory are joined in the order of writing, wherever they lie. A trial ends at
    a flag under ``next``, at ``is_init`` of the next step, or with its trajectory. `whole` leaves
    out trials without their first or last step. Without ``is_init``, trials must lie side by side,
    and the oldest one of a full ring counts as cut; without flags, all trajectories but the newest
    step's count as finished.
    """
    source, size = version_of(storage), len(storage)
    if not size:
        return Trials(source, 0, *(np.empty(0, np.int64) for _ in range(3)))
    data, last = storage[:], source[-1]
    if data.ndim > 1:
        raise ValueError(
            f"each item of the storage must be one step, and is a batch {[*data.shape[1:]]} of "
            "steps. Use TrialCollector, trajs_per_batch=1, or postproc=lambda x: x.reshape(-1)."
        )
    ids, ends, init = data.get(traj_key, None), trial_ends(data), data.get(keys.IS_INIT, None)
    if ids is None and ends is None:
        raise KeyError(
            f"trials need {traj_key!r}, or 'done', 'terminated' or 'truncated' under 'next', and "
            f"there are only {sorted(map(str, data.keys(True, True)))}. Store one of them."
        )
    is_full = size == storage.max_size
    ids = np.zeros(size, np.int64) if ids is None else _column(ids)
    if last is None:  # after loading: any place where a trajectory ends will do
        last = int(np.argmax(np.append(ids[:-1] != ids[1:], True)))
    slot = np.roll(np.arange(size), -(last + 1) if is_full else 0)
    order = np.argsort(ids[slot], kind="stable")
    slot = slot[order]
    ids = ids[slot]
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
    return Trials(source, len(start), number, start, length, slot)


def version_of(storage: TensorStorage) -> tuple:
    """Identify the content of a storage; the last item is the newest slot."""
    # TorchRL 0.14 has no public names for these.
    revision = getattr(storage, "_mutation_revision", None)
    last = getattr(storage, "_last_cursor_index", None)
    return id(storage), len(storage), object() if revision is None else int(revision), last


def _column(value: Tensor) -> np.ndarray:
    value = value.cpu().reshape(len(value), -1)
    return value.any(-1).numpy() if value.dtype == torch.bool else value[:, 0].numpy()
