"""Which slice of which trial comes next: a trial is drawn, then a window of it.

Legend: B slices of a batch, T steps of a slice, N trials that are there.
"""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

import numpy as np
import torch
from torch import Tensor
from torchrl.data.replay_buffers import Sampler

from torchrl_amago.choice import check_choice
from torchrl_amago.data.trial_storage import TrialStorage
from torchrl_amago.data.trial_table import TrialTable
from torchrl_amago.data.trial_weights import Priorities, Shares

Padding = Literal["right", "left"]
Overhang = Literal["none", "left", "right", "both"]
Draw = Literal["trials", "steps", "priority"]

_STATE_FILE = "trial_slice_sampler.json"


class Trials(NamedTuple):
    """Trials that were drawn: numbers, first rows, lengths and importance weights, ``[B]`` each."""

    number: Tensor
    first: Tensor
    length: Tensor
    weight: Tensor | None = None


class Windows(NamedTuple):
    """Slices of trials: first step in the trial and number of steps, ``[B]`` each, and T."""

    offset: Tensor
    real: Tensor
    width: int


class TrialSliceSampler(Sampler):
    """Draws a trial, then a slice of it uniformly among those that fit.

    A trial that is shorter than `slice_length` is taken whole and padded. Randomness comes from
    `ReplayBuffer(generator=...)` where one is given, else from torch's global generator.

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

    Raises:
        RuntimeError: from sampling, before there are `min_trials` trials (ask `rb.can_sample()`).

    Example:
        >>> sampler = TrialSliceSampler(slice_length=4, overhang="both")
        >>> windows = sampler.windows(torch.tensor([2, 9]))
        >>> windows.real[0].item(), windows.width, bool((windows.offset + windows.real)[1] <= 9)
        (2, 4, True)
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
    ) -> None:
        for name, value in (("slice_length", slice_length), ("min_trials", min_trials)):
            if value < 1:
                meaning = "steps in a slice" if name == "slice_length" else "trials to wait for"
                raise ValueError(
                    f"{name} must be at least 1, got {value}. It is the number of {meaning}."
                )
        check_choice("padding", padding, get_args(Padding))
        check_choice("overhang", overhang, get_args(Overhang))
        check_choice("draw", draw, get_args(Draw))
        self._slice_len, self.padding, self.trim = slice_length, padding, trim
        self.overhang, self.draw, self.min_trials = overhang, draw, min_trials
        self._warn_short = warn_short
        self._shares = Shares(self._step_share)
        self._priorities = Priorities(alpha, beta)

    @property
    def slice_length(self) -> int:
        """Steps T of each slice."""
        return self._slice_len

    def sample(self, storage: TrialStorage, batch_size: int) -> tuple[tuple, dict]:
        """Trials and windows of them; nothing is read."""
        trials = self.trials(storage.follow(), batch_size)
        return (trials, self.windows(trials.length)), {}

    def can_sample(self, storage: TrialStorage, batch_size: int) -> bool:
        """Whether there are enough trials to draw from (with replacement)."""
        return len(storage.follow()) >= self.min_trials

    # -- trials ----------------------------------------------------------------------------------

    def trials(self, table: TrialTable, batch_size: int) -> Trials:
        """Draw trials, with replacement."""
        if len(table) < self.min_trials:
            raise RuntimeError(
                f"sampling needs at least {self.min_trials} trials, and the buffer has {len(table)}. "
                "Collect until rb.can_sample() is True; if it stays False, trials are never complete, "
                "or capacity is too small for them."
            )
        self._warn_if_all_short(table)
        weight_B = None
        if self.draw == "trials":
            index_B = torch.randint(len(table), (batch_size,), generator=self._rng).numpy()
        elif self.draw == "steps":
            index_B = self._shares.draw(table, self._uniform(batch_size))
        else:
            index_B, weight_B = self._priorities.draw(table, self._uniform(batch_size))
            weight_B = torch.from_numpy(weight_B)
        return Trials(
            torch.from_numpy(index_B + table.begin),
            torch.from_numpy(table.first[index_B]),
            torch.from_numpy(table.steps[index_B]),
            weight_B,
        )

    def _uniform(self, count: int) -> np.ndarray:
        # float64 keeps draws uniform for any number of steps; float32 would skip some past 2^24.
        return torch.rand(count, dtype=torch.float64, generator=self._rng).numpy()

    def _step_share(self, length: np.ndarray) -> np.ndarray:
        """How often trials are drawn for their steps to be as frequent as all others."""
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

    def _warn_if_all_short(self, table: TrialTable) -> None:
        if not self._warn_short:
            return
        longest = int(table.steps.max())
        if longest < self.slice_length:
            warnings.warn(
                f"Slices of slice_length={self.slice_length} steps are longer than any stored trial "
                f"(the longest of {len(table)} has {longest}): every slice is padded. If trials "
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
        return Windows(first_B, real_B, width)

    def steps(self, windows: Windows) -> tuple[Tensor, Tensor]:
        """Step in the trial at each place of the slices ``[B, T]``, and whether it is real.

        Padding repeats the nearest real step.
        """
        first_B1, real_B1 = windows.offset.unsqueeze(-1), windows.real.unsqueeze(-1)
        place_BT = torch.arange(windows.width).expand(len(first_B1), -1)
        if self.padding == "left":
            place_BT = place_BT - (windows.width - real_B1)
        inside_BT = torch.minimum(place_BT.clamp(min=0), real_B1 - 1)
        return first_B1 + inside_BT, inside_BT == place_BT

    # -- priorities ------------------------------------------------------------------------------

    def update_priority(
        self, index: Tensor, priority: Tensor, *, storage: TrialStorage | None = None
    ) -> None:
        """Set priorities of trials.

        Args:
            index: their numbers, ``[B]``; trials that are gone meanwhile are passed over.
            priority: ``[B]``, not negative. Of a trial that comes twice, the larger counts.
            storage: where the trials are.
        """
        if self.draw != "priority":
            raise ValueError(
                f"priorities are used with draw='priority' only, got draw={self.draw!r}. Make the buffer "
                "with draw='priority', or don't update priorities."
            )
        numbers, values = torch.as_tensor(index).reshape(-1), torch.as_tensor(priority).reshape(-1)
        self._priorities.update(storage.follow(), numbers.numpy(), values.double().cpu().numpy())

    # -- saving ----------------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Priorities, as plain numbers and lists."""
        return {"warn_short": self._warn_short, "priorities": self._priorities.state_dict()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._warn_short = state_dict["warn_short"]
        self._shares = Shares(self._step_share)
        self._priorities.load_state_dict(state_dict["priorities"])

    def dumps(self, path: str | Path) -> None:
        path = Path(path)
        path.mkdir(parents=True, exist_ok=True)
        (path / _STATE_FILE).write_text(json.dumps(self.state_dict()))

    def loads(self, path: str | Path) -> None:
        self.load_state_dict(json.loads((Path(path) / _STATE_FILE).read_text()))

    def _empty(self) -> None:
        self._shares = Shares(self._step_share)
        self._priorities.clear()

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}(slice_length={self.slice_length}, padding={self.padding!r}, "
            f"overhang={self.overhang!r}, draw={self.draw!r})"
        )
