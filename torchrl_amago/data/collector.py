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

from torchrl_amago.data.replay.buffer import TrialReplayBuffer
from torchrl_amago.data.trial_ends import trial_ends


class TrialCollector(Collector):
    """Collector that writes complete trials into a replay buffer, one after another.

    It writes what `Collector(..., trajs_per_batch=1)` does, in the same order, only faster. The steps
    of trials under way wait in the collector until their trial is complete, or, with
    ``fragment_length``, until there are so many of them: endless and very long trials are written
    in fragments then. A fragment is stored like a trial. Its steps are those of the trial, with their
    true ``time_idx``; only the last fragment ends with ``done``.

    Args:
        env: batched environment.
        policy: called at every step.
        replay_buffer: what trials are written to; with ``fragment_length`` a :class:`TrialReplayBuffer`.
        frames_per_batch: environment steps, all rows together, between two writes.
        fragment_length: steps after which a trial is cut; None never cuts.
        stagger: cut the first fragment of each trial early, by a length of its own, so that trials that
            began together don't all fill their fragments in the same step.
        options: further arguments of :class:`torchrl.collectors.Collector`.

    Raises:
        ValueError: for a ``fragment_length`` smaller than 1, or with another buffer; from iterating, if
            no flag says where trials end.

    Example:
        >>> from torchrl_amago.data import make_trial_buffer
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(8,)), episodes=2)
        >>> buffer = make_trial_buffer(1000, slice_length=18, batch_size=4, warn_short=False)
        >>> collector = TrialCollector(
        ...     env, env.rand_action, replay_buffer=buffer, frames_per_batch=8 * 18, total_frames=8 * 18)
        >>> list(collector), len(buffer) > 0
        ([None], True)
    """

    def __init__(
        self,
        env: Any,
        policy: Any,
        *,
        replay_buffer: Any,
        frames_per_batch: int,
        fragment_length: int | None = None,
        stagger: bool = True,
        **options: Any,
    ) -> None:
        if fragment_length is not None and fragment_length < 1:
            raise ValueError(
                f"fragment_length must be at least 1 or None, got {fragment_length}. It is the number "
                "of steps after which an endless trial is cut."
            )
        if fragment_length is not None and not isinstance(replay_buffer, TrialReplayBuffer):
            raise ValueError(
                "fragments need a buffer that is told where they end, a TrialReplayBuffer, got "
                f"{type(replay_buffer).__name__}. Make it with make_trial_buffer, or leave "
                "fragment_length out."
            )
        self.fragment_length, self.stagger = fragment_length, stagger
        self._pending: TensorDictBase | None = None
        self._begun: set[int] = set()  # trials of which a fragment was written
        super().__init__(
            env,
            policy,
            replay_buffer=replay_buffer,
            frames_per_batch=frames_per_batch,
            trajs_per_batch=1,
            **options,
        )

    def _iter_by_trajectories(self) -> Iterator[None]:
        self._flush_trajectory_assembly()
        writes_steps, self._ignore_rb = self._ignore_rb, True
        try:
            for batch in self.iterator():
                trials, lengths = self._complete_trials(batch.reshape(-1))
                if self._discards_in_flight_trajectories():
                    self._flush_trajectory_assembly()
                if lengths:
                    buffer = self.replay_buffer
                    trials = _maybe_normalize_replay_buffer_tensordict_device(trials, buffer)
                    # Ends say it all where nothing is cut.
                    cut = {} if self.fragment_length is None else {"lengths": lengths}
                    buffer.extend(trials, **cut)
                yield
        finally:
            self._ignore_rb = writes_steps

    def _complete_trials(self, steps: TensorDictBase) -> tuple[TensorDictBase, list[int]]:
        """Trials and fragments that these steps complete, side by side, and their lengths.

        The others' steps are kept.
        """
        if self._pending is not None:
            steps = torch.cat((self._pending, steps))
        # Stable: the order of time is kept within each trial.
        trial, order = _trial_numbers(steps).sort(stable=True)
        number, length = trial.unique_consecutive(return_counts=True)
        last = length.cumsum(0) - 1
        ends = trial_ends(steps)
        if ends is None:
            raise ValueError(
                "trials end where 'done', 'terminated' or 'truncated' is True under 'next', and the "
                f"steps have none of them, only {sorted(map(str, steps['next'].keys(True, True)))}. "
                "Give the environment one such flag at the root."
            )
        is_complete = ends[order[last]]
        chosen, pending, lengths = [], [], []
        pieces = zip(
            number.tolist(), order.split(length.tolist()), is_complete.tolist(), strict=True
        )
        for trial_number, steps_of, complete in pieces:
            cuts = self._cuts(trial_number, len(steps_of), complete)
            written = sum(cuts)
            lengths += cuts
            chosen.append(steps_of[:written])
            pending.append(steps_of[written:])
        left = torch.cat(pending)
        self._pending = steps[left] if len(left) else None
        return steps[torch.cat(chosen)], lengths

    def _cuts(self, trial: int, length: int, complete: bool) -> list[int]:
        """Lengths of what is written now of a trial's waiting steps."""
        fragment_length, cuts = self.fragment_length, []
        if fragment_length is not None:
            size = fragment_length
            if self.stagger and trial not in self._begun:
                rows = self.env.batch_size.numel()
                size = -(-fragment_length * (trial % rows + 1) // rows)
            while length >= size:
                cuts.append(size)
                length -= size
                size = fragment_length
            if cuts:
                self._begun.add(trial)
        if complete:
            self._begun.discard(trial)
            cuts += [length] if length else []
        return cuts

    def _drop_partial_trajectories(self, traj_ids: list[int]) -> None:
        self._begun -= set(traj_ids)
        if self._pending is not None:
            trial = _trial_numbers(self._pending)
            self._pending = self._pending[~torch.isin(trial, trial.new_tensor(traj_ids))]

    def _flush_trajectory_assembly(self) -> None:
        self._pending = None
        self._begun.clear()


def _trial_numbers(steps: TensorDictBase) -> Tensor:
    return steps.get(("collector", "traj_ids")).reshape(-1)
