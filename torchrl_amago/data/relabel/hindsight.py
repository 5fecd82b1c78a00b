"""Hindsight experience replay for single goals, a trial at a time.

The legend is that of :mod:`~torchrl_amago.data.relabel.goals`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from torchrl_amago import keys
from torchrl_amago._validation import check_choice, check_fractions
from torchrl_amago.data.relabel.base import uniform
from torchrl_amago.data.relabel.goals import GoalRelabel, is_empty_goal


class HindsightRelabel(GoalRelabel):
    """Hindsight experience replay (HER, `arXiv 1707.01495 <https://arxiv.org/abs/1707.01495>`_).

    A fraction of the trials gets a goal that was achieved in one of its own steps: one goal for the
    whole trial, as an agent with memory needs it. (HER draws anew for each transition.)

    Args:
        strategy: step whose achieved goal becomes the goal: ``"final"``, the last; ``"episode"``,
            any; ``"future"``, any that isn't before another drawn step, so that later ones are
            likelier. ValueError for others.
        fraction: fraction of the trials that get a new goal, in [0, 1]; 0.8 is HER's best, four new
            goals for an old one.
        goal_key: entry ``[*B, *goal]``.
        achieved_key: entry ``[*B, *goal]``, or ``[*B, N, *goal]`` for N achieved in each step.
        empty_goal: number that fills an empty place of those N; a trial for which an empty one is
            drawn keeps its goal. None if there are no empty places.
        options: other arguments of :class:`GoalRelabel`, with its errors.

    Example:
        >>> from tensordict import TensorDict
        >>> place = torch.tensor([[1.0], [2.0], [3.0]])
        >>> no, last = torch.zeros(3, 1, dtype=torch.bool), torch.tensor([[False], [False], [True]])
        >>> zero, goal = torch.zeros(3, 1), torch.full((3, 1), 9.0)
        >>> trial = TensorDict({
        ...     "desired_goal": goal, "prev_reward": zero, "time_idx": torch.arange(3).view(3, 1),
        ...     "collector": {"mask": torch.ones(3).bool()},
        ...     "next": {"desired_goal": goal, "achieved_goal": place, "reward": zero,
        ...              "prev_reward": zero, "done": last, "terminated": no,
        ...              "truncated": last}}, [3])
        >>> new = HindsightRelabel("final", fraction=1.0)(trial.unsqueeze(0))
        >>> new["desired_goal"].flatten().tolist(), new["next", "reward"].flatten().tolist()
        ([3.0, 3.0, 3.0], [0.0, 0.0, 1.0])
    """

    def __init__(
        self,
        strategy: Literal["future", "final", "episode"] = "future",
        *,
        fraction: float = 0.8,
        goal_key: NestedKey = "desired_goal",
        achieved_key: NestedKey = "achieved_goal",
        empty_goal: float | None = None,
        **options: Any,
    ) -> None:
        check_choice("strategy", strategy, ("future", "final", "episode"))
        check_fractions("It is the fraction of trials with new goals.", fraction=fraction)
        # The goal itself is always visible: only places of achieved goals are empty.
        super().__init__(goal_key=goal_key, achieved_key=achieved_key, **options)
        self.strategy, self.fraction, self.empty_achieved = strategy, fraction, empty_goal

    def new_goals(
        self, trials: TensorDictBase, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        goal_shape, mask_BT = trials.get(self.goal_key).shape[2:], trials.get(keys.MASK)
        achieved_BTN = self._achieved(trials, goal_shape)
        uniform_4B = uniform((4, len(mask_BT)), generator, mask_BT.device)
        length_B = mask_BT.sum(-1)
        if self.strategy == "final":
            step_B = length_B - 1
        else:
            first_B = torch.zeros_like(length_B)
            if self.strategy == "future":
                first_B = (uniform_4B[0] * length_B).long()
            step_B = first_B + (uniform_4B[1] * (length_B - first_B)).long()
        rows_B = torch.arange(len(mask_BT), device=mask_BT.device)
        achieved_BN = achieved_BTN[rows_B, step_B]
        is_goal_BN = ~is_empty_goal(achieved_BN, self.empty_achieved, 2)
        rank_B = (uniform_4B[2] * is_goal_BN.sum(-1)).long()
        place_B = (is_goal_BN.cumsum(-1) > rank_B.unsqueeze(-1)).int().argmax(-1)
        is_new_B = (uniform_4B[3] < self.fraction) & is_goal_BN.any(-1)
        return achieved_BN[rows_B, place_B], is_new_B
