"""Replay buffer of whole trials: B padded slices of T steps, from trials of at most L steps."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import Storage, TensorDictReplayBuffer
from torchrl.envs import Transform

from torchrl_amago import _files as files
from torchrl_amago import keys
from torchrl_amago._facts import check_same
from torchrl_amago._validation import check_counts
from torchrl_amago.data._trials import Trials, trial_lengths
from torchrl_amago.data.relabel.base import Relabel
from torchrl_amago.data.replay._storage import Mode, TrialStorage
from torchrl_amago.data.replay.sampler import TrialSliceSampler

_FORMAT = "torchrl_amago replay 5"
_PARTS = ("storage", "sampler", "writer")


class TrialReplayBuffer(TensorDictReplayBuffer):
    """Replay buffer that samples slices ``[B, T]`` of whole trials.

    :func:`make_trial_buffer` makes one; pickled, it opens the same folder. On TorchRL's
    one-dimensional storages, the class adds relabelling and priorities to a stock buffer with a
    :class:`TrialSliceSampler`. Batches hold the entries of the trials, the mask of real steps
    ``("collector", "mask")``, the trial's number ``"index"`` for :meth:`update_priority`, and with
    ``sample_by="priority"`` the importance weight ``"priority_weight"``.

    Args:
        relabel: changes drawn trials before slices are cut; the storage stays as it is.
        options: of :class:`torchrl.data.TensorDictReplayBuffer`; `storage` holds the trials.
    """

    def __init__(self, *, storage: Storage, relabel: Relabel | None = None, **options: Any) -> None:
        if not isinstance(relabel, Relabel | None):
            got = f"got {type(relabel).__name__}. Give other transforms to append_transform."
            raise TypeError(f"relabel must be a Relabel or None, {got}")
        # RayReplayBuffer passes a function that makes the storage.
        storage = storage if isinstance(storage, Storage) else storage()
        self.relabel, self._is_ours = relabel, isinstance(storage, TrialStorage)
        super().__init__(storage=storage, **options)
        self._facts = {"format": _FORMAT, "kind": type(self).__name__}

    def append_transform(self, transform: Transform, **options: Any) -> TrialReplayBuffer:
        """Append a transform of slices, or a relabeller as :meth:`insert_transform` does."""
        if not isinstance(transform, Relabel):
            return super().append_transform(transform, **options)
        return self.insert_transform(len(self.transform), transform, **options)

    def insert_transform(
        self, index: int, transform: Transform, *, invert: bool = False
    ) -> TrialReplayBuffer:
        """Insert a transform of slices, or the one relabeller, which comes before all others."""
        if not isinstance(transform, Relabel):
            return super().insert_transform(index, transform, invert=invert)
        if index or invert or self.relabel is not None:
            raise ValueError(
                "a buffer of trials has one relabeller, before all other transforms, got "
                f"{type(transform).__name__} at index {index} with invert={invert} beside "
                f"relabel={self.relabel}. Insert it at 0; let one Relabel do everything."
            )
        self.relabel = transform
        return self

    def extend(
        self,
        tensordicts: TensorDictBase,
        *,
        lengths: Sequence[int] | None = None,
        update_priority: bool | None = None,
    ) -> Tensor:
        """Store trials and return their numbers; the oldest make room.

        Args:
            tensordicts: steps ``[N]`` of whole trials, side by side.
            lengths: number of steps of each, for fragments of trials; by default a trial ends where
                a flag under ``next`` is True.
            update_priority: has no effect; new trials get the largest priority so far.

        Raises:
            ValueError: for steps that aren't whole trials, don't fit into the buffer, have other
                entries than those stored, or whose ``next`` isn't the root of the step after.
            OSError: if the disk is full or, in mode ``"read"``, as a PermissionError. On any error,
                nothing is stored.
        """
        if not self._is_ours:
            return super().extend(tensordicts, update_priority=update_priority)
        steps = (self.transform.inv(tensordicts) if len(self.transform) else tensordicts).cpu()
        lengths = trial_lengths(steps) if lengths is None else [int(n) for n in lengths]
        with self._replay_lock, self._write_lock:
            return torch.from_numpy(self.storage.write(steps, lengths))

    def empty(self, empty_write_count: bool = True) -> None:
        """Remove all trials, and restart the count."""
        with self._futures_lock:
            self._clear_prefetch_queue_locked()
            with self._replay_lock, self._write_lock:
                self.storage._empty()  # first: it may raise
                self.sampler._empty()
                self.writer._empty(empty_write_count)

    set_ = set_at_ = update_ = __setitem__ = TrialStorage.set

    @property
    def num_trials(self) -> int:
        """Number of stored trials."""
        with self._replay_lock:
            return len(self.sampler.trials(self.storage).length)

    @property
    def write_count(self) -> int:
        """Number of steps written so far, by all processes."""
        with self._replay_lock:
            return self.storage.trials().written if self._is_ours else super().write_count

    def _sample(self, batch_size: int) -> tuple[TensorDictBase, dict]:
        lock = self.storage.lock() if self._is_ours else contextlib.nullcontext()
        relabel = None if self.relabel is None else self._relabel
        with self._replay_lock, lock:
            index_BT, info = self.sampler.sample(self.storage, batch_size, relabel)
            options = {"reuse": True} if self._is_ours else {}
            batch = self.storage.get(index_BT, **options).update(info)
        batch = self.transform(batch) if len(self.transform) else batch
        return (batch.pin_memory() if self._pin_memory else batch), {}

    def _relabel(self, trials: Trials, position_B: Any) -> TensorDictBase:
        """Return the changed entries of trials, and their masks, ``[B, L]``."""
        length_B1 = torch.from_numpy(trials.length[position_B]).unsqueeze(-1)
        step_L, names = torch.arange(int(length_B1.max())), self.relabel.in_keys
        index_BL = trials.index(position_B, torch.minimum(step_L, length_B1 - 1))
        options = {"keys": names, "reuse": True} if self._is_ours else {}
        whole_BL = self.storage.get(index_BL, **options).select(*names)
        return self.relabel.relabel_trials(whole_BL.set(keys.MASK, step_L < length_B1), self._rng)

    def update_priority(
        self, index: Tensor | TensorDictBase, priority: Tensor | None = None
    ) -> None:
        """Set priorities of trials; those that were evicted are skipped.

        Args:
            index: numbers of trials ``[n]``; or a batch with ``td_error`` ``[B, T]``, which has no
                effect without ``sample_by="priority"``. The priority of a slice is 0.9 of the
                largest and 0.1 of the mean error of its real steps (R2D2, section 2.3).
            priority: ``[n]``, not negative.
        """
        if isinstance(index, TensorDictBase):
            if self.sampler.sample_by != "priority":
                return
            mask_BT, error_BT = index[keys.MASK], index[self.priority_key].detach()
            error_BT = torch.where(mask_BT, error_BT.reshape(mask_BT.shape).abs(), 0.0)
            mean_B = error_BT.sum(-1) / mask_BT.sum(-1).clamp(min=1)
            index, priority = index["index"][:, 0], 0.9 * error_BT.amax(-1) + 0.1 * mean_B
        with self._replay_lock:
            self.sampler.update_priority(index, priority, storage=self.storage)

    update_tensordict_priority = update_priority

    def dumps(self, path: str | Path) -> None:
        """Write trials, priorities and generator to a folder, which replaces an older one at once.

        Batches drawn ahead are not saved. Of a mixture, save its buffer ``online``.

        Raises:
            FileExistsError: if `path` exists and is neither empty nor a replay folder.
            OSError: if the disk is full; the folder stays as it was.
        """
        path = Path(path)
        with files.replace_folder(path) as folder:
            is_taken = path.is_file() or (path.is_dir() and any(path.iterdir()))
            if is_taken and not (path / files.MANIFEST).exists():
                rule = f"dumps replaces only replay folders, and {path} has no {files.MANIFEST}."
                raise FileExistsError(f"{rule} Choose another path, or remove it.")
            with self._replay_lock, self._write_lock:
                for name in _PARTS:
                    getattr(self, name).dumps(folder / name)
                state = None if self._rng is None else bytes(self._rng.get_state().tolist()).hex()
            files.write_manifest(folder, {"facts": self._facts, "generator": state})

    def loads(self, path: str | Path) -> None:
        """Replace the content by what :meth:`dumps` wrote; on an error, it stays.

        Raises:
            DamagedError: if a file is missing, changed or unlisted; a :class:`RuntimeError`.
            ValueError: if the saved buffer was made with other arguments than this one.
        """
        if not (path := Path(path)).exists():
            files.recover(path.parent, path.name)  # a crash fell between the renames of dumps
        manifest, facts = files.verify_manifest(path), self._facts
        remedy = "Use that version of torchrl_amago, and the buffer of then."
        check_same(path, manifest.get("facts", {}), facts, "format and kind", remedy)
        with self._futures_lock:
            self._clear_prefetch_queue_locked()
            with self._replay_lock, self._write_lock:
                for name in _PARTS:
                    getattr(self, name).loads(path / name)
        if (state := manifest["generator"]) is not None:
            self.set_rng(torch.Generator())
            self._rng.set_state(torch.tensor(list(bytes.fromhex(state)), dtype=torch.uint8))


def make_trial_buffer(
    capacity: int | None,
    slice_length: int,
    batch_size: int,
    *,
    path: str | Path | None = None,
    mode: Mode = "create",
    flush: bool = False,
    verify: bool = False,
    relabel: Relabel | None = None,
    prefetch: int | None = None,
    generator: torch.Generator | None = None,
    **options: Any,
) -> TrialReplayBuffer:
    """Make a memory-mapped FIFO buffer of whole trials that samples padded slices `[B, T]`.

    Args:
        capacity: environment steps to keep; None takes that of an existing folder.
        slice_length: steps T of each slice.
        batch_size: slices B of each sample.
        path: folder that keeps the trials; by default a temporary one, which is removed at exit.
        mode: `"create"` starts a new folder. `"continue"` goes on with what is there, also beside
            other processes that write to it. `"read"` never writes, and sees what others write.
        flush: wait for the disk at each write, so that trials also survive the machine's failure.
        verify: compare all values of an existing folder with their checksums, not the table alone.
        relabel: changes whole trials before slices are cut.
        prefetch: batches drawn ahead in threads; what they hold depends on when trials are written.
        generator: source of random numbers; torch's global generator by default.
        options: of :class:`TrialSliceSampler`, such as `min_trials`, `sample_by` and `crop`.

    Raises:
        ValueError: for an impossible size, or a folder of another format or capacity.
        FileExistsError: for `"create"` if trials are there already.
        FileNotFoundError: for `"read"` if there are none, or without a path.
        PermissionError: if the folder can't be written to, except for `"read"`.
        DamagedError: for a damaged folder, a :class:`RuntimeError`.

    Example:
        >>> from tensordict import TensorDict
        >>> rb = make_trial_buffer(capacity=100, slice_length=4, batch_size=3)
        >>> _ = rb.extend(TensorDict({"next": {"done": torch.arange(6) == 5}}, [6]))
        >>> rb.can_sample(), rb.sample().shape
        (True, torch.Size([3, 4]))
    """
    check_counts(batch_size=batch_size, prefetch=prefetch or 1)
    sampler = TrialSliceSampler(slice_length, **options)
    storage = TrialStorage(capacity, path=path, mode=mode, flush=flush)
    if slice_length > storage.max_size:
        rule = f"slice_length must be in [1, capacity={storage.max_size}], got {slice_length}."
        raise ValueError(f"{rule} A slice comes from one stored trial; raise the capacity.")
    if verify:
        storage.verify()
    draws = dict(batch_size=batch_size, prefetch=prefetch, generator=generator)
    return TrialReplayBuffer(storage=storage, sampler=sampler, relabel=relabel, **draws)
