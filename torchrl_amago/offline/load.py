"""Trajectories into a replay buffer: checked, joined to trials, replayed, written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import numpy as np
from torchrl import logger as torchrl_logger
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase
from tqdm import tqdm

from torchrl_amago._validation import check_choice, check_counts
from torchrl_amago.offline._replay import MAX_ROWS, join, replay
from torchrl_amago.offline.trajectory import RecordedTrial, TrajectoryChecker, TrajectoryError

_MAX_BYTES = 2**28  # of trials played side by side, each as long as the longest


@dataclass
class OfflineReport:
    """Returns and lengths of the trials that were written, and problems of skipped trajectories."""

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)

    def describe(self) -> str:
        """Return one line of text."""
        mean = np.mean(self.returns) if self.returns else float("nan")
        text = f"{len(self.returns)} trials of {sum(self.lengths)} steps, mean return {mean:.4g}"
        return f"{text}; {len(self.skipped)} skipped" if self.skipped else text


def load_trials(
    buffer: ReplayBuffer,
    trajectories: Iterable[Any],
    env: EnvBase,
    *,
    episodes_per_trial: int | None = None,
    on_error: Literal["raise", "skip"] = "raise",
    progress_bar: bool = True,
) -> OfflineReport:
    """Write trajectories into a replay buffer, in their order, as if collected in ``env``.

    Args:
        buffer: must have room for everything.
        trajectories: a reader's, or any iterable of :class:`Trajectory`, mappings with the arrays
            ``observations`` (or a mapping of them), ``actions``, ``rewards``, ``terminations`` and
            ``truncations``, and tensordicts ``[L]`` of steps as a collector writes them.
        env: the environment of training, never stepped; or ``make_trial_env(RecordedEnv(...))``.
        episodes_per_trial: number of consecutive trajectories that become one trial; by default
            as many as the environment's trials have episodes. Those that mark their episodes, with
            an entry ``soft_reset``, are then trials themselves.
        on_error: ``"raise"``, or ``"skip"`` to leave out and count trials with a bad trajectory.
        progress_bar: False to hide it; without a terminal it is never printed.

    Raises:
        TrajectoryError: for a bad trajectory, with its number; those before it may be written.
        ValueError: if the buffer is too small.

    Example:
        >>> import gymnasium as gym
        >>> from torchrl_amago import make_trial_buffer, make_trial_env
        >>> env = make_trial_env(gym.make("Pendulum-v1"), episodes=1, trial_end="episode")
        >>> trajectory = {
        ...     "observations": np.zeros((3, 3)), "actions": [[2.0], [-1.0]], "rewards": [1.0, 3.0],
        ...     "terminations": [0, 0], "truncations": [0, 1]}
        >>> buffer = make_trial_buffer(10, slice_length=2, batch_size=3)
        >>> load_trials(buffer, [trajectory], env).describe()
        '1 trials of 2 steps, mean return 4'
    """
    if episodes_per_trial is not None:
        check_counts("None takes as many as the env has.", episodes_per_trial=episodes_per_trial)
    check_choice("on_error", on_error, ("raise", "skip"))
    checker, report = TrajectoryChecker(env), OfflineReport()

    def skip(numbers: Iterable[int], problem: str) -> None:
        text = f"trajectory {min(numbers)}: {problem}"
        if on_error == "raise":
            raise TrajectoryError(f"{text} (Or pass on_error='skip'.)")
        if not report.skipped:
            torchrl_logger.warning(f"skipped {text}")
        report.skipped = dict.fromkeys(numbers, problem) | report.skipped

    total = getattr(trajectories, "num_steps", None)
    with tqdm(total=total, unit="step", disable=not progress_bar or None) as bar:
        for trials in _batches(_trials(checker, trajectories, episodes_per_trial, skip)):
            steps, lengths = replay(checker, trials), [trial.length for trial in trials]
            if len(buffer) + len(steps) > (capacity := buffer.storage.max_size):
                got = f"it holds {len(buffer)} of at most {capacity} steps, and {len(steps)} more"
                raise ValueError(f"the buffer must hold all trials: {got} come. Enlarge it.")
            buffer.extend(steps)
            bar.update(len(steps))
            rewards = steps["next", checker.reward_key].double().split(lengths)
            report.returns += [float(reward.sum()) for reward in rewards]
            report.lengths += lengths
    return report


def _trials(
    checker: TrajectoryChecker,
    trajectories: Iterable[Any],
    episodes_per_trial: int | None,
    skip: Callable[[Iterable[int], str], None],
) -> Iterator[RecordedTrial]:
    """Join consecutive trajectories to trials; by default, take one that is a trial as it is."""
    size, group, source = episodes_per_trial or checker.trial.episodes or 1, {}, iter(trajectories)
    for number in count():
        try:
            one = checker.check(next(source))
        except StopIteration:
            break
        except TrajectoryError as error:
            one = skip([number], str(error))
        if episodes_per_trial is None and one is not None and one.marks_episodes:
            parts = {number: one}
        else:
            group[number] = one
            if len(group) < size:
                continue
            parts, group = group, {}
        if bad := [number for number, part in parts.items() if part is None]:
            skip(parts, f"trajectory {bad[0]}, of the same trial, was skipped.")
            continue
        try:
            yield join(checker.trial, [*parts.values()])
        except TrajectoryError as error:
            skip(parts, str(error))
    if group:
        skip(group, f"a trial has {size} trajectories, and the last one only {len(group)}.")


def _batches(trials: Iterable[RecordedTrial]) -> Iterator[list[RecordedTrial]]:
    """Group as many trials as are fast to play side by side and take little memory."""
    batch, longest = [], 0
    for trial in trials:
        longest = max(longest, trial.length)
        size = 2 * trial.rows_S.bytes() // len(trial.rows_S) * longest * (len(batch) + 1)
        if batch and (size > _MAX_BYTES or len(batch) == MAX_ROWS):
            yield batch
            batch, longest = [], trial.length
        batch.append(trial)
    if batch:
        yield batch
