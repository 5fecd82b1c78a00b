"""Monitor and evaluation, also as hooks of a stock :class:`torchrl.trainers.Trainer`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.data import ReplayBuffer
from torchrl.trainers import Trainer, TrainerHookBase

from torchrl_amago import keys
from torchrl_amago.data._trials import newest_steps
from torchrl_amago.evaluation import Evaluator, evaluation_metrics, run_evaluator
from torchrl_amago.progress import MetricWindow
from torchrl_amago.trainers.nonfinite import check_data


class EvaluationHook(TrainerHookBase):
    """Evaluation every ``interval`` collected batches; training's random numbers stay as they are.

    Example:
        >>> EvaluationHook(lambda: {"score": 3.0})()
        {'eval/score': 3.0}
    """

    def __init__(self, evaluator: Evaluator, interval: int = 1) -> None:
        self.evaluator, self.interval, self._batches = evaluator, interval, 0

    def register(self, trainer: Trainer, name: str = "evaluation") -> None:
        trainer.register_op("post_steps_log", self)
        trainer.register_module(name, self)

    def __call__(self, batch: TensorDictBase | None = None) -> dict[str, float] | None:
        self._batches += 1
        is_due = self._batches % self.interval == 0
        return evaluation_metrics(run_evaluator(self.evaluator)) if is_due else None

    def state_dict(self) -> dict[str, Any]:
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self._batches = int(state_dict["batches"])


@dataclass(eq=False, repr=False)
class TrialMonitor(TrainerHookBase):
    """Monitor of collected trials: their number, mean returns and successes; NaN stops the run.

    Every step is read once, after a collector has written it. A trial that is written in fragments
    counts once its last one is there. They are joined by ``time_idx``; without it, the fragments of
    a trial must follow one another.

    Args:
        replay_buffer: the buffer the collector writes to; its ``write_count`` counts steps.
        window: receives ``train/trial_return``, ``train/trial_length``, ``train/success_first`` and
            ``train/success_last`` (of a trial's first and last episode).
        run_dir: folder for steps with NaN or infinity.
        success_threshold: an episode succeeds if its return is larger.

    Example:
        >>> from torchrl_amago import TMaze, make_trial_buffer, make_trial_env
        >>> rb = make_trial_buffer(1000, slice_length=4, batch_size=4)
        >>> env = make_trial_env(TMaze(3, batch_size=[6]), episodes=1)
        >>> _ = rb.extend(env.rollout(4).reshape(-1))
        >>> TrialMonitor(rb)()["train/trial_length"]
        4.0
    """

    replay_buffer: ReplayBuffer
    window: MetricWindow | None = None
    run_dir: str | Path = "."
    success_threshold: float = 0.0

    def __post_init__(self) -> None:
        self.window = self.window or MetricWindow()
        self.seen = self.trials = 0
        # Unfinished trials by their next time index: return and length of what is written.
        self._unfinished: dict[int, list[tuple[float, int]]] = {}

    def register(self, trainer: Trainer, name: str = "trial_monitor") -> None:
        trainer.register_op("pre_steps_log", self)
        trainer.register_module(name, self)

    def __call__(self, batch: TensorDictBase | None = None) -> dict[str, float]:
        """Read the new steps; return the metrics of trials that ended, and empty the window."""
        self.update()
        return {**self.window.means(), "trials": self.trials}

    def skip_existing(self) -> None:
        """Count the trials that are there already, without logging them as collected."""
        self.seen = self.replay_buffer.write_count
        self.trials = getattr(self.replay_buffer, "num_trials", 0)

    def forget_unfinished(self) -> None:
        """Forget trials in progress, whose remaining steps will not be written."""
        self._unfinished.clear()

    def update(self) -> None:
        """Read the new steps into the window."""
        written = self.replay_buffer.write_count
        count, self.seen = written - self.seen, written
        if count <= 0:
            return
        steps = newest_steps(self.replay_buffer, count)  # not those that are overwritten already
        check_data(steps, Path(self.run_dir), "collected observations and rewards")
        done = steps.get(("next", "done")).reshape(-1)
        ended = self._ended_trials(steps, done)
        self.trials += len(ended)
        self.window.add("train/trial_return", sum(gain for gain, _ in ended), len(ended))
        self.window.add("train/trial_length", sum(length for _, length in ended), len(ended))
        self._add_successes(steps, done)

    def _ended_trials(self, steps: TensorDictBase, done: Tensor) -> list[tuple[float, int]]:
        """Return (return, length) of each trial that ended; keep those of unfinished ones."""
        time, is_last = steps.get(keys.TIME_IDX, None), done.clone()
        is_last[-1] = True
        if time is not None:
            time = time.reshape(-1)
            is_last[:-1] |= time[1:] != time[:-1] + 1
        fragment = is_last.cumsum(0) - is_last.long()
        lengths = fragment.bincount()
        reward = steps.get(("next", "reward")).reshape(len(done), -1).sum(1, dtype=torch.float64)
        # Without times there is one trial at a time, and every fragment continues it.
        stops = torch.zeros_like(lengths) if time is None else time[is_last] + 1
        starts = stops if time is None else stops - lengths
        ended, columns = [], (starts, stops, fragment.bincount(reward), lengths, done[is_last])
        for start, stop, gain, length, is_over in zip(*(c.tolist() for c in columns), strict=True):
            # Trials of equal age continue in the order in which they were written.
            gain_before, length_before = (self._unfinished.get(start) or [(0.0, 0)]).pop(0)
            total = (gain_before + gain, length_before + length)
            (ended if is_over else self._unfinished.setdefault(stop, [])).append(total)
        self._unfinished = {time: trials for time, trials in self._unfinished.items() if trials}
        return ended

    def _add_successes(self, steps: TensorDictBase, done: Tensor) -> None:
        entries = (keys.EPISODE_IDX, ("next", keys.EPISODE_RETURN), ("next", keys.SOFT_RESET))
        found = [steps.get(key, None) for key in entries]
        if any(value is None for value in found):
            return  # not a task of episodes
        episode, gain, soft_reset = (value.reshape(-1) for value in found)
        success, is_first = gain > self.success_threshold, (done | soft_reset) & (episode == 0)
        for name, at in {"first": is_first, "last": done}.items():
            self.window.add(f"train/success_{name}", success[at].sum().item(), int(at.sum()))

    def state_dict(self) -> dict[str, Any]:
        return {"seen": self.seen, "trials": self.trials, "unfinished": self._unfinished}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        self.seen, self.trials = int(state_dict["seen"]), int(state_dict["trials"])
        self._unfinished = {t: list(trials) for t, trials in state_dict["unfinished"].items()}
