"""Hindsight for instructions: sequences of goals, some of them replaced by achieved ones.

The legend is that of :mod:`~torchrl_amago.data.relabel.goals`.
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from torchrl_amago import keys
from torchrl_amago._validation import check_choice
from torchrl_amago.data.relabel.base import uniform
from torchrl_amago.data.relabel.goals import GoalRelabel, is_empty_goal, time_innermost

Strategy = Literal["some", "all", "none"]


class GoalSequenceRelabel(GoalRelabel):
    """AMAGO's relabelling of instructions (arXiv 2310.09971, Appendix B, Algorithm 1).

    A trial is a single episode with k goals, to be met in order, at most one in each step; n were
    met. Of the others, h are replaced by goals that were achieved at other steps, drawn uniformly
    without replacement. These and the n met are put in the order of time, before the last k - n - h
    of the goals that weren't met. Then the trial is replayed: a step is rewarded for the next goal
    in the order, and the trial ends with its last goal.

    Each step shows goals as :class:`~torchrl_amago.envs.tasks.maze_runner.task.MazeRunner` does:
    all k, with ``empty_goal`` in place of those met so far. A trial that begins with empty goals
    has fewer.

    Args:
        strategy: number of goals replaced: ``"some"``, h uniform in 0 ... k - n, for trials of all
            returns; ``"all"``, h = k - n, for trials that all succeed; ``"none"``.
        empty_goal: number in place of goals that are met, and in empty places of ``achieved``; None
            if goals stay visible.
        goal_key: entry ``[*B, k, *goal]``.
        achieved_key: entry ``[*B, N, *goal]``, up to N achieved goals in each step.
        options: further arguments of :class:`GoalRelabel`.

    Raises:
        ValueError: for an unknown strategy; when called, if goals can't hold ``empty_goal``, shapes
            differ, or replaying a batch doesn't give what was stored.

    Example:
        >>> from torchrl_amago.envs import make_trial_env
        >>> from torchrl_amago.envs.tasks import MazeRunner
        >>> maze = MazeRunner(7, num_goals=9, max_episode_steps=30, batch_size=[8], seed=0)
        >>> trials = make_trial_env(maze, episodes=1).rollout(30)
        >>> trials["collector", "mask"] = torch.ones(trials.shape, dtype=torch.bool)
        >>> relabel = GoalSequenceRelabel("all", generator=torch.Generator().manual_seed(0))
        >>> new = relabel(trials)
        >>> new["next", "reward"].sum(1).flatten().tolist() == [9.0] * 8
        True
    """

    def __init__(
        self,
        strategy: Strategy = "some",
        *,
        empty_goal: float | None = -1.0,
        goal_key: NestedKey = "goals",
        achieved_key: NestedKey = "achieved",
        **options: Any,
    ) -> None:
        check_choice("strategy", strategy, get_args(Strategy))
        super().__init__(goal_key=goal_key, achieved_key=achieved_key, **options)
        self.strategy, self.empty_goal = strategy, empty_goal
        if strategy == "none":
            self.in_keys = self.out_keys = []

    def relabel(self, trials: TensorDictBase, generator: torch.Generator | None) -> TensorDictBase:
        if self.strategy == "none":
            return TensorDict({}, trials.batch_size)
        empty, dtype = self.empty_goal, trials.get(self.goal_key).dtype
        if empty is not None and torch.tensor(empty).to(dtype) != empty:
            raise ValueError(
                f"empty_goal must be a number that goals can hold, got {empty} for {dtype}. Choose "
                "another one, or None if goals stay visible."
            )
        return super().relabel(trials, generator)

    def new_goals(
        self, trials: TensorDictBase, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        goals_BK, mask_BT = self._own_goals(trials), trials.get(keys.MASK)
        is_goal_BK = ~is_empty_goal(goals_BK, self.empty_goal, 2)
        # Position among the goals that are not empty.
        rank_BK = is_goal_BK.cumsum(-1) - 1
        meets_BT = (trials.get(self.reward_key).squeeze(-1) > self.success_threshold) & mask_BT
        num_met_BT = meets_BT.cumsum(1)
        num_met_B = num_met_BT[:, -1]
        # A goal is met after the steps by which no more goals are met than come before it.
        met_BK = torch.searchsorted(num_met_BT, rank_BK, right=True)
        num_new_B = (is_goal_BK.sum(-1) - num_met_B).clamp(min=0)
        if self.strategy == "some":
            fraction_B = uniform(num_new_B.shape, generator, mask_BT.device)
            num_new_B = (fraction_B * (num_new_B + 1)).long()
        achieved_BTN = self._achieved(trials, goals_BK.shape[2:])
        step_BK, new_BK = self._alternatives(
            achieved_BTN, mask_BT & ~meets_BT, num_new_B, generator
        )
        num_steps = mask_BT.shape[1]
        met_BK = met_BK.masked_fill(~is_goal_BK, num_steps)
        sequence_BK = _in_order([met_BK, step_BK], [goals_BK, new_BK], rank_BK.clamp(min=0))
        num_found_B = (step_BK < num_steps).sum(-1)
        is_taken_BK = is_goal_BK & (rank_BK < (num_met_B + num_found_B).unsqueeze(-1))
        is_taken_BK = is_taken_BK.view(*is_taken_BK.shape, *(1,) * (goals_BK.ndim - 2))
        return torch.where(is_taken_BK, sequence_BK, goals_BK), num_found_B > 0

    def _alternatives(
        self,
        achieved_BTN: Tensor,
        is_free_BT: Tensor,
        num_new_B: Tensor,
        generator: torch.Generator | None,
    ) -> tuple[Tensor, Tensor]:
        """Draw goals achieved at free steps; return also their steps ``[B, K]``, T for none."""
        num_steps = is_free_BT.shape[1]
        is_free_BTN = is_free_BT.unsqueeze(-1) & ~is_empty_goal(achieved_BTN, self.empty_goal, 3)
        score_BTN = uniform(achieved_BTN.shape[:3], generator, is_free_BT.device)
        # The best of a step's scores stands for the step: one goal of each, all goals alike.
        score_BT, place_BT = score_BTN.masked_fill(~is_free_BTN, -1.0).max(-1)
        num_drawn = min(int(num_new_B.max()), num_steps)
        score_BK, step_BK = score_BT.topk(num_drawn, -1)
        rows_B1 = torch.arange(len(step_BK), device=step_BK.device).unsqueeze(-1)
        new_BK = achieved_BTN[rows_B1, step_BK, place_BT.gather(1, step_BK)]
        order_K = torch.arange(num_drawn, device=step_BK.device)
        is_left_out_BK = (order_K >= num_new_B.unsqueeze(-1)) | (score_BK < 0)
        return step_BK.masked_fill(is_left_out_BK, num_steps), new_BK

    def _replay(self, trials: TensorDictBase, rows_R: Tensor, goals_RK: Tensor) -> TensorDictBase:
        mask_RT = trials.get(keys.MASK)[rows_R]
        achieved_RTN = self._achieved(trials, goals_RK.shape[2:])[rows_R]
        reward_RTK = self._rewards(time_innermost(achieved_RTN), goals_RK)
        hits_RTK = (reward_RTK > self.success_threshold) & mask_RT.unsqueeze(-1)
        met_RK = meeting_steps(hits_RTK, is_empty_goal(goals_RK, self.empty_goal, 2))
        num_steps, num_goals = hits_RTK.shape[1:]
        num_met_RS = _num_met_before(met_RK, num_steps + 1)
        # The next goal comes after those met; once all are met, there is no reward.
        turn_RT1 = num_met_RS[:, :-1].unsqueeze(-1)
        reward_RT1 = reward_RTK.gather(-1, turn_RT1.clamp(max=num_goals - 1))
        reward_RT1 = reward_RT1.masked_fill(turn_RT1 == num_goals, 0)
        end_R = met_RK[:, -1]
        if not self.ends_trial:
            end_R = torch.full_like(end_R, num_steps)
        end_R = end_R.masked_fill(end_R < 0, num_steps)
        return self._replace(trials, rows_R, self._shown(goals_RK, num_met_RS), reward_RT1, end_R)

    def _shown(self, goals_RK: Tensor, num_met_RS: Tensor) -> Tensor:
        """Return the goals at each step, ``[R, S, K]``: those met before are empty."""
        num_goals = goals_RK.shape[1]
        # One view for each number of goals met; steps look theirs up.
        views = goals_RK.unsqueeze(1).expand(-1, num_goals + 1, *goals_RK.shape[1:])
        if self.empty_goal is not None:
            order_K = torch.arange(num_goals, device=views.device)
            is_met = order_K < torch.arange(num_goals + 1, device=views.device).unsqueeze(-1)
            is_met = is_met.view(*is_met.shape, *(1,) * (goals_RK.ndim - 2))
            views = views.masked_fill(is_met, self.empty_goal)
        first_R1 = (num_goals + 1) * torch.arange(len(goals_RK), device=views.device).unsqueeze(-1)
        shown = views.flatten(0, 1).index_select(0, (first_R1 + num_met_RS).flatten())
        return shown.unflatten(0, num_met_RS.shape)

    def _num_goals(self, goals_RK: Tensor) -> Tensor:
        return (~is_empty_goal(goals_RK, self.empty_goal, 2)).sum(-1)


def meeting_steps(hits_BTK: Tensor, is_empty_BK: Tensor) -> Tensor:
    """Find the steps that meet a sequence's goals: each the first hit after the goal before it.

    Args:
        hits_BTK: bool, True where step t meets goal k if it is that goal's turn.
        is_empty_BK: bool, True for empty goals.

    Returns:
        int64 ``[B, K]``, ascending; T where a goal isn't met. An empty goal is met with the one
        before it, at -1 if there is none.

    Example:
        >>> hits = torch.tensor([[[0, 1], [1, 1], [0, 0], [1, 1]]]).bool()
        >>> meeting_steps(hits, torch.tensor([[False, False]]))
        tensor([[1, 3]])
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


def _num_met_before(met_RK: Tensor, num_steps: int) -> Tensor:
    """Count the goals met before each step, int64 ``[R, S]``."""
    count = torch.zeros(len(met_RK), num_steps + 1, dtype=torch.int64, device=met_RK.device)
    count.scatter_add_(1, met_RK + 1, torch.ones_like(met_RK))
    return count[:, :-1].cumsum(1)


def _in_order(when: list[Tensor], goals: list[Tensor], rank_BK: Tensor) -> Tensor:
    """Sort goals by time and take those of these ranks."""
    order = torch.cat(when, 1).argsort(1)
    rows_B1 = torch.arange(len(order), device=order.device).unsqueeze(-1)
    return torch.cat(goals, 1)[rows_B1, order.gather(1, rank_BK)]
