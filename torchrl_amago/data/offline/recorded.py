"""Recorded trajectories played back under an environment's own transforms.

A step that an agent trains on holds more than data do: the previous action and reward, the time in the
trial, its attempt. The transforms that write this in the real environment write it here as well.

Legend: R trials that are played side by side, L steps of a trial, T steps of the longest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import Compose, EnvBase, TransformedEnv

from torchrl_amago.data.offline.arrays import TrajectoryError
from torchrl_amago.data.offline.checking import CheckedTrajectory, TrajectoryChecker
from torchrl_amago.envs.transforms import TrialTransform

_FLAGS = ("done", "terminated", "truncated")
# Steps that are kept apart until they are stacked; apart they take much more memory.
_STACKED = 500


class RecordedEnv(EnvBase):
    """An environment that plays recorded rows, whatever the actions are.

    A step goes to the next row, and so does a soft reset: what an attempt led to stands before the first
    row of the next attempt. Without ``rows`` there are only specs, of an environment that isn't at hand;
    under :func:`make_trial_env` that is enough for policies and :func:`load_trials`.

    Args:
        observation_spec: without batch dimensions, like the other specs.
        action_spec: one, or a Composite of one under another key than ``"action"``.
        reward_spec: likewise; one float32 number by default.
        rows: ``[N]``, each an observation, the action taken there, and reward and ends (``done``,
            ``terminated``, ``truncated``) of the step that led there.
        first: ``[R]``, the row that each environment of the batch begins with.

    Example:
        >>> from torchrl_amago.envs import make_trial_env
        >>> env = RecordedEnv(Composite(observation=Unbounded((3,))), Categorical(4))
        >>> make_trial_env(env, episodes=2).observation_spec["prev_action"].shape
        torch.Size([4])
    """

    repeats_task = True

    def __init__(
        self,
        observation_spec: Composite,
        action_spec: TensorSpec,
        reward_spec: TensorSpec | None = None,
        *,
        rows: TensorDict | None = None,
        first: Tensor | None = None,
    ) -> None:
        super().__init__(batch_size=() if first is None else first.shape)
        flags = {key: Categorical(2, shape=(1,), dtype=torch.bool) for key in _FLAGS}
        specs = observation_spec, action_spec, reward_spec or Unbounded((1,)), Composite(flags)
        specs = [spec.expand((*self.batch_size, *spec.shape)) for spec in specs]
        self.observation_spec, self.action_spec, self.reward_spec, self.done_spec = specs
        self._rows, self._first, self._row = rows, first, first

    def act(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the recorded actions, as a policy does."""
        return tensordict.set(self.action_key, self._rows.get(self.action_key)[self._row])

    def _reset(
        self, tensordict: TensorDictBase | None = None, repeat_task: bool = False
    ) -> TensorDictBase:
        if self._rows is None:
            raise RuntimeError(
                "a RecordedEnv without rows can't be played, it has specs only. Pass rows= and first=."
            )
        mask = torch.ones_like(self._row, dtype=torch.bool)
        if tensordict is not None:
            mask = tensordict.get("_reset", mask).reshape(mask.shape)
        self._row = torch.where(mask, self._row + 1 if repeat_task else self._first, self._row)
        shown = self._shown().exclude(self.reward_key)
        return shown.update({key: torch.zeros_like(shown[key]) for key in _FLAGS})

    def _step(self, tensordict: TensorDictBase) -> TensorDictBase:
        self._row = self._row + 1
        return self._shown()

    def _shown(self) -> TensorDict:
        # Trials that are over go on with rows of others until the longest is over.
        self._row = self._row.clamp(max=len(self._rows) - 1)
        return self._rows[self._row].exclude(self.action_key)

    def _set_seed(self, seed: int | None) -> None:
        """Nothing is random."""


class RecordedTrial(NamedTuple):
    """A trial of L steps that a :class:`RecordedEnv` can play."""

    rows: TensorDict
    first: dict[NestedKey, Tensor]  # what the first step knows of what came before
    length: int


def join(rule: TrialTransform, parts: Sequence[CheckedTrajectory]) -> RecordedTrial:
    """Join attempts to a trial, or take one trajectory that is a trial or a piece of one."""
    if len(parts) > 1 and any(one.is_trial or one.is_fragment for one in parts):
        problem = "only whole attempts can be joined to a trial, got trials or fragments."
        raise TrajectoryError(f"{problem} Load them with episodes_per_trial=1.")
    rows, last = torch.cat([one.rows_S for one in parts]), parts[-1]
    length = len(rows) - len(parts)
    if last.is_trial:
        rows = _split(rows, last.held_S[rule.soft_reset_key].reshape(-1))
    before = last.held_S if last.is_fragment else {}
    played = int(rows["done"].sum() + before.get(rule.episode_idx_key, [0])[0])
    time = int(length + before.get(rule.trial_step_key, [0])[0])
    if played > (rule.episodes or played) or time > (rule.horizon or time):
        raise TrajectoryError(
            f"a trial must not be longer than the environment's ({rule.episodes} attempts, "
            f"{rule.horizon} steps), got {played} attempts of {time} steps. Cut them."
        )
    is_over = (played == rule.episodes and not last.is_cut) or time == rule.horizon
    by_attempt = rule.trial_end == "attempt" and bool(rows["terminated"][-1])
    if last.last_is_stand_in and not (is_over and (by_attempt or rule.trial_end == "terminated")):
        rows, length, is_over = rows[:-1], length - 1, False
    if not length:
        problem = (
            "what the last step led to must be known where a trial is truncated, got that step"
        )
        raise TrajectoryError(f"{problem} alone. Add next_observations, or leave it out.")
    if last.is_cut or not is_over:
        for key in _FLAGS:
            rows[key][-1] = False  # the attempt or the trial goes on: no other attempt is seen
    return RecordedTrial(rows, last.held_S if len(parts) == 1 else {}, length)


def _split(rows: TensorDict, soft_reset: Tensor) -> TensorDict:
    """Rows in which the first one of each later attempt comes twice: also for what led there."""
    begins = soft_reset[1:].nonzero().reshape(-1) + 1
    rows = rows[torch.cat([torch.arange(len(rows)), begins]).sort()[0]]
    first = begins + torch.arange(1, len(begins) + 1)
    for key in _FLAGS:
        rows[key][first - 1], rows[key][first] = key != "terminated", False
    return rows


def replay(checker: TrajectoryChecker, trials: Sequence[RecordedTrial]) -> TensorDict:
    """Play trials under the environment's transforms; gives their steps ``[N]``, side by side."""
    size_R = torch.tensor([len(trial.rows) for trial in trials])
    base = RecordedEnv(
        Composite({key: checker.specs[key] for key in checker.given}),
        Composite({checker.action_key: checker.action_spec}),
        Composite({checker.reward_key: checker.reward_spec}),
        rows=torch.cat([trial.rows for trial in trials]),
        first=size_R.cumsum(0) - size_R,
    )
    transforms = [one.clone() for one in checker.transforms]
    for one in transforms:
        if isinstance(one, TrialTransform):
            one.repeat, one.options = "env", None
    env = TransformedEnv(base, Compose(*transforms))
    step = env.reset()
    for r, trial in enumerate(trials):
        for key, x_S in trial.first.items():
            step[key][r] = x_S[0]
    length_R = torch.tensor([trial.length for trial in trials])
    shown = [*checker.given, *checker.written, *_FLAGS]  # the environment may hide some
    after = [("next", key) for key in (*shown, checker.reward_key)]
    pieces, piece = [], []
    for t in range(1, int(length_R.max()) + 1):
        piece.append(env.step(base.act(step)))
        step = env.step_mdp(piece[-1])
        if t % _STACKED == 0 or t == length_R.max():
            pieces.append(torch.stack(piece, 1).select(*shown, checker.action_key, *after))
            piece = []
    steps_RT = torch.cat(pieces, 1)
    last = torch.arange(len(trials)), length_R - 1
    # Where the data end before the trial is over, it is cut off.
    steps_RT["next", "truncated"][last] |= ~steps_RT["next", "done"][last]
    steps_RT["next", "done"][last] = True
    return steps_RT[torch.arange(steps_RT.shape[1]) < length_R.unsqueeze(-1)]
