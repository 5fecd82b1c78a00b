"""Which slice of which trial comes next: a trial is drawn, then a window of it.

Legend: B slices of a batch, T steps of a slice, N trials that are there.
"""

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
from torchrl_amago.choice import check_choice, check_counts
from torchrl_amago.data.replay.storage import TrialStorage
from torchrl_amago.data.replay.table import EvictedError
from torchrl_amago.data.replay.trials import (
    Drawn,
    SlotTrials,
    StoredTrials,
    Windows,
    slot_version,
)

Padding = Literal["right", "left"]
Overhang = Literal["none", "left", "right", "both"]
Draw = Literal["trials", "steps", "priority"]

_STATE_FILE = "trial_slice_sampler.json"
_SMALLEST_PRIORITY = 1e-6  # what a priority of 0 counts as: a trial must stay reachable


class TrialSliceSampler(Sampler):
    """Draws a trial, then a slice of it uniformly among those that fit.

    A trial that is shorter than `slice_length` is taken whole and padded. Randomness comes from
    `ReplayBuffer(generator=...)` where one is given, else from torch's global generator. Besides a
    :class:`TrialReplayBuffer`, it serves any buffer on a one-dimensional
    :class:`~torchrl.data.TensorStorage`, see :class:`SlotTrials`.

    Args:
        slice_length: steps T of each slice.
        padding: side of the slice that is padded.
        trim: make T the longest slice of the batch where that is less than `slice_length`: steps that
            would be padding in every row cost nothing then. Leave it off where shapes must not
            change, as under `torch.compile`.
        overhang: sides on which the window of T steps may stick out of a longer trial. With
            `"none"`, the steps near a trial's ends lie in fewer windows than those in the middle;
            `"left"`, `"right"` and `"both"` even that out, at the price of more padding. (The
            argument of AMAGO, arXiv 2310.09971, is called `padded_sampling`.)
        draw: `"trials"` draws every trial equally often. `"steps"` draws longer ones more often, so
            that each has a share of the batches' steps as large as its share of the stored ones;
            with `overhang="both"`, all stored steps are equally likely. `"priority"` draws in
            proportion to `priority ** alpha`, and gives importance weights; new trials have the
            largest priority so far.
        alpha: exponent of priorities (arXiv 1511.05952, section 3.3).
        beta: exponent of importance weights (same, section 3.4); 1 corrects in full.
        min_trials: trials to wait for before the first batch.
        warn_short: whether to warn, once, when no stored trial is as long as `slice_length`.
        whole: leave out trials that are unfinished or lost their first steps. Only TorchRL's storages
            hold such.
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
        overhang: Overhang = "none",
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
        check_choice("overhang", overhang, get_args(Overhang))
        check_choice("draw", draw, get_args(Draw))
        self.slice_length, self.padding, self.trim = slice_length, padding, trim
        self.overhang, self.draw, self.min_trials = overhang, draw, min_trials
        self.whole, self.traj_key = whole, traj_key
        self.alpha, self.beta = alpha, beta
        self._warn_short = warn_short
        self._slots: SlotTrials | None = None
        self._empty()

    def sample(self, storage: Storage, batch_size: int) -> tuple[Tensor, dict]:
        """Draw slices.

        Returns:
            The storage's index of their steps, ``[B, T]``, and the mask, with `draw="priority"` also
            ``"priority_weight"``.
        """
        while True:
            try:
                trials = self.trials(storage)
                drawn = self.draw_trials(trials, batch_size)
                step_BT, mask_BT = self.windows(drawn.length).steps()
                info = {keys.MASK: mask_BT}
                if drawn.weight is not None:
                    info["priority_weight"] = drawn.weight.unsqueeze(-1).expand(mask_BT.shape)
                return trials.index(drawn, step_BT), info
            except EvictedError:
                continue

    def can_sample(self, storage: Storage, batch_size: int) -> bool:
        """Whether there are enough trials to draw from (with replacement)."""
        return len(self.trials(storage)) >= self.min_trials

    # -- trials ----------------------------------------------------------------------------------

    def trials(self, storage: Storage) -> StoredTrials | SlotTrials:
        """Find the trials in a storage."""
        if isinstance(storage, TrialStorage):
            return storage.trials()
        if not isinstance(storage, TensorStorage) or storage.ndim != 1:
            raise TypeError(
                "trials are found in a one-dimensional LazyMemmapStorage or LazyTensorStorage, or that of "
                f"make_trial_buffer, got {type(storage).__name__} of ndim={storage.ndim}. Use one of them."
            )
        if self._slots is None or self._slots.version != slot_version(storage):
            self._slots = SlotTrials(storage, self.whole, self.traj_key)
        return self._slots

    def draw_trials(self, trials: StoredTrials | SlotTrials, batch_size: int) -> Drawn:
        """Draw trials, with replacement."""
        # After can_sample() said yes, other processes may have left fewer, but longer ones.
        if not len(trials) or trials.seen < self.min_trials:
            raise RuntimeError(
                f"sampling needs at least {self.min_trials} trials, and the buffer has {len(trials)}. "
                "Collect until rb.can_sample() is True; if it stays False, trials are never complete, "
                "or capacity is too small for them."
            )
        self._warn_if_all_short(trials)
        if self.draw == "trials":
            position_B = torch.randint(len(trials), (batch_size,), generator=self._rng).numpy()
            return trials.take(position_B)
        running = self._running_sum(trials)
        place_B = self._uniform(batch_size) * running[-1]
        # Rounding must not lead past the last trial.
        position_B = np.searchsorted(running, place_B, side="right").clip(max=len(trials) - 1)
        drawn = trials.take(position_B)
        if self.draw == "steps":
            return drawn
        weight_B = (len(trials) * self._weights[position_B] / running[-1]) ** -self.beta
        return drawn._replace(weight=torch.from_numpy(weight_B / weight_B.max()).float())

    def _uniform(self, count: int) -> np.ndarray:
        # float64 keeps draws uniform for any number of steps; float32 would skip some past 2^24.
        return torch.rand(count, dtype=torch.float64, generator=self._rng).numpy()

    def _running_sum(self, trials: StoredTrials | SlotTrials) -> np.ndarray:
        if trials.version != self._version:
            if self.draw == "steps":
                self._weights = self._step_share(trials.length)
            else:
                self._follow(trials)
            self._version, self._running = trials.version, None
        if self._running is None:
            self._running = np.cumsum(self._weights)
        return self._running

    def _step_share(self, length: np.ndarray) -> np.ndarray:
        """Weigh trials so that the steps of all are drawn equally often."""
        slice_length = self.slice_length
        if self.overhang == "none":
            per_window = np.full(len(length), float(slice_length))
        else:
            sides = 2 if self.overhang == "both" else 1
            # Of the windows of a trial, slice_length - 1 stick out on each side, half of them on average.
            num_windows = length - slice_length + 1 + sides * (slice_length - 1)
            missing = sides * slice_length * (slice_length - 1) / 2
            per_window = slice_length - missing / np.maximum(num_windows, 1)
        return length / np.where(length <= slice_length, length, per_window)

    def _warn_if_all_short(self, trials: StoredTrials | SlotTrials) -> None:
        if not self._warn_short:
            return
        longest = int(trials.length.max())
        if longest < self.slice_length:
            warnings.warn(
                f"Slices of slice_length={self.slice_length} steps are longer than any stored trial "
                f"(the longest of {len(trials)} has {longest}): every slice is padded. If trials "
                "stay that short, a smaller slice_length saves compute; warn_short=False silences "
                "this.",
                stacklevel=2,
            )
        # Either way the answer is known: later trials only make slices fit better.
        self._warn_short = False

    # -- windows ---------------------------------------------------------------------------------

    def windows(self, length_B: Tensor) -> Windows:
        """Draw a slice of each of these trials."""
        slice_length = self.slice_length
        # Windows begin in [low, high]. A trial that fits into one has one window, beginning at 0.
        spare_B = length_B - slice_length
        low, high_B = 0, spare_B
        if self.overhang in ("left", "both"):
            low = 1 - slice_length
        if self.overhang in ("right", "both"):
            high_B = length_B - 1
        uniform_B = torch.from_numpy(self._uniform(len(length_B)))
        begin_B = low + (uniform_B * (high_B - low + 1)).floor().to(torch.int64)
        begin_B = torch.where(spare_B > 0, begin_B, 0)
        # What sticks out is cut off: first and last step of the slice, both inside the trial.
        first_B = begin_B.clamp(min=0)
        real_B = torch.minimum(begin_B + slice_length, length_B) - first_B
        width = int(real_B.max()) if self.trim else slice_length
        return Windows(first_B, real_B, width, self.padding == "left")

    # -- priorities ------------------------------------------------------------------------------

    def update_priority(
        self, index: Tensor, priority: Tensor, *, storage: Storage | None = None
    ) -> None:
        """Set priorities of trials.

        Args:
            index: what ``"index"`` in a batch says of them, ``[*]``; trials that are gone meanwhile are
                passed over.
            priority: ``[*]``, not negative. Of a trial that comes twice, the larger counts.
            storage: where the trials are.
        """
        if self.draw != "priority":
            raise ValueError(
                f"priorities are used with draw='priority' only, got draw={self.draw!r}. Make the buffer "
                "with draw='priority', or don't update priorities."
            )
        values = torch.as_tensor(priority).reshape(-1).double().cpu().numpy()
        if not (values >= 0).all() or np.isinf(values).any():
            raise ValueError(
                f"priorities must be finite and not negative, got {values}. Give absolute errors."
            )
        trials = self.trials(storage)
        self._running_sum(trials)
        position = trials.position(torch.as_tensor(index).reshape(-1).cpu().numpy())
        place, inverse = np.unique(position[position >= 0], return_inverse=True)
        largest = np.full(len(place), _SMALLEST_PRIORITY)
        np.maximum.at(largest, inverse, values[position >= 0])
        self._largest = max(self._largest, float(largest.max(initial=0.0)))
        self._weights[place], self._running = largest**self.alpha, None

    def _follow(self, trials: StoredTrials | SlotTrials) -> None:
        """Keep the weights of trials that are still there; new ones get the largest."""
        weights = np.full(len(trials), self._largest**self.alpha)
        _, new, old = np.intersect1d(trials.number, self._numbers, True, True)
        weights[new] = self._weights[old]
        self._numbers, self._weights = trials.number, weights

    # -- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Give priorities, as plain numbers and lists."""
        known = self.draw == "priority"
        return {
            "warn_short": self._warn_short,
            "largest": self._largest,
            "numbers": self._numbers.tolist(),
            "weights": self._weights.tolist() if known else [],
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._empty()
        self._warn_short, self._largest = state_dict["warn_short"], state_dict["largest"]
        self._numbers = np.array(state_dict["numbers"], np.int64)
        self._weights = np.array(state_dict["weights"])

    def dumps(self, path: str | Path) -> None:
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / _STATE_FILE).write_text(json.dumps(self.state_dict()))

    def loads(self, path: str | Path) -> None:
        self.load_state_dict(json.loads((Path(path) / _STATE_FILE).read_text()))

    def _empty(self) -> None:
        self._version, self._running = None, None
        self._numbers, self._weights, self._largest = np.empty(0, np.int64), np.empty(0), 1.0

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_slots": None, "_version": None}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(slice_length={self.slice_length}, padding={self.padding!r}, "
            f"overhang={self.overhang!r}, draw={self.draw!r})"
        )
