"""Base of relabelling with goals: rewards of goals, and the ends that follow from rewards.

Legend: B trials, T steps, S steps and the one after (T + 1), K goals of a sequence, N goals
achieved in a step, R trials that change. Suffixes leave out a goal's own shape: ``goals_BK`` is
``[B, K, *goal]``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import reduce

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor

from torchrl_amago import keys
from torchrl_amago.data.relabel.base import Relabel

RewardFunction = Callable[[Tensor, Tensor], Tensor]


def exact_match(achieved: Tensor, goal: Tensor) -> Tensor:
    """Compare goals ``[B, T, K, *goal]`` with the N achieved in a step, ``[B, T, K, N, *goal]``.

    The result, bool ``[B, T, K]``, is True where the goal equals one of them in all numbers.

    Example:
        >>> achieved = torch.tensor([[1, 2], [3, 4]]).view(1, 1, 1, 2, 2)
        >>> exact_match(achieved, torch.tensor([3, 4]).view(1, 1, 1, 2)).item()
        True
    """
    return _all_of_goal(achieved == goal.unsqueeze(3), 4).any(-1)


def is_empty_goal(goals: Tensor, empty_goal: float | None, batch_dims: int) -> Tensor:
    """Mark empty goals, bool; a goal spans all dimensions after the first ``batch_dims``."""
    if empty_goal is None:
        return torch.zeros(goals.shape[:batch_dims], dtype=torch.bool, device=goals.device)
    return _all_of_goal(goals == empty_goal, batch_dims)


def _all_of_goal(flags: Tensor, batch_dims: int) -> Tensor:
    # One number after the other: a reduction over so few takes several times as long.
    numbers = flags.reshape(*flags.shape[:batch_dims], -1).unbind(-1)
    return reduce(torch.logical_and, numbers)


def take_rows(x_BN: Tensor, index_BK: Tensor) -> Tensor:
    """Return the entries of each row at these places."""
    return x_BN[torch.arange(len(x_BN), device=x_BN.device).unsqueeze(-1), index_BK]


class GoalRelabel(Relabel):
    """Base of relabellers that replace goals, and with them rewards and ends.

    A subclass implements :meth:`new_goals`. ``generator``: see :class:`Relabel`.

    Args:
        goal_key: entry with the goals.
        achieved_key: entry with the achieved goals; a step's reward is for the one in ``next``.
        empty_goal: number in place of goals that are met; None if goals stay visible.
        reward_fn: ``(achieved [B, T, 1, N, *goal], goal [B, 1, K, *goal]) -> [B, T, K]``, the
            environment's reward, or 1 where the goal is met and 0 elsewhere.
        success_threshold: a goal is met by a reward larger than this.
        ends_trial: end the trial, ``terminated``, where the goal, or the last one, is met.
        reward_key: reward in ``next``; ``prev_reward_key`` is the same at the step after.
        check: compare trials replayed with their own goals to the stored ones, for the first batch
            and the first in which a goal is met.

    Raises:
        ValueError: when called, if shapes don't fit, or the check fails.
    """

    #: True for goals to be met in order, each rewarded once; False for a single goal.
    is_sequence = False

    def __init__(
        self,
        *,
        goal_key: NestedKey,
        achieved_key: NestedKey,
        empty_goal: float | None = None,
        reward_fn: RewardFunction = exact_match,
        success_threshold: float = 0.0,
        ends_trial: bool = True,
        reward_key: NestedKey = "reward",
        prev_reward_key: NestedKey = keys.PREV_REWARD,
        check: bool = True,
        generator: torch.Generator | None = None,
    ) -> None:
        goals, before = [goal_key, _of_next(goal_key)], [prev_reward_key, _of_next(prev_reward_key)]
        values = [*goals, _of_next(reward_key), *before]
        done = [_of_next(name) for name in ("done", "terminated", "truncated")]
        replaced, achieved_key = [*values, *done], _of_next(achieved_key)
        super().__init__([*replaced, achieved_key], [*replaced, keys.MASK], generator=generator)
        self.goal_key, self.achieved_key = goal_key, achieved_key
        self.reward_key, self.prev_reward_key = _of_next(reward_key), prev_reward_key
        self._value_keys, self._done_keys = values, done
        self.empty_goal, self.reward_fn = empty_goal, reward_fn
        self.success_threshold, self.ends_trial = success_threshold, ends_trial
        self._to_check, self._is_first = check, True

    @abstractmethod
    def new_goals(
        self, trials: TensorDictBase, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Draw goals for each trial; return also bool ``[B]``, True for trials that get them."""

    def relabel(self, trials: TensorDictBase, generator: torch.Generator | None) -> TensorDictBase:
        if self._to_check:
            has_met = bool(self._meets_goal(trials).any())
            # Trials that meet no goal pass with any reward_fn.
            if has_met or self._is_first:
                self._check_replay(trials)
            self._to_check, self._is_first = not has_met, False
        return self.with_goals(trials, *self.new_goals(trials, generator))

    def with_goals(
        self, trials: TensorDictBase, goals: Tensor, is_new_B: Tensor | None = None
    ) -> TensorDictBase:
        """Replay trials as if these had been their goals: all of them, or those of ``is_new_B``."""
        mask_BT = trials.get(keys.MASK)
        rows_R = (torch.ones_like(mask_BT[:, 0]) if is_new_B is None else is_new_B).nonzero()[:, 0]
        out = TensorDict({}, trials.batch_size)
        if not len(rows_R):
            return out.set(keys.MASK, mask_BT)
        goals_RS, reward_RT1, end_R = self._replay(trials, rows_R, self._as_sequence(goals[rows_R]))
        # The first one belongs to the step before these, which stays as it was.
        first = trials.get(self.prev_reward_key)[rows_R, :1]
        previous_RT1 = torch.cat([first, reward_RT1[:, :-1]], 1)
        values = goals_RS[:, :-1], goals_RS[:, 1:], reward_RT1, previous_RT1, reward_RT1
        for key, value in zip(self._value_keys, values, strict=True):
            stored = trials.get(key)
            value = value.to(stored.dtype).view(-1, *stored.shape[1:])
            out.set(key, stored.index_copy(0, rows_R, value))
        num_steps = mask_BT.shape[1]
        is_ended_R = end_R < num_steps
        ended = rows_R[is_ended_R], end_R[is_ended_R]
        cut = self._ended_by_goal(trials, rows_R[~is_ended_R])
        done, terminated, truncated = map(trials.get, self._done_keys)
        yes = torch.ones((), dtype=done.dtype, device=done.device)
        out.set(self._done_keys[0], done.index_put(ended, yes))
        out.set(self._done_keys[1], terminated.index_put(ended, yes).index_put(cut, ~yes))
        out.set(self._done_keys[2], truncated.index_put(ended, ~yes).index_put(cut, yes))
        end_B = end_R.new_full((len(mask_BT),), num_steps).index_copy(0, rows_R, end_R)
        step_T = torch.arange(num_steps, device=mask_BT.device)
        return out.set(keys.MASK, mask_BT & (step_T <= end_B.unsqueeze(-1)))

    def _replay(
        self, trials: TensorDictBase, rows_R: Tensor, goals_RK: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return goals ``[R, S, K]``, rewards ``[R, T, 1]`` and trials' last steps, T for none."""
        # Steps next to each other in memory, where operations on them are much faster.
        achieved_RTN = self._achieved(trials, goals_RK.shape[2:])[rows_R]
        achieved_RTN = achieved_RTN.movedim(1, -1).contiguous().movedim(-1, 1)
        reward_RTK = self._rewards(achieved_RTN, goals_RK)
        mask_RT1 = trials.get(keys.MASK)[rows_R].unsqueeze(-1)
        hits_RTK = (reward_RTK > self.success_threshold) & mask_RT1
        met_RK = meeting_steps(hits_RTK, is_empty_goal(goals_RK, self.empty_goal, 2))
        num_steps, num_goals = hits_RTK.shape[1:]
        end_R = met_RK[:, -1] if self.ends_trial else torch.full_like(met_RK[:, -1], num_steps)
        goals_RS = goals_RK.unsqueeze(1).expand(-1, num_steps + 1, *goals_RK.shape[1:])
        if not self.is_sequence:
            return goals_RS, reward_RTK, end_R
        num_met_RS = met_RK.new_zeros(len(met_RK), num_steps + 2)
        num_met_RS.scatter_add_(1, met_RK + 1, torch.ones_like(met_RK))
        num_met_RS = num_met_RS[:, :-1].cumsum(1)
        if self.empty_goal is not None:
            # One view for each number of goals met, with those empty; steps look theirs up.
            order_K = torch.arange(num_goals + 1, device=goals_RK.device)
            is_met = order_K[:-1] < order_K.unsqueeze(-1)
            is_met = is_met.view(*is_met.shape, *(1,) * (goals_RK.ndim - 2))
            views_R = goals_RK.unsqueeze(1).masked_fill(is_met, self.empty_goal)
            goals_RS = take_rows(views_R, num_met_RS)
        # The next goal comes after those met; once all are met, there is no reward.
        turn_RT1 = num_met_RS[:, :-1].unsqueeze(-1)
        reward_RT1 = reward_RTK.gather(-1, turn_RT1.clamp(max=num_goals - 1))
        reward_RT1 = reward_RT1.masked_fill(turn_RT1 == num_goals, 0)
        return goals_RS, reward_RT1, end_R.masked_fill(end_R < 0, num_steps)

    def _as_sequence(self, goals_B: Tensor) -> Tensor:
        return goals_B if self.is_sequence else goals_B.unsqueeze(1)

    def _meets_goal(self, trials: TensorDictBase) -> Tensor:
        """Find the steps that met a goal, bool ``[B, T]``."""
        reward_BT = trials.get(self.reward_key).squeeze(-1)
        return (reward_BT > self.success_threshold) & trials.get(keys.MASK)

    def _achieved(self, trials: TensorDictBase, goal_shape: torch.Size) -> Tensor:
        """Return achieved goals ``[B, T, N, *goal]``; N may be left out for one."""
        achieved = trials.get(self.achieved_key)
        achieved_BTN = achieved.unsqueeze(2) if achieved.shape[2:] == goal_shape else achieved
        if achieved_BTN.shape[3:] != goal_shape or achieved_BTN.ndim != len(goal_shape) + 3:
            raise ValueError(
                f"achieved goals, {self.achieved_key!r}, must have the shape {list(goal_shape)} of "
                f"a goal in {self.goal_key!r}, or one more dimension before it, got "
                f"{list(achieved.shape[2:])} in each step. Name the entries in the constructor."
            )
        return achieved_BTN

    def _rewards(self, achieved_BTN: Tensor, goals_BK: Tensor) -> Tensor:
        """Compute each step's reward for each goal, ``[B, T, K]``."""
        reward_BTK = self.reward_fn(achieved_BTN.unsqueeze(2), goals_BK.unsqueeze(1))
        expected = (*achieved_BTN.shape[:2], goals_BK.shape[1])
        if reward_BTK.shape != expected:
            raise ValueError(
                f"reward_fn must return a reward for each trial, step and goal, {expected}, got "
                f"{tuple(reward_BTK.shape)}. Reduce over N and over the goal's dimensions."
            )
        return reward_BTK

    def _ended_by_goal(self, trials: TensorDictBase, rows_R: Tensor) -> tuple[Tensor, Tensor]:
        """Find the trials that their own goal ended, and its step, to be truncated instead."""
        if not len(rows_R) or not self.ends_trial:
            return rows_R[:0], rows_R[:0]
        step_R = trials.get(keys.MASK)[rows_R].sum(-1) - 1
        terminated_R = trials.get(self._done_keys[1])[rows_R, step_R].squeeze(-1)
        goals_RK = self._as_sequence(trials.get(self.goal_key)[rows_R, 0])
        num_goals_R = (~is_empty_goal(goals_RK, self.empty_goal, 2)).sum(-1)
        # A time limit may terminate a trial in the step that meets one of several goals.
        is_met_R = self._meets_goal(trials)[rows_R].sum(-1) >= num_goals_R
        is_ended_R = terminated_R & is_met_R
        return rows_R[is_ended_R], step_R[is_ended_R]

    def _check_replay(self, trials: TensorDictBase) -> None:
        mask_BT, changed = trials.get(keys.MASK), []
        again = self.with_goals(trials, trials.get(self.goal_key)[:, 0])
        for key in (*self._value_keys, *self._done_keys):
            new, old = (one.get(key)[mask_BT].double() for one in (again, trials))
            changed += [] if torch.allclose(new, old, atol=1e-5) else [key]
        if not torch.equal(again.get(keys.MASK), mask_BT):
            changed.append(keys.MASK)
        if changed:
            raise ValueError(
                f"{type(self).__name__} must reproduce the stored trials when it replays them with "
                f"their own goals, and {changed} differ. Use the environment's reward as "
                "reward_fn, with fitting success_threshold and ends_trial; a trial must be a "
                "single episode that ends `terminated` when it meets its goal, as with "
                "make_trial_env(trial_end='terminated' or 'episode'). check=False skips this check."
            )


def meeting_steps(hits_BTK: Tensor, is_empty_BK: Tensor) -> Tensor:
    """Find the steps that meet goals ``[B, K]``: each is the first hit after the goal before it.

    T stands for none. An empty goal is met with the one before it, at -1 if there is none.
    """
    num_steps = hits_BTK.shape[1]
    step_T = torch.arange(num_steps, device=hits_BTK.device)
    met_B = torch.full_like(is_empty_BK[:, 0], -1, dtype=torch.int64)
    met_BK = []
    for hits_BT, is_empty_B in zip(hits_BTK.unbind(-1), is_empty_BK.unbind(-1), strict=True):
        is_first_BT = hits_BT & (step_T > met_B.unsqueeze(-1))
        first_B = torch.where(is_first_BT, step_T, num_steps).amin(-1)
        met_B = torch.where(is_empty_B, met_B, first_B)
        met_BK.append(met_B)
    return torch.stack(met_BK, -1)


def _of_next(key: NestedKey) -> NestedKey:
    return unravel_key(("next", key))
