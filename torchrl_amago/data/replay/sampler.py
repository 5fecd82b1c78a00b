"""Slices of trials: B of N trials are drawn, then a window of T steps of each."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from tensordict import NestedKey
from torch import Tensor
from torchrl.data import Storage, TensorStorage
from torchrl.data.replay_buffers import Sampler

from torchrl_amago import keys
from torchrl_amago._validation import check_choice, check_counts, check_fractions
from torchrl_amago.data._trials import Trials, find_trials
from torchrl_amago.data.replay._storage import TrialStorage

Padding = Literal["right", "left"]
Crop = Literal["none", "left", "right", "both"]
SampleBy = Literal["trials", "steps", "priority"]

_STATE_FILE = "trial_slice_sampler.json"
_SMALLEST_PRIORITY = 1e-6  # what a priority of 0 counts as: a trial must stay reachable


class TrialSliceSampler(Sampler):
    """Sampler that draws a trial, then one of its slices uniformly.

    It serves a :class:`TrialReplayBuffer`, and any buffer on a one-dimensional LazyMemmapStorage or
    LazyTensorStorage. Random numbers come from the buffer's generator, or torch's global one.

    Args:
        slice_length: steps T of each slice; shorter trials are taken whole.
        padding: side that is padded; padding repeats the nearest real step.
        trim_padding: cut T to the longest slice of the batch; a number n to its next multiple of n.
        crop: sides on which the window of T steps may extend beyond a longer trial, which makes the
            slice shorter (`padded_sampling` of AMAGO, arXiv 2310.09971).
        sample_by: `"trials"` draws all trials equally often; `"steps"` by their fraction of the
            stored steps; `"priority"`, in a :class:`TrialReplayBuffer`, by `priority ** alpha`,
            with importance weights. New trials get the largest priority so far.
        alpha, beta: exponents of priorities and of importance weights (arXiv 1511.05952).
        min_trials: number of trials required before the first batch.
        warn_short: warn, once, if no stored trial is as long as `slice_length`.
        whole: in TorchRL's storages, leave out trials without their first or last step.
        traj_key: in TorchRL's storages, entry with a number for each trajectory.

    Raises:
        RuntimeError: from sampling, with fewer than `min_trials` trials (see `rb.can_sample()`).

    Example:
        >>> from tensordict import TensorDict
        >>> from torchrl.data import LazyTensorStorage, TensorDictReplayBuffer
        >>> rb = TensorDictReplayBuffer(
        ...     storage=LazyTensorStorage(100), sampler=TrialSliceSampler(4), batch_size=3)
        >>> _ = rb.extend(TensorDict({"next": {"done": torch.arange(6) == 5}}, [6]))
        >>> rb.sample().shape
        torch.Size([3, 4])
    """

    def __init__(
        self,
        slice_length: int,
        *,
        padding: Padding = "right",
        trim_padding: bool | int = False,
        crop: Crop = "none",
        sample_by: SampleBy = "trials",
        alpha: float = 0.6,
        beta: float = 0.4,
        min_trials: int = 1,
        warn_short: bool = True,
        whole: bool = True,
        traj_key: NestedKey = ("collector", "traj_ids"),
    ) -> None:
        check_counts("It is the number of steps in a slice.", slice_length=slice_length)
        check_counts("It is the number of trials to wait for.", min_trials=min_trials)
        check_choice("padding", padding, get_args(Padding))
        check_choice("crop", crop, get_args(Crop))
        check_choice("sample_by", sample_by, get_args(SampleBy))
        check_fractions("Use 0.6 and 0.4, as published.", alpha=alpha, beta=beta)
        self.slice_length, self.padding, self.trim_padding = slice_length, padding, trim_padding
        self.crop, self.sample_by, self.min_trials = crop, sample_by, min_trials
        self.alpha, self.beta, self.whole, self.traj_key = alpha, beta, whole, traj_key
        self._warn_short = warn_short
        self._empty()

    def sample(self, storage: Storage, batch_size: int, relabel: Any = None) -> tuple[Tensor, dict]:
        """Draw slices: the storage's index of their steps, and entries to add, ``[B, T]`` each.

        These are the mask, the trial's number and importance weight, and those of `relabel`: a
        function of the trials and drawn positions that returns entries and the mask, ``[B, L]``.
        """
        trials = self.trials(storage)
        position_B, info_B = self.draw(trials, batch_size)
        length_B, changed_BL = torch.from_numpy(trials.length[position_B]), None
        if relabel is not None:
            changed_BL = relabel(trials, position_B)
            length_B = changed_BL.get(keys.MASK).sum(-1)
        step_BT, mask_BT = self.windows(length_B)
        info = {key: x_B.unsqueeze(-1).expand_as(mask_BT).clone() for key, x_B in info_B.items()}
        if changed_BL is not None:
            first_B = changed_BL.shape[1] * torch.arange(batch_size)
            place = (first_B.unsqueeze(-1) + step_BT).flatten()
            for key, x_BL in changed_BL.items(True, True):
                found = x_BL.flatten(0, 1).index_select(0, place)
                info[key] = found.unflatten(0, step_BT.shape)
        return trials.index(position_B, step_BT), info | {keys.MASK: mask_BT}

    def can_sample(self, storage: Storage, batch_size: int) -> bool:
        """Return whether there are `min_trials` trials to draw from, with replacement."""
        return len(self.trials(storage).length) >= self.min_trials

    def trials(self, storage: Storage) -> Trials:
        """Find the trials in a storage."""
        if isinstance(storage, TrialStorage):
            return storage.trials()
        if not isinstance(storage, TensorStorage) or storage.ndim != 1:
            rule = "trials need LazyMemmapStorage or LazyTensorStorage, ndim=1"
            raise TypeError(f"{rule}, got {type(storage).__name__} of ndim={storage.ndim}")
        # TorchRL 0.14 has no public names for what was written last, and loads the writer's alone.
        for buffer in storage._attached_entities if self._is_loaded else ():
            if buffer.sampler is self and hasattr(buffer.writer, "_cursor"):
                storage._set_last_cursor((buffer.writer._cursor - 1) % storage.max_size)
        self._is_loaded = False
        version = id(storage), len(storage), storage._mutation_revision, storage._last_cursor_index
        if self._found[0] != version:
            self._found = version, find_trials(storage, self.traj_key, self.whole)
        return self._found[1]

    def draw(self, trials: Trials, batch_size: int) -> tuple[np.ndarray, dict[str, Tensor]]:
        """Draw trials with replacement: positions, then numbers and importance weights ``[B]``."""
        count = len(trials.length)
        # After can_sample(), other processes may have left fewer trials, but longer ones.
        if not count or trials.seen < self.min_trials:
            raise RuntimeError(
                f"sampling needs at least {self.min_trials} trials, and the buffer has {count}. "
                "Collect until rb.can_sample() is True; if it never is, no trial ends or fits."
            )
        if self._warn_short and trials.length.max() < self.slice_length:
            warnings.warn(
                f"Slices of slice_length={self.slice_length} steps are longer than any stored "
                f"trial (the longest of {count} has {trials.length.max()}). If trials stay that "
                "short, a smaller slice_length saves compute; warn_short=False silences this.",
                stacklevel=2,
            )
        self._warn_short = False  # later trials only make slices fit better
        if self.sample_by == "trials":
            position_B = torch.randint(count, (batch_size,), generator=self._rng).numpy()
        else:
            running = self._running_sum(trials)
            place_B = self._uniform(batch_size).numpy() * running[-1]
            # Rounding must not lead past the last trial.
            position_B = np.searchsorted(running, place_B, "right").clip(max=count - 1)
        info_B = {"index": torch.from_numpy(trials.number[position_B])}
        if self.sample_by == "priority":
            # The largest weight that any trial may have is 1, so that all batches share a scale.
            weight_B = (self._weights[position_B] / self._weights.min()) ** -self.beta
            info_B["priority_weight"] = torch.from_numpy(weight_B).float()
        return position_B, info_B

    def _uniform(self, count: int) -> Tensor:
        # float64 keeps draws uniform for any number of steps; float32 would skip some past 2^24.
        return torch.rand(count, dtype=torch.float64, generator=self._rng)

    def _running_sum(self, trials: Trials) -> np.ndarray:
        """Return the cumulative weights of trials."""
        if trials is not self._weighted:
            if self.sample_by == "steps":
                weights = self._step_fraction(trials.length)
            else:  # those that are still there keep their weights
                weights = np.full(len(trials.number), self._largest**self.alpha)
                _, new, old = np.intersect1d(trials.number, self._weighted.number, True, True)
                weights[new] = self._weights[old]
            self._weighted, self._weights, self._running = trials, weights, np.cumsum(weights)
        return self._running

    def _step_fraction(self, length: np.ndarray) -> np.ndarray:
        """Weigh trials so that the steps of all are drawn equally often."""
        size, sides = self.slice_length, {"none": 0, "both": 2}.get(self.crop, 1)
        # Of a trial's windows, size - 1 extend beyond each side, by half their length on average.
        num_windows = length - size + 1 + sides * (size - 1)
        per_window = size - sides * size * (size - 1) / 2 / np.maximum(num_windows, 1)
        return length / np.where(length <= size, length, per_window)

    def windows(self, length_B: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a slice of each trial: the steps of its places, and the mask, ``[B, T]`` each."""
        # Windows begin in [low, high]. A trial that fits into one has one window, beginning at 0.
        spare_B = length_B - self.slice_length
        low = 1 - self.slice_length if self.crop in ("left", "both") else 0
        high_B = length_B - 1 if self.crop in ("right", "both") else spare_B
        begin_B = low + (self._uniform(len(length_B)) * (high_B - low + 1)).floor().to(torch.int64)
        begin_B = torch.where(spare_B > 0, begin_B, 0)
        # The slice is the part of the window inside the trial.
        first_B1 = begin_B.clamp(min=0).unsqueeze(-1)
        stop_B1 = torch.minimum(begin_B + self.slice_length, length_B).unsqueeze(-1)
        width, unit = self.slice_length, int(self.trim_padding)
        if unit:
            width = min(-(-int((stop_B1 - first_B1).max()) // unit) * unit, width)
        step_BT = torch.arange(width) + (first_B1 if self.padding == "right" else stop_B1 - width)
        inside_BT = torch.minimum(torch.maximum(step_BT, first_B1), stop_B1 - 1)
        return inside_BT, inside_BT == step_BT

    def update_priority(self, index: Tensor, priority: Tensor, *, storage: Storage) -> None:
        """Set priorities of trials by their numbers; of several, the largest counts."""
        check_choice("sample_by", self.sample_by, ("priority",), "Others have no priorities.")
        values = torch.as_tensor(priority).reshape(-1).double().cpu().numpy()
        if not (values >= 0).all() or np.isinf(values).any():
            raise ValueError(f"priorities must be finite and not negative, got {values}.")
        trials = self.trials(storage)
        self._running_sum(trials)
        numbers, inverse = np.unique(np.ravel(index), return_inverse=True)
        largest = np.full(len(numbers), _SMALLEST_PRIORITY)
        np.maximum.at(largest, inverse, values)
        _, position, known = np.intersect1d(trials.number, numbers, True, True)
        self._weights[position] = largest[known] ** self.alpha
        self._running = np.cumsum(self._weights)
        self._largest = max(self._largest, float(largest[known].max(initial=0.0)))

    def state_dict(self) -> dict[str, Any]:
        """Return priorities, as plain numbers and lists."""
        trials = {"numbers": self._weighted.number.tolist(), "weights": self._weights.tolist()}
        return {"warn_short": self._warn_short, "largest": self._largest} | trials

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._empty()
        self._warn_short, self._largest = state_dict["warn_short"], state_dict["largest"]
        self._weighted = Trials(number=np.array(state_dict["numbers"], np.int64))
        self._weights, self._is_loaded = np.array(state_dict["weights"], np.float64), True

    def dumps(self, path: str | Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, _STATE_FILE).write_text(json.dumps(self.state_dict()))

    def loads(self, path: str | Path) -> None:
        self.load_state_dict(json.loads(Path(path, _STATE_FILE).read_text()))

    def _empty(self) -> None:
        self._found, self._is_loaded = (None, None), False  # what trials depend on, and the trials
        self._weighted, self._weights, self._largest = Trials(), np.empty(0), 1.0

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_found": (None, None)}
