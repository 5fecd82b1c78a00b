"""The learner's side of all workers, in the shape of a collector: intake, ratio, lag, figures."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor, nn
from torchrl.envs import Transform

from torchrl_amago import keys
from torchrl_amago._validation import check_positive
from torchrl_amago.data import TrialReplayBuffer

_POLL_SECONDS = 0.02


class RemoteTrials:
    """Collector whose trials are played elsewhere and taken in when the learner needs them.

    An iteration takes in trials until the buffer holds the steps that are due, and waits where
    there are none. Workers wait while their trials are not taken in. Due are the frames of one more
    round, or as many steps as hold ``samples_per_insert``. A subclass writes `_start`, `_publish`,
    `_take` (the numbers of a stored segment, or None), `_supervise`, `_figures` and `_stop`.

    Args:
        policy: the learner's, whose weights the workers get.
        replay_buffer: of whole trials; only this process writes to it.
        run_dir: the run's folder.
        total_updates: version at which the workers end.
        publish_interval: updates between two versions for the workers.
        samples_per_insert: real steps of batches for each step that is written.
        keeps_replay: the buffer's folder outlives the process, so that checkpoints don't copy it.
        num_learners: ranks that each sample as many steps.
    """

    requested_frames_per_batch = None

    def __init__(
        self,
        policy: nn.Module,
        replay_buffer: TrialReplayBuffer,
        run_dir: str | Path,
        *,
        total_updates: int,
        publish_interval: int = 20,
        samples_per_insert: float | None = None,
        keeps_replay: bool = False,
        num_learners: int = 1,
    ) -> None:
        if samples_per_insert is not None:
            check_positive("None is for a single process's.", samples_per_insert=samples_per_insert)
        self.policy, self.replay_buffer, self.run_dir = policy, replay_buffer, Path(run_dir)
        self.total_updates, self.publish_interval = total_updates, publish_interval
        self.samples_per_insert, self.keeps_replay = samples_per_insert, keeps_replay
        self.num_learners = num_learners
        begin = replay_buffer.write_count
        # Due: the steps that should be written by now, counted as the buffer counts them.
        self._counts = {"due": begin, "begin": begin, "sampled": 0, "version": 0, "round": 1}
        self._published: int | None = None
        self._is_open = self._stops = False
        self._seed = 0
        replay_buffer.append_transform(_Observer(self))
        self._start_window()

    @property
    def version(self) -> int:
        """Number of the learner's updates."""
        return self._counts["version"]

    def __iter__(self) -> Iterator[None]:
        self._is_open = True
        self.update_policy_weights_()
        self._start()
        while self._take_in_due():
            yield

    def _take_in_due(self) -> bool:
        """Take in the trials that are due; return False if a signal comes first."""
        counts, buffer = self._counts, self.replay_buffer
        due = counts["due"]
        if self.samples_per_insert is None:
            due += counts["round"]
        elif not buffer.can_sample():
            due = buffer.write_count + 1
        while buffer.write_count < due and not self._stops:
            self._supervise()
            if (taken := self._take()) is None:
                time.sleep(_POLL_SECONDS)
                self._window["waited"] += _POLL_SECONDS
                continue
            counts["round"] = taken["frames"]
            for name in ("trials", "versions"):
                self._window[name] += taken[name]
        counts["due"] = due
        return not self._stops

    def request_stop(self) -> None:
        """Don't wait for trials any more."""
        self._stops = True

    def observe(self, batch: TensorDictBase) -> None:
        """Count the real steps of a sampled batch ``[B, T]`` and their policies' versions."""
        mask_BT, counts = batch.get(keys.MASK), self._counts
        version_N = batch.get(keys.POLICY_VERSION)[mask_BT]
        sampled = len(version_N) * self.num_learners
        counts["sampled"] += sampled
        if self.samples_per_insert is not None:
            counts["due"] += sampled / self.samples_per_insert
        self._window["lags"].append(counts["version"] - version_N)
        self._window["numbers"] = batch.get("index")[:, 0]

    def after_update(self, trainer: Any) -> dict[str, float]:
        """Follow the trainer's updates, as one of its callbacks; return the columns of a row."""
        counts, log = trainer.counts, trainer.intervals.log
        self._counts["version"] = counts.updates
        if self._is_open:
            self._supervise()
        return self.metrics() if counts.updates % log == 0 else {}

    def metrics(self) -> dict[str, float]:
        """Return lag, ratio, waiting and the workers' columns since the last call."""
        window, counts, buffer = self._window, self._counts, self.replay_buffer
        inserted = max(buffer.write_count - counts["begin"], 1)
        seconds = max(time.monotonic() - window["since"], 1e-9)
        found = {
            "ratio/samples_per_insert": counts["sampled"] / inserted,
            "wait/learner": min(window["waited"] / seconds, 1.0),
        }
        if window["lags"]:
            lag_N = torch.cat(window["lags"]).float()
            # torch.quantile takes at most 16 million numbers.
            p95 = lag_N.sort().values[int(0.95 * (len(lag_N) - 1))]
            lags = {"mean": lag_N.mean(), "p95": p95, "max": lag_N.max()}
            found |= {f"lag/{name}": float(value) for name, value in lags.items()}
            found["replay/age"] = _mean_age(buffer, window["numbers"])
        if window["trials"]:
            found["lag/versions_per_trial"] = window["versions"] / window["trials"]
        self._start_window()
        return found | self._figures()

    def _start_window(self) -> None:
        """Start the figures of the next row."""
        self._window = {"waited": 0.0, "trials": 0, "versions": 0, "lags": [], "numbers": None}
        self._window["since"] = time.monotonic()

    def update_policy_weights_(self, *_: Any, **__: Any) -> None:
        """Publish the weights if the workers' are older than ``publish_interval`` updates."""
        before = self._published
        if self._is_open and (before is None or self.version - before >= self.publish_interval):
            self._publish(finished=False)
            self._published = self.version

    def set_seed(self, seed: int, static_seed: bool = False) -> None:
        """Seed the workers that start from now on, each with a number of its own."""
        self._seed = seed

    def reset(self) -> None:
        """Do nothing: workers begin new trials when they start."""

    def state_dict(self) -> dict[str, Any]:
        """Return the counts; trials in progress are the workers'."""
        return {"in_progress": {**self._counts, "seed": self._seed}}

    def load_state_dict(self, state: Mapping[str, Any], strict: bool = True) -> None:
        """Go on counting; trials that were written since then count as well."""
        saved = dict(state["in_progress"])
        # Another seed than before, or the tasks would come again.
        self._seed = saved.pop("seed") + saved["version"] + 1
        self._counts = saved
        # A replay buffer of another folder may have fewer.
        written = self.replay_buffer.write_count
        self._counts |= {name: min(saved[name], written) for name in ("due", "begin")}

    def shutdown(self, **_: Any) -> None:
        """End the workers; those of other machines too if this was the last update."""
        if self._is_open and self.version >= self.total_updates:
            self._publish(finished=True)
        self._is_open = False
        self._stop()


def _mean_age(buffer: TrialReplayBuffer, number_B: Tensor) -> float:
    """Return the mean number of steps that were written since trials, by their numbers."""
    trials = buffer.storage.trials()
    position_B = (number_B.numpy() - trials.number[0]).clip(0)  # some may be evicted
    return buffer.write_count - float(trials.entries["stop"][position_B].mean())


class _Observer(Transform):
    """Transform that shows sampled batches to their collector and leaves them as they are."""

    def __init__(self, collector: RemoteTrials) -> None:
        super().__init__()
        self._observe = collector.observe

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        if tensordict.get(keys.MASK, None) is not None:  # not steps read by their places
            self._observe(tensordict)
        return tensordict
