"""A replay buffer of whole trials, assembled from TorchRL's parts and the trial sampler."""

from __future__ import annotations

from pathlib import Path

import torch
from torchrl.data import LazyMemmapStorage, TensorDictReplayBuffer

from torchrl_amago.data.saving import FilledPartCheckpointer
from torchrl_amago.data.slices import Overhang, Padding, TrialSliceSampler


def make_trial_buffer(
    capacity: int,
    slice_len: int,
    batch_size: int,
    *,
    scratch_dir: str | Path | None = None,
    prefetch: int | None = None,
    shared: bool = False,
    generator: torch.Generator | None = None,
    padding: Padding = "right",
    trim: bool = False,
    overhang: Overhang = "none",
    warn_short: bool = True,
) -> TensorDictReplayBuffer:
    """A memory-mapped FIFO buffer of whole trials that samples padded slices `[B, T]`.

    Give it to `Collector(env, policy, frames_per_batch=..., trajs_per_batch=1, replay_buffer=rb)`,
    which writes each trial when it is complete, and train once `rb.can_sample()` is True. The collector
    cuts its batches up by trajectory, at a cost per row and batch: let `frames_per_batch` be about the
    number of rows times the length of a trial, and it stays near a twentieth of the collection.

    Args:
        capacity: environment steps to keep. Must hold the trials of one collector batch; the oldest
            steps are overwritten first.
        slice_len: steps T of each sampled slice.
        batch_size: slices B of each sample.
        scratch_dir: folder of the memory-mapped files; a temporary one, removed at exit, by default.
        prefetch: batches drawn ahead in threads; pays off for slices of many hundred steps. Give a
            `generator` too, or the order of random draws depends on timing.
        shared: whether several processes write to the buffer (`MultiCollector`).
        generator: source of the draws; torch's global generator by default.
        padding: side of a slice that is padded.
        trim: make T the longest slice of each batch, see :class:`TrialSliceSampler`.
        overhang: see :class:`TrialSliceSampler`.
        warn_short: whether to warn, once, when no stored trial fills a slice.

    Raises:
        ValueError: where a size is not positive, or a slice is larger than the buffer.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> rb = make_trial_buffer(capacity=100, slice_len=4, batch_size=3)
        >>> rb.can_sample()
        False
        >>> done = (torch.arange(6) == 5).unsqueeze(-1)
        >>> _ = rb.extend(TensorDict({"next": {"done": done}}, [6]))
        >>> rb.can_sample(), rb.sample().shape
        (True, torch.Size([3, 4]))
    """
    if not 1 <= slice_len <= capacity:
        raise ValueError(
            f"slice_len must be in [1, capacity={capacity}], got {slice_len}. A slice comes from one "
            "stored trial; raise the capacity, which counts environment steps."
        )
    if batch_size < 1:
        raise ValueError(
            f"batch_size must be at least 1, got {batch_size}. It is the number of slices in a batch."
        )
    return TensorDictReplayBuffer(
        storage=LazyMemmapStorage(capacity, scratch_dir=scratch_dir, shared_init=shared),
        sampler=TrialSliceSampler(
            slice_len, padding=padding, trim=trim, overhang=overhang, warn_short=warn_short
        ),
        batch_size=batch_size,
        prefetch=prefetch,
        shared=shared,
        generator=generator,
        checkpointer=FilledPartCheckpointer(),
    )
