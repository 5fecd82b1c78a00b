"""Trajectories into a replay buffer: joined to trials, checked, completed, written in large pieces."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, get_args

import numpy as np
import torch
from tensordict import TensorDict, is_tensor_collection
from torchrl import logger as torchrl_logger
from torchrl.data import ReplayBuffer
from torchrl.envs import EnvBase
from tqdm import tqdm

from torchrl_amago.choice import check_choice
from torchrl_amago.data.offline.joining import join_attempts
from torchrl_amago.data.offline.readers import TrajectorySource
from torchrl_amago.data.offline.schema import Attempt, TrialSchema
from torchrl_amago.data.offline.trajectory import TrajectoryError

OnError = Literal["raise", "skip"]

# Steps that are written at once: enough that a write costs little per step, little enough for memory.
_WRITE_STEPS = 16_384


@dataclass
class LoadReport:
    """What :func:`load_trials` has written, and what it has left out.

    Args:
        returns: of every trial.
        lengths: steps of every trial.
        skipped: what was wrong, by the number of the trajectory.

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
    env: EnvBase | TrialSchema,
    *,
    episodes_per_trial: int | None = None,
    on_error: OnError = "raise",
    progress_bar: bool = True,
) -> LoadReport:
    """Write trajectories into a replay buffer, as if a collector had collected them in ``env``.

    Previous actions and rewards, time, attempts and everything else that the environment's trial
    transforms write is worked out. Trajectories may be longer than any slice or memory.

    Args:
        buffer: such as :func:`~torchrl_amago.data.make_trial_buffer` gives; must hold everything, with
            what it holds already.
        trajectories: what a reader gives (:func:`read_minari` and its like), or any iterable of what
            :func:`as_trajectory` knows: mappings of arrays, tensordicts of steps.
        env: the environment that training goes on in, or what its steps hold.
        episodes_per_trial: trajectories in a row that are attempts at one task, and become one trial;
            default: as many as the environment's trials have. Trajectories that say where attempts
            begin (an entry ``soft_reset``) are trials themselves.
        on_error: ``"raise"``, or ``"skip"`` to leave out trials with a bad trajectory, and count them.
        progress_bar: False to hide it; without a terminal it never shows.

    Raises:
        TrajectoryError: for a trajectory that can't be trained on, with its number from 0. Trials
            before it may have been written.
        ValueError: if the buffer is too small, or an argument wrong.

    Example:
        >>> import torch
        >>> from torchrl.data import Bounded, Composite, Unbounded
        >>> from torchrl_amago.data import make_trial_buffer
        >>> schema = TrialSchema(
        ...     Composite(observation=Unbounded((1,)), prev_reward=Unbounded((1,))), Bounded(-1, 1, (1,)))
        >>> trajectory = {
        ...     "observations": [[0.0], [1.0], [2.0]], "actions": [[0.5], [-0.5]],
        ...     "rewards": [1.0, 3.0], "terminations": [0, 0], "truncations": [0, 1]}
        >>> buffer = make_trial_buffer(10, slice_length=2, batch_size=3)
        >>> load_trials(buffer, [trajectory], schema).describe()
        '1 trials of 2 steps, mean return 4'
        >>> buffer.sample()["prev_reward"][0].flatten()
        tensor([0., 1.])
    """
    _check_arguments(trajectories, episodes_per_trial, on_error)
    schema = env if isinstance(env, TrialSchema) else TrialSchema.from_env(env)
    size = episodes_per_trial or (schema.rule and schema.rule.episodes) or 1
    writer = _TrialWriter(buffer, schema, on_error)
    group: dict[int, Attempt | None] = {}
    bar = tqdm(
        _loaders(trajectories),
        total=len(trajectories) if hasattr(trajectories, "__len__") else None,
        desc="loading trajectories",
        disable=None if progress_bar else True,
    )
    for number, load in enumerate(bar):
        attempt = writer.check(number, load)
        if attempt is not None and episodes_per_trial is None and schema.is_whole_trial(attempt):
            writer.add({number: attempt})
            continue
        group[number] = attempt
        if len(group) == size:
            writer.add(group)
            group = {}
    for number in group:
        writer.refuse(
            number, f"a trial is made of {size} trajectories, and the last has {len(group)}."
        )
    writer.flush()
    report = writer.report
    if report.skipped:
        first, problem = next(iter(report.skipped.items()))
        torchrl_logger.warning(
            f"skipped {len(report.skipped)} trajectories; the first is number {first}: {problem}"
        )
    return report


class _TrialWriter:
    """Checks attempts, joins them and writes many trials at once; keeps the report."""

    def __init__(self, buffer: ReplayBuffer, schema: TrialSchema, on_error: OnError) -> None:
        self.buffer, self.schema, self.on_error = buffer, schema, on_error
        self.report = LoadReport()
        self._waiting: list[TensorDict] = []

    def refuse(self, number: int, problem: str) -> None:
        if self.on_error == "raise":
            raise TrajectoryError(
                f"trajectory {number}: {problem} (on_error='skip' leaves such out and counts them.)"
            )
        self.report.skipped.setdefault(number, problem)

    def check(self, number: int, load: Callable[[], Any]) -> Attempt | None:
        try:
            return self.schema.check(load())
        except TrajectoryError as error:
            self.refuse(number, str(error))
            return None

    def add(self, group: dict[int, Attempt | None]) -> None:
        """Write a trial made of the trajectories of these numbers, None for those refused."""
        refused = [number for number, attempt in group.items() if attempt is None]
        if refused:
            for number in group:
                self.refuse(number, f"trajectory {refused[0]}, of the same trial, was refused.")
            return
        try:
            steps = join_attempts(self.schema, list(group.values()))
        except TrajectoryError as error:
            for number in group:
                self.refuse(number, str(error))
            return
        self.report.returns.append(steps["next", self.schema.reward_key].double().sum().item())
        self.report.lengths.append(len(steps))
        self._waiting.append(steps)
        if sum(map(len, self._waiting)) >= _WRITE_STEPS:
            self.flush()

    def flush(self) -> None:
        if not self._waiting:
            return
        steps, self._waiting = torch.cat(self._waiting), []
        capacity, held = self.buffer.capacity, len(self.buffer)
        if held + len(steps) > capacity:
            raise ValueError(
                f"the buffer must hold all trials: it holds {held} of at most {capacity} steps, and "
                f"{len(steps)} more are to be written. Give it a larger capacity; a reader knows its "
                "num_steps."
            )
        self.buffer.extend(steps)


def _loaders(trajectories: Iterable[Any]) -> Iterator[Callable[[], Any]]:
    """What gives each trajectory, so that one that can't be read doesn't end the iteration."""
    if isinstance(trajectories, TrajectorySource):
        for number in range(len(trajectories)):
            yield partial(trajectories.load, number)
    else:
        for trajectory in trajectories:
            yield lambda trajectory=trajectory: trajectory


def _check_arguments(
    trajectories: Iterable[Any], episodes_per_trial: int | None, on_error: OnError
) -> None:
    if is_tensor_collection(trajectories) or isinstance(trajectories, Mapping | ReplayBuffer):
        raise TypeError(
            f"load_trials takes trajectories one by one, got a {type(trajectories).__name__}. Let "
            "read_torchrl or read_d4rl tell the trajectories in it apart."
        )
    if episodes_per_trial is not None and episodes_per_trial < 1:
        raise ValueError(
            f"episodes_per_trial must be at least 1 or None, got {episodes_per_trial}. None takes as "
            "many as the environment's trials have."
        )
    check_choice("on_error", on_error, get_args(OnError))
