"""Recorded trajectories played back under an environment's own transforms.

A step that an agent trains on holds more than data do: the previous action and reward, the time in the
trial, its episode. The transforms that write this in the real environment write it here as well.

Legend: R rows that are played side by side, L steps of a trial, T steps of the longest row.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor
from torchrl.data import Categorical, Composite, TensorSpec, Unbounded
from torchrl.envs import Compose, EnvBase, TransformedEnv

from torchrl_amago.envs.transforms import TrialTransform
from torchrl_amago.offline.trajectory import (
    CheckedTrajectory,
    TrajectoryChecker,
    TrajectoryError,
)

_FLAGS = ("done", "terminated", "truncated")
# Rows played side by side: a step of many costs little more than a step of one.
ROWS_AT_ONCE = 256
# Shorter pieces of a trial aren't worth their bookkeeping.
_SHORTEST_PIECE = 100
# Steps that are kept apart until they are stacked; apart they take much more memory.
_STACKED = 500


class RecordedEnv(EnvBase):
    """An environment that plays recorded rows, whatever the actions are.

    A step goes to the next row, and so does a soft reset: what an episode led to stands before the first
    row of the next episode. Without ``rows`` there are only specs, of an environment that isn't at hand;
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
            raise RuntimeError("a RecordedEnv without rows has specs only. Pass rows= and first=.")
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
        # Rows that are over go on with those of others until the longest is over.
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
    """Join episodes to a trial, or take one trajectory that is a trial or a piece of one."""
    if len(parts) > 1 and any(one.is_trial or one.is_fragment for one in parts):
        problem = "only whole episodes can be joined to a trial, got trials or fragments"
        raise TrajectoryError(f"{problem}. Load them with episodes_per_trial=1.")
    rows, last = torch.cat([one.rows_S for one in parts]), parts[-1]
    length = len(rows) - len(parts)
    if last.is_trial:
        rows = _split(rows, last.held_S[rule.soft_reset_key].reshape(-1))
    before = last.held_S if last.is_fragment else {}
    played = int(rows["done"].sum() + before.get(rule.episode_idx_key, [0])[0])
    time = int(length + before.get(rule.time_idx_key, [0])[0])
    if played > (rule.episodes or played) or time > (rule.horizon or time):
        most = f"({rule.episodes} episodes, {rule.horizon} steps)"
        got = f"got {played} episodes of {time} steps. Cut them."
        raise TrajectoryError(f"a trial must not be longer than the environment's {most}, {got}")
    is_over = (played == rule.episodes and not last.is_cut) or time == rule.horizon
    by_episode = rule.trial_end == "episode" and bool(rows["terminated"][-1])
    if last.last_is_stand_in and not (is_over and (by_episode or rule.trial_end == "terminated")):
        rows, length, is_over = rows[:-1], length - 1, False
    if not length:
        rule = "what the last step led to must be known where a trial is truncated"
        raise TrajectoryError(
            f"{rule}, got that step alone. Add next_observations, or leave it out."
        )
    if last.is_cut or not is_over:
        for key in _FLAGS:
            rows[key][-1] = False  # the episode or the trial goes on: no other episode is seen
    return RecordedTrial(rows, last.held_S if len(parts) == 1 else {}, length)


def _split(rows: TensorDict, soft_reset: Tensor) -> TensorDict:
    """Rows in which the first one of each later episode comes twice: also for what led there."""
    begins = soft_reset[1:].nonzero().reshape(-1) + 1
    rows = rows[torch.cat([torch.arange(len(rows)), begins]).sort()[0]]
    first = begins + torch.arange(1, len(begins) + 1)
    for key in _FLAGS:
        rows[key][first - 1], rows[key][first] = key != "terminated", False
    return rows


def replay(checker: TrajectoryChecker, trials: Sequence[RecordedTrial]) -> TensorDict:
    """Play trials under the environment's transforms; gives their steps ``[N]``, side by side.

    A long trial of a single episode is played in several pieces at once.
    """
    piece = max(_SHORTEST_PIECE, -(-sum(one.length for one in trials) // ROWS_AT_ONCE))
    size = [one.length if one.rows["done"][:-1].any() else piece for one in trials]
    first = torch.tensor([0, *(len(one.rows) for one in trials)]).cumsum(0)
    # Of each row the trial, and the step of the trial that it begins with.
    starts = [(k, t) for k, one in enumerate(trials) for t in range(0, one.length, size[k])]
    trial_R, start_R = torch.tensor(starts).unbind(1)
    length_R = torch.tensor([min(size[k], trials[k].length - t) for k, t in starts])
    rows = torch.cat([one.rows for one in trials])
    transforms = [one.clone() for one in checker.transforms]
    for one in transforms:
        if isinstance(one, TrialTransform):
            one.repeat, one.options = "env", None
    base = RecordedEnv(*checker.recorded_specs, rows=rows, first=first[trial_R] + start_R)
    env = TransformedEnv(base, Compose(*transforms))
    step = env.reset()
    for r, (k, t) in enumerate(starts):
        _seed(checker, step, r, trials[k], t)
    shown = [*checker.given, *checker.written, *_FLAGS]  # the environment may hide some
    after = [("next", key) for key in (*shown, checker.reward_key)]
    stacked, steps = [], []
    for t in range(1, int(length_R.max()) + 1):
        steps.append(env.step(base.act(step)))
        step = env.step_mdp(steps[-1])
        if t % _STACKED == 0 or t == length_R.max():
            stacked.append(torch.stack(steps, 1).select(*shown, checker.action_key, *after))
            steps = []
    steps_RT = torch.cat(stacked, 1)
    end = torch.arange(len(starts)), length_R - 1
    later = start_R.nonzero().squeeze(-1)
    for key in shown:  # where a piece begins, all is as the one before left it
        steps_RT[key][later, 0] = steps_RT["next", key][end][later - 1]
    # Where the data end before the trial is over, it is cut off.
    last = tuple(x[start_R.roll(-1) == 0] for x in end)
    steps_RT["next", "truncated"][last] |= ~steps_RT["next", "done"][last]
    steps_RT["next", "done"][last] = True
    return steps_RT[torch.arange(steps_RT.shape[1]) < length_R.unsqueeze(-1)]


def _seed(
    checker: TrajectoryChecker, step: TensorDict, r: int, trial: RecordedTrial, begin: int
) -> None:
    """Write what came before a row into its first step: all that transforms read there."""
    for key, x_S in trial.first.items():
        step[key][r] = x_S[0]
    if not begin:
        return
    rule, total_key = checker.rule, checker.rule.episode_return_key
    for key in {checker.previous.time_idx_key, rule.time_idx_key} & {*checker.written}:
        step[key][r] += begin
    if total_key in checker.written:
        before = step[total_key][r] * ~step[rule.soft_reset_key][r]
        rewards = trial.rows[checker.reward_key][1 : begin + 1, 0].float()
        # Summed up as the transform does: one after the other, in float32.
        step[total_key][r] = torch.cat([before, rewards]).numpy().cumsum()[-1].item()
        step[rule.soft_reset_key][r] = False
