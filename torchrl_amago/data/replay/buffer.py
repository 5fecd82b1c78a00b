"""A TorchRL replay buffer of whole trials that gives padded slices of them.

Legend: B slices of a batch, T steps of a slice, L steps of the longest trial drawn.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Storage, TensorDictReplayBuffer
from torchrl.data.replay_buffers import Writer

from torchrl_amago import keys
from torchrl_amago.data.replay.layout import trial_ends
from torchrl_amago.data.replay.sampler import Draw, Overhang, Padding, TrialSliceSampler
from torchrl_amago.data.replay.storage import Mode, TrialStorage
from torchrl_amago.data.replay.table import EvictedError
from torchrl_amago.data.replay.trials import Drawn, SlotTrials, StoredTrials, Windows

# Shares of the largest and of the mean error of a slice in its priority (R2D2, section 2.3).
_MAX_SHARE, _MEAN_SHARE = 0.9, 0.1


class RelabelFunction(Protocol):
    """Changes drawn trials before they are cut to slices."""

    in_keys: Sequence[NestedKey]

    def __call__(self, trials: TensorDictBase, generator: torch.Generator | None) -> TensorDictBase:
        """From ``in_keys`` and mask of whole trials ``[B, L]`` to the entries that change, and mask."""


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
        storage: Storage,
        sampler: TrialSliceSampler,
        relabel: RelabelFunction | None = None,
        **options: Any,
    ) -> None:
        self.relabel = relabel
        if isinstance(storage, TrialStorage):
            options["writer"] = TrialWriter()
        super().__init__(storage=storage, sampler=sampler, collate_fn=_identity, **options)

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
        if not isinstance(self.storage, TrialStorage):
            return super().extend(tensordicts, update_priority=update_priority)
        tensordicts = self.transform.inv(tensordicts) if len(self.transform) else tensordicts
        with self._replay_lock, self._write_lock:
            return self.writer.extend(tensordicts, lengths)

    # -- reading ---------------------------------------------------------------------------------

    @property
    def capacity(self) -> int:
        """Most steps kept."""
        return self.storage.max_size

    @property
    def num_trials(self) -> int:
        """Trials that are there."""
        with self._replay_lock:
            return len(self.sampler.trials(self.storage))

    @property
    def write_count(self) -> int:
        """Steps written so far, by all processes."""
        if not isinstance(self.storage, TrialStorage):
            return super().write_count
        with self._replay_lock:
            return self.storage.trials().steps[1]

    def newest(self, count: int) -> TensorDict:
        """The steps written last ``[n]``, at most as many as are there, in the order of writing."""
        return self[-count:] if count > 0 else self[:0]

    def checksum(self) -> int:
        """Checksum of all trials that are there."""
        return self.storage.checksum()

    def _sample(self, batch_size: int) -> tuple[TensorDictBase, dict]:
        attempts = 0
        with self._replay_lock:
            while True:
                try:
                    batch = self._read(batch_size)
                    break
                except EvictedError:
                    attempts += 1
        if len(self.transform):
            # Until here root and `next` are views of the same rows; transforms may work in place.
            batch["next"] = batch["next"].clone()
            batch = self.transform(batch)
        return (batch.pin_memory() if self._pin_memory else batch), {}

    def _read(self, batch_size: int) -> TensorDictBase:
        """Draw and read a batch.

        Raises:
            EvictedError: where another process evicted one of its trials meanwhile.
        """
        trials = self.sampler.trials(self.storage)
        drawn = self.sampler.draw_trials(trials, batch_size)
        length_B, replaced_BL = drawn.length, None
        if self.relabel is not None:
            length_B, replaced_BL = self._relabel(trials, drawn)
        windows = self.sampler.windows(length_B)
        batch = trials.read(drawn, windows)
        trials.check(drawn.number)
        step_BT, mask_BT = windows.steps()
        if replaced_BL is not None:
            rows = torch.arange(batch_size).unsqueeze(-1)
            batch.update(replaced_BL[rows, step_BT])
        batch.set(keys.MASK, mask_BT)
        batch.set("index", trials.label(drawn, step_BT))
        if drawn.weight is not None:
            batch.set("priority_weight", drawn.weight.unsqueeze(-1).expand(mask_BT.shape))
        return batch

    def _relabel(
        self, trials: StoredTrials | SlotTrials, drawn: Drawn
    ) -> tuple[Tensor, TensorDictBase]:
        """Lengths ``[B]`` and changed entries ``[B, L]`` of trials."""
        length_B = drawn.length
        whole = Windows(torch.zeros_like(length_B), length_B, int(length_B.max()))
        whole_BL = trials.read(drawn, whole, self.relabel.in_keys)
        # Before it is relabelled: what is no trial would look like a wrong reward function.
        trials.check(drawn.number)
        replaced_BL = self.relabel(whole_BL.set(keys.MASK, whole.steps()[1]), self._rng)
        new_length_B = replaced_BL.get(keys.MASK).sum(-1)
        if (new_length_B < 1).any() or (new_length_B > length_B).any():
            raise ValueError(
                "relabelling may shorten a trial to at least one step, got lengths "
                f"{new_length_B.tolist()} from {length_B.tolist()}. Return the mask of the steps "
                "that are left, the first ones of each trial."
            )
        return new_length_B, replaced_BL.exclude("collector")

    def set_(self, *_: Any, **__: Any) -> None:
        """Refused, as are ``set_at_``, ``update_`` and ``rb[...] = ...``: trials don't change in place."""
        self.storage.set(None, None)

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
            self.sampler.update_priority(index, priority, storage=self.storage)

    def update_tensordict_priority(self, data: TensorDictBase) -> None:
        """As :meth:`update_priority` of a batch; without effect where priorities aren't used."""
        if self.sampler.draw != "priority":
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
            self.storage.dumps(path / "storage")
            self.sampler.dumps(path / "sampler")
            self.writer.dumps(path / "writer")
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
                self.storage.loads(path / "storage")
                self.sampler.loads(path / "sampler")
                self.writer.loads(path / "writer")
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
    relabel: RelabelFunction | None = None,
    prefetch: int | None = None,
    generator: torch.Generator | None = None,
    padding: Padding = "right",
    trim: bool = False,
    overhang: Overhang = "none",
    flush: bool = False,
    verify: bool = False,
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
        verify: compare all values of an existing folder to their checksums. Its tables are always checked.
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
    if verify:
        storage.verify()
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
