"""Trajectories into a replay buffer: checked, joined to trials, replayed, written."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal, get_args

import numpy as np
from tensordict import is_tensor_collection
from torchrl import logger as torchrl_logger
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase
from tqdm import tqdm

from torchrl_amago._validation import check_choice, check_counts
from torchrl_amago.offline.recorded import ROWS_AT_ONCE, RecordedTrial, join, replay
from torchrl_amago.offline.trajectory import (
    TrajectoryChecker,
    TrajectoryError,
)

OnError = Literal["raise", "skip"]

# What trials played side by side may take, each as long as the longest, with root and next.
_BYTES_AT_ONCE = 2**28


@dataclass
class LoadReport:
    """Returns and lengths of the trials that were written, and problems of trajectories left out.

    Example:
        >>> LoadReport(returns=[1.0, 2.0], lengths=[5, 7]).describe()
        '2 trials of 12 steps, mean return 1.5'
    """

    returns: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    skipped: dict[int, str] = field(default_factory=dict)

    def describe(self) -> str:
        """One line."""
        mean = np.mean(self.returns) if self.returns else float("nan")
        text = f"{len(self.returns)} trials of {sum(self.lengths)} steps, mean return {mean:.4g}"
        return f"{text}; {len(self.skipped)} skipped" if self.skipped else text


def load_trials(
    buffer: ReplayBuffer,
    trajectories: Iterable[Any],
    env: EnvBase,
    *,
    episodes_per_trial: int | None = None,
    on_error: OnError = "raise",
    progress_bar: bool = True,
) -> LoadReport:
    """Write trajectories into a replay buffer, in their order, as if collected in ``env``.

    They are played back under the environment's trial transforms, which write previous actions and
    rewards, time, episodes and ends.

    Args:
        buffer: must have room for everything.
        trajectories: what a reader gives (:func:`read_minari` and its like), or any iterable of what
            :func:`as_trajectory` knows: mappings of arrays, tensordicts of steps.
        env: the environment that training goes on in, never stepped; where there is none,
            ``make_trial_env(RecordedEnv(...))``.
        episodes_per_trial: trajectories in a row that become one trial, being episodes at one task;
            by default as many as the environment's trials have, and those with an entry
            ``soft_reset``, which says where episodes begin, are trials themselves.
        on_error: ``"raise"``, or ``"skip"`` to leave out trials with a bad trajectory, and count them.
        progress_bar: False to hide it; without a terminal it never shows.

    Raises:
        TrajectoryError: for a trajectory that can't be trained on, with its number from 0. Trials
            before it may have been written.
        ValueError: if the buffer is too small, or an argument wrong.

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
        >>> buffer.sample()["prev_reward"][0].flatten()
        tensor([0., 1.])
    """
    if is_tensor_collection(trajectories) or isinstance(trajectories, Mapping | ReplayBuffer):
        problem = f"load_trials takes trajectories one by one, got a {type(trajectories).__name__}."
        raise TypeError(f"{problem} Let read_torchrl or read_d4rl tell those in it apart.")
    if episodes_per_trial is not None:
        check_counts("None takes as many as the env has.", episodes_per_trial=episodes_per_trial)
    check_choice("on_error", on_error, get_args(OnError))
    checker, report = TrajectoryChecker(env), LoadReport()

    def refuse(numbers: Iterable[int], problem: str) -> None:
        for number in numbers:
            if on_error == "raise":
                raise TrajectoryError(f"trajectory {number}: {problem} (Or pass on_error='skip'.)")
            report.skipped.setdefault(number, problem)

    total = len(trajectories) if hasattr(trajectories, "__len__") else None
    with tqdm(total=total, desc="loading trajectories", disable=not progress_bar or None) as bar:
        source = checker, iter(trajectories), bar, refuse
        for trials in _side_by_side(_trials(*source, episodes_per_trial)):
            steps, lengths = replay(checker, trials), [trial.length for trial in trials]
            held, capacity = len(buffer), buffer.storage.max_size
            if held + len(steps) > capacity:
                raise ValueError(
                    f"the buffer must hold all trials: it holds {held} of at most {capacity} steps, "
                    f"and {len(steps)} more come. Make it as large as a reader's num_steps."
                )
            buffer.extend(steps)
            rewards = steps["next", checker.reward_key].double().split(lengths)
            report.returns += [float(reward.sum()) for reward in rewards]
            report.lengths += lengths
    if report.skipped:
        first, problem = min(report.skipped.items())
        text = f"skipped {len(report.skipped)} trajectories; the first is number {first}: {problem}"
        torchrl_logger.warning(text)
    return report


def _trials(
    checker: TrajectoryChecker,
    trajectories: Iterator[Any],
    bar: tqdm,
    refuse: Callable[[Iterable[int], str], None],
    episodes_per_trial: int | None,
) -> Iterator[RecordedTrial]:
    """Trials of as many trajectories in a row, or by default of one that is a trial itself."""
    size, group = episodes_per_trial or checker.rule.episodes or 1, {}
    for number in count():
        try:
            one = checker.check(next(trajectories))
        except StopIteration:
            break
        except TrajectoryError as error:
            one = refuse([number], str(error))
        bar.update()
        if episodes_per_trial is None and one is not None and one.is_trial:
            parts = {number: one}
        else:
            group[number] = one
            if len(group) < size:
                continue
            parts, group = group, {}
        try:
            if bad := [number for number, part in parts.items() if part is None]:
                raise TrajectoryError(f"trajectory {bad[0]}, of the same trial, was refused.")
            yield join(checker.rule, [*parts.values()])
        except TrajectoryError as error:
            refuse(parts, str(error))
    refuse(group, f"a trial is made of {size} trajectories, and the last has {len(group)}.")


def _side_by_side(trials: Iterable[RecordedTrial]) -> Iterator[list[RecordedTrial]]:
    """As many trials at once as are fast and take little memory."""
    chosen: list[RecordedTrial] = []
    for trial in trials:
        longest = max(one.length for one in (*chosen, trial))
        size = 2 * trial.rows.bytes() // len(trial.rows) * longest * (len(chosen) + 1)
        if chosen and (size > _BYTES_AT_ONCE or len(chosen) == ROWS_AT_ONCE):
            yield chosen
            chosen = []
        chosen.append(trial)
    if chosen:
        yield chosen
