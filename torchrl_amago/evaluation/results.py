"""Results of an evaluation, trial by trial."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from torchrl_amago._validation import check_choice

Measure = Literal["success", "return"]


@dataclass(frozen=True)
class TrialResults:
    """Returns and lengths of N trials of up to k episodes each.

    Attributes:
        episode_return: `[N, k]` float32, return of each episode; NaN if the trial ended before it.
        episode_success: `[N, k]` bool, True if that episode was a success.
        trial_return: `[N]` float32, sum of the trial's rewards.
        trial_length: `[N]` int64, steps of the trial.
        task_id: `[N]` int64, number of the task, -1 if unknown.
        task_names: names of these numbers, from 0.

    Example:
        >>> returns = torch.tensor([[0.0, 1.0], [1.0, float("nan")]])
        >>> results = TrialResults(returns, returns > 0, returns.nansum(1), torch.tensor([12, 8]))
        >>> results.by_episode("success").nanmean(0)
        tensor([0.5000, 1.0000])
    """

    episode_return: Tensor
    episode_success: Tensor
    trial_return: Tensor
    trial_length: Tensor
    task_id: Tensor | None = None
    task_names: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.trial_return)

    @property
    def episode_happened(self) -> Tensor:
        """`[N, k]` bool, False if the trial ended before the episode."""
        return ~self.episode_return.isnan()

    def by_episode(self, measure: Measure = "success") -> Tensor:
        """Return `[N, k]` float32: `"success"` (0 or 1) or `"return"`, NaN without an episode."""
        check_choice("measure", measure, ("success", "return"))
        if measure == "return":
            return self.episode_return
        return torch.where(self.episode_happened, self.episode_success.float(), torch.nan)

    def by_task(self, measure: Measure = "success") -> dict[str, float]:
        """Return the mean over the trials of each task, and of each group of tasks, by name.

        A group is the part of names before the first slash. Tasks without trials are NaN. Tasks
        without names are called by their numbers.

        Example:
            >>> task, names = torch.tensor([0, 1, 1, 1]), ("train/reach", "train/push")
            >>> returns = task.float().view(4, 1)
            >>> TrialResults(returns, returns > 0, returns, task, task, names).by_task()
            {'train/reach': 0.0, 'train/push': 1.0, 'train': 0.75}
        """
        tasks = dict(enumerate(self.task_names))
        if not tasks and self.task_id is not None:
            tasks = {task: str(task) for task in self.task_id.unique().tolist() if task >= 0}
        groups = {number: name.split("/")[0] for number, name in tasks.items()}
        trials: dict[str, Tensor] = {}
        for number, name in [*tasks.items(), *groups.items()]:
            trials[name] = trials.get(name, False) | (self.task_id == number)
        values = self.by_episode(measure)
        return {name: values[rows].nanmean().item() for name, rows in trials.items()}

    def summary(self) -> dict[str, float]:
        """Return means over the trials, for a logger, and the success of each task and group.

        `last` is each trial's own last episode.
        """
        success = self.by_episode("success")
        by_task = self.by_task() if self.task_names else {}
        episode = torch.arange(success.shape[1])
        last = torch.where(self.episode_happened, episode, -1).amax(1, keepdim=True)
        return {
            "trial_return": self.trial_return.mean().item(),
            "trial_length": self.trial_length.float().mean().item(),
            "success": success.nanmean().item(),
            "success_first": success[:, 0].mean().item(),
            "success_last": success.gather(1, last).mean().item(),
            **{f"success/{name}": mean for name, mean in by_task.items()},
        }

    def save(self, path: str | Path) -> None:
        """Write an `.npz` file, which :meth:`load` and `numpy.load` read without pickle."""
        arrays = {name: value for name, value in vars(self).items() if value is not None}
        arrays["task_names"] = np.array(self.task_names, dtype=str)
        # Given a name, numpy would add a suffix to it.
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> TrialResults:
        """Read a file of :meth:`save`."""
        with np.load(path, allow_pickle=False) as arrays:
            values = dict(arrays)
        names = values.pop("task_names", np.array([])).tolist()
        values = {name: torch.from_numpy(value) for name, value in values.items()}
        return cls(**values, task_names=tuple(names))

    @classmethod
    def concatenate(cls, results: Sequence[TrialResults]) -> TrialResults:
        """Pool the trials of several results; missing episodes become NaN."""
        width = max(result.episode_return.shape[1] for result in results)
        pooled: dict[str, list[Tensor]] = {}
        for name, values in (entry for result in results for entry in vars(result).items()):
            if isinstance(values, Tensor):
                fill = torch.nan if name == "episode_return" else 0
                missing = width - values.shape[1] if values.ndim == 2 else 0
                values = nn.functional.pad(values, (0, missing), value=fill)
                pooled.setdefault(name, []).append(values)
        tensors = {name: torch.cat(values) for name, values in pooled.items()}
        return cls(**tensors, task_names=results[0].task_names)


class EvaluationResults(NamedTuple):
    """Greedy trials, and trials with sampled actions, from one seed.

    Example:
        >>> ones = torch.ones(2, 1)
        >>> trials = TrialResults(ones, ones > 0, ones.sum(1), torch.tensor([4, 4]))
        >>> EvaluationResults(trials, trials).describe("success")  # doctest: +ELLIPSIS
        'On 2 held-out trials: greedy success 1.000; sampled (...) success 1.000'
    """

    greedy: TrialResults
    sampled: TrialResults

    def save(self, run_dir: str | Path) -> None:
        """Write `evaluation.npz` (greedy) and `evaluation_sampled.npz` into the run's folder."""
        self.greedy.save(Path(run_dir) / "evaluation.npz")
        self.sampled.save(Path(run_dir) / "evaluation_sampled.npz")

    def describe(self, *names: str) -> str:
        """Return one line with both summaries, of all entries or of those named."""
        greedy, sampled = (
            ", ".join(f"{name} {mean[name]:.3f}" for name in names or mean)
            for mean in (results.summary() for results in self)
        )
        trials = f"On {len(self.greedy)} held-out trials"
        return f"{trials}: greedy {greedy}; sampled (as trained, without epsilon) {sampled}"


#: Of an evaluation: numbers by name, or all trials.
Results = Mapping[str, float] | TrialResults


def evaluation_metrics(results: Results) -> dict[str, float]:
    """Return the columns of an evaluation: numbers by name, or the summary of ``TrialResults``."""
    metrics = results.summary() if isinstance(results, TrialResults) else results
    return {f"eval/{name}": float(value) for name, value in metrics.items()}
