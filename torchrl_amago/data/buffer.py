"""A TorchRL replay buffer of whole trials that gives padded slices of them.

Legend: B slices of a batch, T steps of a slice, L steps of the longest trial drawn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import TensorDictReplayBuffer
from torchrl.data.replay_buffers import Writer
from torchrl.envs import Transform

from torchrl_amago import keys
from torchrl_amago.data.relabel.base import Relabel
from torchrl_amago.data.slices import Draw, Overhang, Padding, Trials, TrialSliceSampler
from torchrl_amago.data.trial_ends import trial_ends
from torchrl_amago.data.trial_storage import Mode, TrialStorage

# Shares of the largest and of the mean error of a slice in its priority (R2D2, section 2.3).
_MAX_SHARE, _MEAN_SHARE = 0.9, 0.1


class TrialWriter(Writer):
    """Writes whole trials to a :class:`TrialStorage`."""

    def add(self, data: Any) -> int:
        raise TypeError(
            "a buffer of trials takes whole trials, not single steps. Write them with extend."
        )

    def extend(self, data: TensorDictBase, lengths: Sequence[int] | None = None) -> Tensor:
        lengths = _trial_lengths(data) if lengths is None else [int(n) for n in lengths]
        return torch.from_numpy(self._storage.write(data, lengths))

    def _empty(self, empty_write_count: bool = True) -> None:
        """Nothing of its own to forget."""

    def dumps(self, path: str | Path) -> None:
        """Nothing of its own to save."""

    def loads(self, path: str | Path) -> None:
        """Nothing of its own to load."""

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Nothing of its own to load."""


class TrialReplayBuffer(TensorDictReplayBuffer):
    """Stores whole trials once, and samples slices ``[B, T]`` of them.

    Made by :func:`make_trial_buffer`. Sent to another process, it opens the same folder there.
    Besides the entries of the trials, a batch has

    ========================= ============= ===========================================================
    ``("collector", "mask")`` bool          True on real steps, False on padding
    ``"index"``               int64         number of the trial, for :meth:`update_priority`
    ``"priority_weight"``     float32       importance weight, with ``draw="priority"``
    ========================= ============= ===========================================================

    each ``[B, T]``. Padding repeats a state of the same trial: it is finite, and nothing else.
    Entries of root and ``next`` are views of the same memory, one step apart: clone a batch before
    changing it in place (the buffer's own transforms get it cloned).

    Args:
        storage: the trials.
        sampler: draws slices.
        relabel: changes trials before they are cut to slices; the storage stays as it is.
        options: of :class:`torchrl.data.TensorDictReplayBuffer`.

    Example:
        >>> rb = TrialReplayBuffer(
        ...     storage=TrialStorage(100), sampler=TrialSliceSampler(4, warn_short=False), batch_size=2)
        >>> done = torch.tensor([[False], [True], [True]])
        >>> rb.extend(TensorDict({"next": {"done": done}}, [3])).tolist()
        [0, 1]
        >>> rb.num_trials, len(rb), rb.sample()["collector", "mask"].shape
        (2, 3, torch.Size([2, 4]))
    """

    def __init__(
        self,
        *,
        storage: TrialStorage,
        sampler: TrialSliceSampler,
        relabel: Relabel | None = None,
        **options: Any,
    ) -> None:
        if not isinstance(relabel, Relabel | None):
            raise TypeError(
                f"relabel must be a Relabel or None, got {type(relabel).__name__}. Subclass Relabel, or "
                "give other transforms to append_transform."
            )
        self.relabel = relabel
        super().__init__(
            storage=storage,
            sampler=sampler,
            writer=TrialWriter(),
            collate_fn=_identity,
            **options,
        )

    # -- transforms ------------------------------------------------------------------------------

    def append_transform(self, transform: Transform, *, invert: bool = False) -> TrialReplayBuffer:
        """Append a transform; a relabeller becomes the buffer's ``relabel``.

        Raises:
            ValueError: for a relabeller after another one, or after other transforms, which get slices.
        """
        if isinstance(transform, Relabel):
            return self.insert_transform(len(self._transform), transform, invert=invert)
        return super().append_transform(transform, invert=invert)

    def insert_transform(
        self, index: int, transform: Transform, *, invert: bool = False
    ) -> TrialReplayBuffer:
        """Insert a transform; see :meth:`append_transform`."""
        if not isinstance(transform, Relabel):
            return super().insert_transform(index, transform, invert=invert)
        if index or invert or self.relabel is not None:
            raise ValueError(
                "a buffer of trials has one relabeller, which reads what is stored, before all other "
                f"transforms, got {type(transform).__name__} at index {index} with invert={invert} "
                f"beside relabel={self.relabel}. Insert it at 0; to do two things, write one Relabel "
                "that does both."
            )
        self.relabel = transform
        return self

    # -- writing ---------------------------------------------------------------------------------

    def extend(
        self,
        tensordicts: TensorDictBase,
        *,
        lengths: Sequence[int] | None = None,
        update_priority: bool | None = None,
    ) -> Tensor:
        """Store trials; the oldest ones make room.

        Args:
            tensordicts: steps ``[N]`` of whole trials, side by side.
            lengths: number of steps of each; by default a trial ends where ``("next", "done")``,
                ``"terminated"`` or ``"truncated"`` is True. Needed for fragments of a trial.
            update_priority: has no effect; new trials have the largest priority so far.

        Returns:
            The trials' numbers.

        Raises:
            ValueError: for steps that aren't whole trials, don't fit into the buffer, or have other
                entries than those stored.
            OSError: where the disk is full.
        """
        if self._transform is not None and len(self._transform):
            tensordicts = self._transform.inv(tensordicts)
        with self._replay_lock, self._write_lock:
            return self._writer.extend(tensordicts, lengths)

    # -- reading ---------------------------------------------------------------------------------

    @property
    def num_trials(self) -> int:
        """Trials that are there."""
        with self._replay_lock:
            return len(self._storage.follow())

    @property
    def write_count(self) -> int:
        """Steps written so far, by all processes."""
        with self._replay_lock:
            return self._storage.follow().written

    def newest(self, count: int) -> TensorDict:
        """The steps written last ``[n]``, at most as many as are there, in the order of writing."""
        with self._replay_lock:
            return self._storage.newest(count)

    def _sample(self, batch_size: int) -> tuple[TensorDictBase, dict]:
        with self._replay_lock:
            batch = None
            while batch is None:
                batch = self._read(batch_size)
        if self._transform is not None and len(self._transform):
            # Until here root and `next` are views of the same rows; transforms may work in place.
            batch["next"] = batch["next"].clone()
            batch = self._transform(batch)
        if self._pin_memory:
            batch = batch.pin_memory()
        return batch, {}

    def _read(self, batch_size: int) -> TensorDictBase | None:
        """A batch; None if another process evicted one of its trials while it was read."""
        storage, sampler = self._storage, self._sampler
        trials = sampler.trials(storage.follow(), batch_size)
        length_B, replaced_BL = trials.length, None
        if self.relabel is not None:
            whole_BL = self._whole(trials)
            # Before it is relabelled: what is no trial would look like a wrong reward function.
            if not self._are_there(trials):
                return None
            replaced_BL = self.relabel.relabel_trials(whole_BL, self._rng)
            length_B = replaced_BL.get(keys.MASK).sum(-1)
        windows = sampler.windows(length_B)
        pad_left = sampler.padding == "left"
        batch = storage.read_slices(
            trials.first + windows.offset, windows.real, windows.width, pad_left=pad_left
        )
        if not self._are_there(trials):
            return None
        step_BT, mask_BT = sampler.steps(windows)
        if replaced_BL is not None:
            replaced_BL = replaced_BL.exclude("collector")
            if pad_left or windows.offset.any() or windows.width > replaced_BL.shape[1]:
                rows = torch.arange(batch_size).unsqueeze(-1)
                batch.update(replaced_BL[rows, step_BT])
            else:  # whole trials: nothing to copy
                batch.update(replaced_BL[:, : windows.width])
        batch.set(keys.MASK, mask_BT)
        batch.set("index", trials.number.unsqueeze(-1).expand(mask_BT.shape))
        if trials.weight is not None:
            batch.set("priority_weight", trials.weight.unsqueeze(-1).expand(mask_BT.shape))
        return batch

    def _are_there(self, trials: Trials) -> bool:
        """Whether none of the trials has been evicted, so that all that was read is theirs."""
        return int(trials.number.min()) >= self._storage.follow().begin

    def _whole(self, trials: Trials) -> TensorDict:
        """What the relabeller reads of trials, and the mask: ``[B, L]``."""
        whole_BL = self._storage.read_columns(
            trials.first, trials.length, list(self.relabel.in_keys)
        )
        step_L = torch.arange(whole_BL.shape[1])
        return whole_BL.set(keys.MASK, step_L < trials.length.unsqueeze(-1))

    def set_(self, *_: Any, **__: Any) -> None:
        """Refused, as are ``set_at_``, ``update_`` and ``rb[...] = ...``: trials don't change in place."""
        self._storage.set(None, None)

    set_at_ = update_ = __setitem__ = set_

    # -- priorities ------------------------------------------------------------------------------

    def update_priority(
        self, index: Tensor | TensorDictBase, priority: Tensor | None = None
    ) -> None:
        """Set priorities of trials.

        Args:
            index: numbers of trials ``[n]``; or a batch that a loss has put ``td_error`` ``[B, T]``
                into, of which the real steps count: 0.9 of their largest and 0.1 of their mean error
                (R2D2, section 2.3).
            priority: ``[n]``, not negative.
        """
        if isinstance(index, TensorDictBase):
            self.update_tensordict_priority(index)
            return
        with self._replay_lock:
            self._sampler.update_priority(index, priority, storage=self._storage)

    def update_tensordict_priority(self, data: TensorDictBase) -> None:
        """As :meth:`update_priority` of a batch; without effect where priorities aren't used."""
        if self._sampler.draw != "priority":
            return
        mask_BT, error_BT = data.get(keys.MASK), data.get(self.priority_key, None)
        if error_BT is None:
            raise KeyError(
                f"new priorities are made of a batch's {self.priority_key!r}, and it holds only "
                f"{sorted(map(str, data.keys(True, True)))}. Let the loss write it, or name it with "
                "priority_key."
            )
        error_BT = error_BT.reshape(mask_BT.shape).abs()
        error_BT = torch.where(mask_BT, error_BT, 0.0)
        mean_B = error_BT.sum(-1) / mask_BT.sum(-1).clamp(min=1)
        priority_B = _MAX_SHARE * error_BT.amax(-1) + _MEAN_SHARE * mean_B
        self.update_priority(data.get("index")[:, 0].cpu(), priority_B.detach().cpu())

    # -- saving ----------------------------------------------------------------------------------

    def dumps(self, path: str | Path) -> None:
        """Write trials, priorities and generator to a folder; the trials' part can be opened alone.

        Batches that ``prefetch`` has drawn ahead are not saved.
        """
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        with self._replay_lock, self._write_lock:
            self._storage.dumps(path / "storage")
            self._sampler.dumps(path / "sampler")
            generator = None if self._rng is None else bytes(self._rng.get_state().tolist()).hex()
        (path / "generator.json").write_text(json.dumps(generator))

    def loads(self, path: str | Path) -> None:
        """Bring back what :meth:`dumps` wrote.

        Raises:
            ValueError: where capacity or entries differ; the buffer stays as it was.
        """
        path = Path(path)
        with self._futures_lock:
            self._clear_prefetch_queue_locked()
            with self._replay_lock, self._write_lock:
                self._storage.loads(path / "storage")
                self._sampler.loads(path / "sampler")
        state = json.loads((path / "generator.json").read_text())
        if state is not None:
            generator = torch.Generator()
            generator.set_state(torch.frombuffer(bytearray.fromhex(state), dtype=torch.uint8))
            self.set_rng(generator)


def make_trial_buffer(
    capacity: int | None,
    slice_length: int,
    batch_size: int,
    *,
    path: str | Path | None = None,
    mode: Mode = "create",
    min_trials: int = 1,
    draw: Draw = "trials",
    alpha: float = 0.6,
    beta: float = 0.4,
    relabel: Relabel | None = None,
    prefetch: int | None = None,
    generator: torch.Generator | None = None,
    padding: Padding = "right",
    trim: bool = False,
    overhang: Overhang = "none",
    flush: bool = False,
    warn_short: bool = True,
) -> TrialReplayBuffer:
    """A memory-mapped FIFO buffer of whole trials that samples padded slices `[B, T]`.

    Give it to :class:`TrialCollector`, which writes each trial when it is complete, and train once
    `rb.can_sample()` is True.

    Args:
        capacity: environment steps to keep, the oldest trials leave first; None takes that of an
            existing folder.
        slice_length: steps T of each sampled slice.
        batch_size: slices B of each sample.
        path: folder that keeps the trials; a temporary one, removed at exit, by default.
        mode: `"create"` begins a new folder. `"continue"` goes on with what is there: after a crash, or
            beside other processes that write to it. `"read"` never writes; what others write appears.
        min_trials: trials to wait for before `rb.can_sample()`.
        draw: `"trials"` draws each trial equally often, `"steps"` longer ones more often, `"priority"`
            by priorities, see :class:`TrialSliceSampler` and :meth:`TrialReplayBuffer.update_priority`.
        alpha: exponent of priorities.
        beta: exponent of importance weights.
        relabel: changes whole trials before slices are cut; the storage stays as it is.
        prefetch: batches drawn ahead in threads; pays off for slices of many hundred steps. Batches
            then depend on when trials were written, and with more than one also on the threads' timing.
        generator: source of the draws; torch's global generator by default.
        padding: side of a slice that is padded.
        trim: make T the longest slice of each batch, see :class:`TrialSliceSampler`.
        overhang: see :class:`TrialSliceSampler`.
        flush: wait for the disk at each write. Without, trials survive the death of the process, but not
            the failure of the machine.
        warn_short: whether to warn, once, when no stored trial fills a slice.

    Raises:
        ValueError: where a size is not positive, or a slice is larger than the buffer.
        FileExistsError, FileNotFoundError, PermissionError, RuntimeError, OSError: see
            :class:`TrialStorage`.

    Example:
        >>> rb = make_trial_buffer(capacity=100, slice_length=4, batch_size=3)
        >>> rb.can_sample()
        False
        >>> done = (torch.arange(6) == 5).unsqueeze(-1)
        >>> _ = rb.extend(TensorDict({"next": {"done": done}}, [6]))
        >>> rb.can_sample(), rb.sample().shape
        (True, torch.Size([3, 4]))
    """
    if batch_size < 1:
        raise ValueError(
            f"batch_size must be at least 1, got {batch_size}. It is the number of slices in a batch."
        )
    if path is None and mode != "create":
        raise ValueError(
            f"mode={mode!r} needs the path of a folder, got None. Name the folder, or use "
            "mode='create'."
        )
    sampler = TrialSliceSampler(
        slice_length,
        padding=padding,
        trim=trim,
        overhang=overhang,
        draw=draw,
        alpha=alpha,
        beta=beta,
        min_trials=min_trials,
        warn_short=warn_short,
    )
    storage = TrialStorage(capacity, path=path, mode=mode, flush=flush)
    if slice_length > storage.max_size:
        raise ValueError(
            f"slice_length must be in [1, capacity={storage.max_size}], got {slice_length}. A slice comes from "
            "one stored trial; raise the capacity, which counts environment steps."
        )
    return TrialReplayBuffer(
        storage=storage,
        sampler=sampler,
        relabel=relabel,
        batch_size=batch_size,
        prefetch=prefetch,
        generator=generator,
    )


def _trial_lengths(steps: TensorDictBase) -> list[int]:
    """Lengths of trials that lie side by side, from the flags that end them."""
    ends = trial_ends(steps)
    if steps.ndim != 1 or ends is None:
        raise ValueError(
            "a write must be the steps [N] of whole trials with a flag ('next', 'done'), got steps "
            f"{[*steps.shape]} with {sorted(map(str, steps.keys(True, True)))}. Use TrialCollector, "
            "or Collector(..., trajs_per_batch=1)."
        )
    last = ends.nonzero().squeeze(-1)
    if not len(last) or int(last[-1]) != len(steps) - 1:
        open_steps = len(steps) - 1 - (int(last[-1]) if len(last) else -1)
        raise ValueError(
            f"a write must end with the end of a trial, got {open_steps} steps after the last one that "
            "is done. Write trials when they are complete; for pieces of endless ones give lengths=, "
            "or use TrialCollector(fragment_length=...)."
        )
    return torch.diff(last, prepend=last.new_tensor([-1])).tolist()


def _identity(data: Any) -> Any:
    return data
