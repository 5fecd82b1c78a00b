"""Collect whole trials: the same data as TorchRL's collector writes, put together in a few operations.

TorchRL cuts every batch into pieces, one per trial, and joins them again: with 64 short trials that
takes as long as stepping the environment.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.collectors import Collector
from torchrl.collectors.utils import _maybe_normalize_replay_buffer_tensordict_device

_DONE_KEYS = ("done", "terminated", "truncated")


class TrialCollector(Collector):
    """Collector that writes complete trials into a replay buffer, one after another.

    It writes what `Collector(..., trajs_per_batch=1)` does, in the same order, only faster. The steps
    of trials under way wait in the collector until their trial is complete.

    Args:
        env: batched environment.
        policy: called at every step.
        replay_buffer: what trials are written to.
        frames_per_batch: environment steps, all rows together, between two writes.
        options: further arguments of :class:`torchrl.collectors.Collector`.

    Example:
        >>> from torchrl_amago.data import make_trial_buffer
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(8,)), episodes=2)
        >>> buffer = make_trial_buffer(1000, slice_len=18, batch_size=4, warn_short=False)
        >>> collector = TrialCollector(
        ...     env, env.rand_action, replay_buffer=buffer, frames_per_batch=8 * 18, total_frames=8 * 18)
        >>> list(collector), len(buffer) > 0
        ([None], True)
    """

    def __init__(
        self, env: Any, policy: Any, *, replay_buffer: Any, frames_per_batch: int, **options: Any
    ) -> None:
        self._pending: TensorDictBase | None = None
        super().__init__(
            env,
            policy,
            replay_buffer=replay_buffer,
            frames_per_batch=frames_per_batch,
            trajs_per_batch=1,
            **options,
        )

    def _iter_by_trajectories(self) -> Iterator[None]:
        self._pending = None
        writes_steps, self._ignore_rb = self._ignore_rb, True
        try:
            for batch in self.iterator():
                trials = self._complete_trials(batch.reshape(-1))
                if self._discards_in_flight_trajectories():
                    self._pending = None
                if len(trials):
                    buffer = self.replay_buffer
                    trials = _maybe_normalize_replay_buffer_tensordict_device(trials, buffer)
                    buffer.extend(trials)
                yield
        finally:
            self._ignore_rb = writes_steps

    def _complete_trials(self, steps: TensorDictBase) -> TensorDictBase:
        """Trials that these steps complete, side by side; the others' steps are kept."""
        if self._pending is not None:
            steps = torch.cat((self._pending, steps))
        # Stable: the order of time is kept within each trial.
        trial, order = _trial_numbers(steps).sort(stable=True)
        _, number, length = trial.unique_consecutive(return_inverse=True, return_counts=True)
        last = length.cumsum(0) - 1
        is_complete = _is_done(steps)[order][last][number]
        pending = order[~is_complete]
        self._pending = steps[pending] if len(pending) else None
        return steps[order[is_complete]]

    def _drop_partial_trajectories(self, traj_ids: list[int]) -> None:
        if self._pending is not None:
            trial = _trial_numbers(self._pending)
            self._pending = self._pending[~torch.isin(trial, trial.new_tensor(traj_ids))]

    def _flush_trajectory_assembly(self) -> None:
        self._pending = None


def _trial_numbers(steps: TensorDictBase) -> Tensor:
    return steps.get(("collector", "traj_ids")).reshape(-1)


def _is_done(steps: TensorDictBase) -> Tensor:
    flags = (steps.get(("next", key), None) for key in _DONE_KEYS)
    return torch.stack([z.flatten(1).any(1) for z in flags if z is not None]).any(0)
