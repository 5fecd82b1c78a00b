"""Trials in any storage: their ends, by the flags under ``next``, and the places of their steps."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer, TensorStorage

from torchrl_amago import keys


class Trials(NamedTuple):
    """The trials ``[N]`` of a storage; a new object whenever its content has changed."""

    seen: int = 0  # trials written so far
    number: np.ndarray = np.empty(0, np.int64)  # unique among all trials, evicted ones too
    start: np.ndarray = np.empty(0, np.int64)  # row, or place in `slot`, of the first step
    length: np.ndarray = np.empty(0, np.int64)
    slot: np.ndarray | None = None  # the index of each place in TorchRL's storages
    entries: np.ndarray | None = None  # those of a folder's table, and the rows up to their end
    num_rows: int = 0
    written: int = 0  # steps written to a folder so far, by all processes

    def index(self, position_B: np.ndarray, step_BT: Tensor) -> Tensor:
        """Return the storage's index of steps of some of them."""
        place_BT = torch.from_numpy(self.start[position_B]).unsqueeze(-1) + step_BT
        return place_BT if self.slot is None else torch.from_numpy(self.slot[place_BT.numpy()])


def trial_ends(steps: TensorDictBase) -> Tensor | None:
    """Find the steps ``[N]`` that end their trial: bool ``[N]``, or None without any flag."""
    flags = [steps.get(("next", key), None) for key in ("done", "terminated", "truncated")]
    flags = [flag.unsqueeze(-1).flatten(1).any(-1) for flag in flags if flag is not None]
    return torch.stack(flags).any(0) if flags else None


def known_ends(steps: TensorDictBase) -> Tensor:
    """Find the steps ``[N]`` that end their trial; ValueError unless flags mark them."""
    ends = trial_ends(steps) if steps.ndim == 1 else None
    if ends is None:
        raise ValueError(
            "a write must be the steps [N] of whole trials with a flag 'done', 'terminated' or "
            f"'truncated' under 'next', got steps {[*steps.shape]} with "
            f"{sorted(map(str, steps.keys(True, True)))}. "
            "Use TrialCollector, or Collector(..., trajs_per_batch=1)."
        )
    return ends


def trial_lengths(steps: TensorDictBase) -> list[int]:
    """Return lengths of trials side by side; ValueError for steps after the last end."""
    last = known_ends(steps).nonzero().squeeze(-1)
    open_steps = len(steps) - 1 - (int(last[-1]) if len(last) else -1)
    if open_steps:
        raise ValueError(
            f"a write must end with the end of a trial, got {open_steps} steps after the last one "
            "that is done. Write trials when they are complete; for pieces of endless ones give "
            "lengths=, or use TrialCollector(fragment_length=...)."
        )
    return torch.diff(last, prepend=last.new_tensor([-1])).tolist()


def find_trials(storage: TensorStorage, traj_key: NestedKey, whole: bool) -> Trials:
    """Find the trials in one of TorchRL's one-dimensional storages, by looking at all steps.

    Steps are sorted by trajectory, then in the order of writing. Without ``is_init``, trials must
    lie side by side, and the oldest one of a full ring counts as cut; without flags, all
    trajectories but the newest step's count as finished.

    Args:
        traj_key: entry with a number for each trajectory, which may be missing.
        whole: leave out trials without their first or last step.
    """
    size, newest = len(storage), storage._last_cursor_index
    if not size:
        return Trials()
    steps = storage[:]
    if steps.ndim > 1:
        raise ValueError(
            f"each item of the storage must be one step, and is a batch {[*steps.shape[1:]]} of "
            "steps. Use TrialCollector, trajs_per_batch=1, or postproc=lambda x: x.reshape(-1)."
        )
    marks = steps.get(traj_key, None), trial_ends(steps), steps.get(keys.IS_INIT, None)
    ids, ends, init = (x if x is None else x.cpu().reshape(size, -1)[:, 0].numpy() for x in marks)
    if ids is None and ends is None:
        raise KeyError(
            f"trials need {traj_key!r}, or 'done', 'terminated' or 'truncated' under 'next', and "
            f"there are only {sorted(map(str, steps.keys(True, True)))}. Store one of them."
        )
    ids = np.zeros(size, np.int64) if ids is None else ids
    if newest is None:  # after loading: any place where a trajectory ends will do
        newest = int(np.argmax(np.append(ids[:-1] != ids[1:], True)))
    is_full = size == storage.max_size
    slot = np.roll(np.arange(size), -(newest + 1) if is_full else 0)
    order = np.argsort(ids[slot], kind="stable")
    slot = slot[order]
    ids, ends, init = (x if x is None else x[slot] for x in (ids, ends, init))
    begins = np.append(True, ids[1:] != ids[:-1])
    begins[1:] |= False if ends is None else ends[:-1]
    ends = ids != ids[order.argmax()] if ends is None else ends
    init = begins & ((order > 0) | (not is_full)) if init is None else init
    start = np.flatnonzero(begins | init)
    length = np.diff(start, append=size)
    if whole:
        is_whole = init[start] & ends[start + length - 1]
        start, length = start[is_whole], length[is_whole]
    # Unique as long as the trajectories' numbers are: slots alone are used again.
    number = ids[start] * storage.max_size + slot[start]
    return Trials(len(start), number, start, length, slot)


def newest_steps(buffer: ReplayBuffer, count: int) -> TensorDictBase:
    """Read the steps ``[n]`` that were written last, at most `count`, in the order of writing."""
    storage, written, count = buffer.storage, buffer.write_count, min(count, len(buffer))
    if hasattr(storage, "trials"):  # a folder of trials has its own order, and forgets whole ones
        return storage[len(buffer) - count :]
    return storage.get(torch.arange(written - count, written) % storage.max_size)
