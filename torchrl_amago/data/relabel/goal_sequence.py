"""Hindsight for instructions: sequences of goals, some of them replaced by achieved ones.

The legend is that of :mod:`~torchrl_amago.data.relabel.goals`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from torch import Tensor

from torchrl_amago import keys
from torchrl_amago._validation import check_choice
from torchrl_amago.data.relabel.base import uniform
from torchrl_amago.data.relabel.goals import GoalRelabel, is_empty_goal, take_rows


class GoalSequenceRelabel(GoalRelabel):
    """AMAGO's relabelling of instructions (arXiv 2310.09971, Appendix B, Algorithm 1).

    A trial is a single episode with k goals, to be met in order, at most one in each step; n were
    met. Of the others, h are replaced by goals that were achieved at other steps, drawn uniformly
    without replacement. These and the n met are put in the order of time, before the last k - n - h
    of the goals that weren't met. Then the trial is replayed: a step is rewarded for the next goal
    in the order, and the trial ends with its last goal. Each step shows all k goals, with
    ``empty_goal`` in place of those met so far; a trial that begins with empty goals has fewer.

    Args:
        strategy: number of goals replaced: ``"some"``, h uniform in 0 ... k - n, for trials of all
            returns; ``"all"``, h = k - n, for trials that all succeed; ``"none"``.
        empty_goal: number in place of goals that are met, and in empty places of ``achieved``; None
            if goals stay visible.
        goal_key: entry ``[*B, k, *goal]``.
        achieved_key: entry ``[*B, N, *goal]``, up to N achieved goals in each step.
        options: other arguments of :class:`GoalRelabel`, with its errors.

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

    is_sequence = True

    def __init__(
        self,
        strategy: Literal["some", "all", "none"] = "some",
        *,
        empty_goal: float | None = -1.0,
        goal_key: NestedKey = "goals",
        achieved_key: NestedKey = "achieved",
        **options: Any,
    ) -> None:
        check_choice("strategy", strategy, ("some", "all", "none"))
        options |= {"goal_key": goal_key, "achieved_key": achieved_key, "empty_goal": empty_goal}
        super().__init__(**options)
        self.strategy = strategy
        if strategy == "none":
            self.in_keys = self.out_keys = []

    def relabel(self, trials: TensorDictBase, generator: torch.Generator | None) -> TensorDictBase:
        if self.strategy == "none":
            return TensorDict({}, trials.batch_size)
        return super().relabel(trials, generator)

    def new_goals(
        self, trials: TensorDictBase, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        goals_BK, mask_BT = trials.get(self.goal_key)[:, 0], trials.get(keys.MASK)
        is_goal_BK = ~is_empty_goal(goals_BK, self.empty_goal, 2)
        rank_BK = is_goal_BK.cumsum(-1) - 1  # position among the goals that are not empty
        meets_BT, num_steps = self._meets_goal(trials), mask_BT.shape[1]
        num_met_BT = meets_BT.cumsum(1)
        num_met_B = num_met_BT[:, -1]
        # A goal is met after the steps by which no more goals are met than come before it.
        met_BK = torch.searchsorted(num_met_BT, rank_BK, right=True)
        met_BK = met_BK.masked_fill(~is_goal_BK, num_steps)
        num_new_B = (is_goal_BK.sum(-1) - num_met_B).clamp(min=0)
        if self.strategy == "some":
            fraction_B = uniform(num_new_B.shape, generator, mask_BT.device)
            num_new_B = (fraction_B * (num_new_B + 1)).long()
        achieved_BTN, is_free_BT = self._achieved(trials, goals_BK.shape[2:]), mask_BT & ~meets_BT
        step_BK, new_BK = self._alternatives(achieved_BTN, is_free_BT, num_new_B, generator)
        in_time_BK = torch.cat([met_BK, step_BK], 1).argsort(1).gather(1, rank_BK.clamp(min=0))
        sequence_BK = take_rows(torch.cat([goals_BK, new_BK], 1), in_time_BK)
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
        # The best of a step's scores stands for the step: one goal of each, all equally likely.
        score_BT, place_BT = score_BTN.masked_fill(~is_free_BTN, -1.0).max(-1)
        num_drawn = min(int(num_new_B.max()), num_steps)
        score_BK, step_BK = score_BT.topk(num_drawn, -1)
        place_BK = step_BK * achieved_BTN.shape[2] + place_BT.gather(1, step_BK)
        new_BK = take_rows(achieved_BTN.flatten(1, 2), place_BK)
        order_K = torch.arange(num_drawn, device=step_BK.device)
        is_left_out_BK = (order_K >= num_new_B.unsqueeze(-1)) | (score_BK < 0)
        return step_BK.masked_fill(is_left_out_BK, num_steps), new_BK
