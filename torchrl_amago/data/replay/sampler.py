"""Which slice of which trial comes next: B trials of N are drawn, then a window of T steps of each."""

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
from torchrl_amago.data.replay._storage import TrialStorage
from torchrl_amago.data.replay._trials import Trials, trials_in, version_of

Padding = Literal["right", "left"]
Crop = Literal["none", "left", "right", "both"]
Draw = Literal["trials", "steps", "priority"]

_STATE_FILE = "trial_slice_sampler.json"
_SMALLEST_PRIORITY = 1e-6  # what a priority of 0 counts as: a trial must stay reachable


class TrialSliceSampler(Sampler):
    """Draws a trial, then a slice of it uniformly among those that fit.

    A trial that is shorter than `slice_length` is taken whole and padded. Randomness comes from
    `ReplayBuffer(generator=...)` where one is given, else from torch's global generator. Besides a
    :class:`TrialReplayBuffer`, it serves any buffer on a one-dimensional LazyMemmapStorage or LazyTensorStorage.

    Args:
        slice_length: steps T of each slice.
        padding: side of the slice that is padded; padding repeats the nearest real step.
        trim: make T the longest slice of the batch where that is less than `slice_length`. Leave it off where
            shapes must not change, as under `torch.compile`.
        crop: sides on which the window of T steps may stick out of a longer trial. With `"none"`, the
            steps near a trial's ends lie in fewer windows than those in the middle; the others even that
            out, at the price of more padding. (`padded_sampling` of AMAGO, arXiv 2310.09971.)
        draw: `"trials"` draws every trial equally often. `"steps"` draws longer ones more often, so
            that each has a fraction of the batches' steps as large as its fraction of the stored ones;
            with `crop="both"`, all stored steps are equally likely. `"priority"` draws in
            proportion to `priority ** alpha`, and gives importance weights; new trials have the
            largest priority so far. It needs a :class:`TrialReplayBuffer`.
        alpha: exponent of priorities (arXiv 1511.05952, section 3.3).
        beta: exponent of importance weights (same, section 3.4); 1 corrects in full.
        min_trials: trials to wait for before the first batch.
        warn_short: whether to warn, once, when no stored trial is as long as `slice_length`.
        whole: leave out trials that are unfinished or lost their first steps, in TorchRL's storages.
        traj_key: entry with a number for each trajectory, in TorchRL's storages.

    Raises:
        RuntimeError: from sampling, before there are `min_trials` trials (ask `rb.can_sample()`).

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
        trim: bool = False,
        crop: Crop = "none",
        draw: Draw = "trials",
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
        check_choice("draw", draw, get_args(Draw))
        check_fractions("Use 0.6 and 0.4, as published.", alpha=alpha, beta=beta)
        self.slice_length, self.padding, self.trim = slice_length, padding, trim
        self.crop, self.draw, self.min_trials = crop, draw, min_trials
        self.alpha, self.beta, self.whole, self.traj_key = alpha, beta, whole, traj_key
        self._warn_short, self._found = warn_short, None
        self._empty()

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict]:
        """Draw slices: the storage's index of their steps ``[B, T]``, and mask and importance weights."""
        trials = self.trials(storage)
        position_B, weight_B = self.draw_trials(trials, batch_size)
        step_BT, mask_BT = self.steps(*self.windows(torch.from_numpy(trials.length[position_B])))
        return trials.index(position_B, step_BT), self.info(mask_BT, weight_B)

    def info(self, mask_BT: Tensor, weight_B: Tensor | None) -> dict[NestedKey, Tensor]:
        """Give what a batch says of its slices, ``[B, T]`` each."""
        if weight_B is None:
            return {keys.MASK: mask_BT}
        weight_BT = weight_B.unsqueeze(-1).expand(mask_BT.shape)
        return {keys.MASK: mask_BT, "priority_weight": weight_BT}

    def can_sample(self, storage: Storage, batch_size: int) -> bool:
        """Whether there are enough trials to draw from (with replacement)."""
        return len(self.trials(storage).length) >= self.min_trials

    # -- trials ----------------------------------------------------------------------------------

    def trials(self, storage: Storage) -> Trials:
        """Find the trials in a storage."""
        if isinstance(storage, TrialStorage):
            return storage.trials()
        if not isinstance(storage, TensorStorage) or storage.ndim != 1:
            raise TypeError(
                "trials are found in a LazyMemmapStorage or LazyTensorStorage of ndim=1, or that of "
                f"make_trial_buffer, got {type(storage).__name__} of ndim={storage.ndim}. Use one."
            )
        if self._found is None or self._found.version != version_of(storage):
            self._found = trials_in(storage, self.whole, self.traj_key)
        return self._found

    def draw_trials(self, trials: Trials, batch_size: int) -> tuple[np.ndarray, Tensor | None]:
        """Draw trials with replacement: their places among all, and importance weights, ``[B]`` each."""
        count = len(trials.length)
        # After can_sample() said yes, other processes may have left fewer, but longer ones.
        if not count or trials.seen < self.min_trials:
            raise RuntimeError(
                f"sampling needs at least {self.min_trials} trials, and the buffer has {count}. Collect "
                "until rb.can_sample() is True; if it never is, no trial ends or fits into capacity."
            )
        self._warn_if_all_short(trials.length)
        if self.draw == "trials":
            return torch.randint(count, (batch_size,), generator=self._rng).numpy(), None
        running = self._running_sum(trials)
        place_B = self._uniform(batch_size) * running[-1]
        # Rounding must not lead past the last trial.
        position_B = np.searchsorted(running, place_B, side="right").clip(max=count - 1)
        if self.draw == "steps":
            return position_B, None
        weight_B = (count * self._weights[position_B] / running[-1]) ** -self.beta
        return position_B, torch.from_numpy(weight_B / weight_B.max()).float()

    def _uniform(self, count: int) -> np.ndarray:
        # float64 keeps draws uniform for any number of steps; float32 would skip some past 2^24.
        return torch.rand(count, dtype=torch.float64, generator=self._rng).numpy()

    def _running_sum(self, trials: Trials) -> np.ndarray:
        if trials.version != self._version:
            if self.draw == "steps":
                self._weights = self._step_fraction(trials.length)
            else:  # those that are still there keep their weights
                weights = np.full(len(trials.number), self._largest**self.alpha)
                _, new, old = np.intersect1d(trials.number, self._numbers, True, True)
                weights[new] = self._weights[old]
                self._numbers, self._weights = trials.number, weights
            self._version, self._running = trials.version, None
        if self._running is None:
            self._running = np.cumsum(self._weights)
        return self._running

    def _step_fraction(self, length: np.ndarray) -> np.ndarray:
        """Weigh trials so that the steps of all are drawn equally often."""
        size, sides = self.slice_length, {"none": 0, "both": 2}.get(self.crop, 1)
        # Of the windows of a trial, size - 1 stick out on each side, half of them on average.
        num_windows = length - size + 1 + sides * (size - 1)
        per_window = size - sides * size * (size - 1) / 2 / np.maximum(num_windows, 1)
        return length / np.where(length <= size, length, per_window)

    def _warn_if_all_short(self, length: np.ndarray) -> None:
        if self._warn_short and length.max() < self.slice_length:
            warnings.warn(
                f"Slices of slice_length={self.slice_length} steps are longer than any stored trial (the "
                f"longest of {len(length)} has {length.max()}). If trials stay that short, a smaller "
                "slice_length saves compute; warn_short=False silences this.",
                stacklevel=2,
            )
        # Either way the answer is known: later trials only make slices fit better.
        self._warn_short = False

    # -- windows ---------------------------------------------------------------------------------

    def windows(self, length_B: Tensor) -> tuple[Tensor, Tensor]:
        """Draw a slice of each of these trials: its first step and its number of steps, ``[B]`` each."""
        # Windows begin in [low, high]. A trial that fits into one has one window, beginning at 0.
        spare_B = length_B - self.slice_length
        low = 1 - self.slice_length if self.crop in ("left", "both") else 0
        high_B = length_B - 1 if self.crop in ("right", "both") else spare_B
        uniform_B = torch.from_numpy(self._uniform(len(length_B)))
        begin_B = low + (uniform_B * (high_B - low + 1)).floor().to(torch.int64)
        begin_B = torch.where(spare_B > 0, begin_B, 0)
        # What sticks out is cut off: first and last step of the slice, both inside the trial.
        first_B = begin_B.clamp(min=0)
        return first_B, torch.minimum(begin_B + self.slice_length, length_B) - first_B

    def steps(self, first_B: Tensor, real_B: Tensor) -> tuple[Tensor, Tensor]:
        """Find the step in the trial at each place of the slices ``[B, T]``, and whether it is real."""
        width = int(real_B.max()) if self.trim else self.slice_length
        place_BT = torch.arange(width).expand(len(real_B), -1)
        if self.padding == "left":
            place_BT = place_BT - (width - real_B.unsqueeze(-1))
        inside_BT = torch.minimum(place_BT.clamp(min=0), real_B.unsqueeze(-1) - 1)
        return first_B.unsqueeze(-1) + inside_BT, inside_BT == place_BT

    # -- priorities ------------------------------------------------------------------------------

    def update_priority(
        self, index: Tensor, priority: Tensor, *, storage: Storage | None = None
    ) -> None:
        """Set priorities of trials by their numbers: of one that comes twice the larger counts."""
        if self.draw != "priority":
            raise ValueError(
                f"priorities are used with draw='priority' only, got draw={self.draw!r}. Make the buffer "
                "with draw='priority', or don't update priorities."
            )
        values = torch.as_tensor(priority).reshape(-1).double().cpu().numpy()
        if not (values >= 0).all() or np.isinf(values).any():
            raise ValueError(f"priorities must be finite and not negative, got {values}.")
        trials, number = self.trials(storage), torch.as_tensor(index).reshape(-1).cpu().numpy()
        self._running_sum(trials)
        order = np.argsort(trials.number)
        place = np.searchsorted(trials.number, number, sorter=order).clip(max=len(order) - 1)
        is_there = trials.number[order[place]] == number
        position, inverse = np.unique(order[place][is_there], return_inverse=True)
        largest = np.full(len(position), _SMALLEST_PRIORITY)
        np.maximum.at(largest, inverse, values[is_there])
        self._largest = max(self._largest, float(largest.max(initial=0.0)))
        self._weights[position], self._running = largest**self.alpha, None

    # -- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Give priorities, as plain numbers and lists."""
        state = {"warn_short": self._warn_short, "largest": self._largest}
        weights = self._weights.tolist() if self.draw == "priority" else []
        return state | {"numbers": self._numbers.tolist(), "weights": weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._empty()
        self._warn_short, self._largest = state_dict["warn_short"], state_dict["largest"]
        self._numbers = np.array(state_dict["numbers"], np.int64)
        self._weights = np.array(state_dict["weights"], np.float64)

    def dumps(self, path: str | Path) -> None:
        Path(path).mkdir(parents=True, exist_ok=True)
        Path(path, _STATE_FILE).write_text(json.dumps(self.state_dict()))

    def loads(self, path: str | Path) -> None:
        self.load_state_dict(json.loads(Path(path, _STATE_FILE).read_text()))

    def _empty(self) -> None:
        self._version = self._running = None
        self._numbers, self._weights, self._largest = np.empty(0, np.int64), np.empty(0), 1.0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_found": None, "_version": None}
