"""What relabelling with goals has in common: the reward of a goal, and what follows from rewards.

Legend: B trials, T steps, S steps and the one after (T + 1), K goals of a sequence, N goals achieved
in a step. A goal has any shape, which is left out of the suffixes: ``goals_BK`` is ``[B, K, *goal]``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, unravel_key
from torch import Tensor

from torchrl_amago import keys
from torchrl_amago.data.relabel.base import Relabel

RewardFunction = Callable[[Tensor, Tensor], Tensor]


def exact_match(achieved: Tensor, goal: Tensor) -> Tensor:
    """Whether one of the goals achieved in a step is this one, number by number.

    Args:
        achieved: ``[B, T, K, N, *goal]``, N goals achieved in each step.
        goal: ``[B, T, K, *goal]``.

    Returns:
        bool ``[B, T, K]``.

    Example:
        >>> achieved = torch.tensor([[1, 2], [3, 4]]).view(1, 1, 1, 2, 2)
        >>> exact_match(achieved, torch.tensor([3, 4]).view(1, 1, 1, 2)).item()
        True
    """
    # Time goes last: long rows of numbers are compared several times faster than goals of few numbers.
    achieved, goal = achieved.movedim(1, -1), goal.movedim(1, -1)
    is_equal = achieved == goal.unsqueeze(2)
    is_equal = is_equal.reshape(*is_equal.shape[:3], -1, is_equal.shape[-1])
    return is_equal.all(3).any(2).movedim(-1, 1)


def is_blank(goals: Tensor, blank: float, batch_dims: int) -> Tensor:
    """Which goals are nothing but blanks, bool; a goal is what follows the first dimensions."""
    is_blank = goals == blank
    return is_blank.reshape(*goals.shape[:batch_dims], -1).all(-1)


class GoalRelabel(Relabel):
    """Base of relabellers that exchange goals, and rewards and endings with them.

    A subclass writes :meth:`new_goals` and :meth:`with_goals`.

    Args:
        goal_key: entry that shows the goals.
        achieved_key: entry that shows what was achieved: that of ``next`` is what a step's reward is for.
        reward_fn: ``(achieved [B, T, 1, N, *goal], goal [B, 1, K, *goal]) -> [B, T, K]``, the
            environment's reward, or whether the goal is met (1 or 0).
        met_above: a goal is met by a reward larger than this.
        ends_trial: whether the trial is over, ``terminated``, where the goal, or the last one, is met.
        reward_key: in ``next``: reward of a step.
        prev_reward_key: entry that shows the previous step's reward.
        check: replay the first batch with its own goals, to see that this gives what was stored.
    """

    def __init__(
        self,
        *,
        goal_key: NestedKey,
        achieved_key: NestedKey,
        reward_fn: RewardFunction = exact_match,
        met_above: float = 0.0,
        ends_trial: bool = True,
        reward_key: NestedKey = "reward",
        prev_reward_key: NestedKey = keys.PREV_REWARD,
        check: bool = True,
    ) -> None:
        self.goal_key, self.next_goal_key = goal_key, _of_next(goal_key)
        self.achieved_key = _of_next(achieved_key)
        self.reward_key = _of_next(reward_key)
        self.prev_reward_key, self.next_prev_reward_key = prev_reward_key, _of_next(prev_reward_key)
        self.done_keys = [_of_next(name) for name in ("done", "terminated", "truncated")]
        self.replaced_keys = [
            self.goal_key,
            self.next_goal_key,
            self.reward_key,
            self.prev_reward_key,
            self.next_prev_reward_key,
            *self.done_keys,
        ]
        super().__init__([*self.replaced_keys, self.achieved_key])
        self.reward_fn, self.met_above, self.ends_trial = reward_fn, met_above, ends_trial
        self._to_check = check

    @abstractmethod
    def new_goals(
        self, trials: TensorDictBase, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor]:
        """Draw goals.

        Returns:
            The goals of each trial, and bool ``[B]``, which trials get them; the others stay as they
            were.
        """

    @abstractmethod
    def with_goals(
        self, trials: TensorDictBase, goals: Tensor, is_new_B: Tensor | None = None
    ) -> TensorDictBase:
        """What the trials would have been, had these been their goals.

        Args:
            trials: as for :meth:`relabel`.
            goals: of each trial.
            is_new_B: bool ``[B]``, which trials get them; default all.

        Returns:
            The entries that change, and the mask.
        """

    def relabel(self, trials: TensorDictBase, generator: torch.Generator | None) -> TensorDictBase:
        if self._to_check:
            self._check_replay(trials)
            self._to_check = False
        return self.with_goals(trials, *self.new_goals(trials, generator))

    def _own_goals(self, trials: TensorDictBase) -> Tensor:
        """The goals as they are shown first."""
        return trials.get(self.goal_key)[:, 0]

    def _rewards(self, achieved_BTN: Tensor, goals_BK: Tensor) -> Tensor:
        """Each step's reward for each goal, ``[B, T, K]``."""
        reward_BTK = self.reward_fn(achieved_BTN.unsqueeze(2), goals_BK.unsqueeze(1))
        expected = (*achieved_BTN.shape[:2], goals_BK.shape[1])
        if reward_BTK.shape != expected:
            raise ValueError(
                f"reward_fn must give a reward for each trial, step and goal, shape {expected}, got "
                f"{tuple(reward_BTK.shape)}. Its arguments are achieved [B, T, 1, N, *goal] and goal "
                "[B, 1, K, *goal]; reduce over N and over the goal's dimensions, and let the others "
                "broadcast."
            )
        return reward_BTK

    def _replace(
        self,
        trials: TensorDictBase,
        is_new_B: Tensor | None,
        goals_BS: Tensor,
        reward_BT: Tensor,
        end_B: Tensor,
    ) -> TensorDict:
        """Put new goals and rewards in place, and end the trials.

        Args:
            trials: as for :meth:`relabel`.
            is_new_B: which trials change; None for all.
            goals_BS: the goals as they are shown at each step and after the last one.
            reward_BT: rewards.
            end_B: step that ends each trial by meeting the goal; T or more for none.
        """
        old = trials.get
        mask_BT = old(keys.MASK)
        num_steps = mask_BT.shape[1]
        if is_new_B is None:
            is_new_B = torch.ones_like(end_B, dtype=torch.bool)

        def choose(new: Tensor, key: NestedKey) -> Tensor:
            stored = old(key)
            is_new = is_new_B.view(-1, *(1,) * (stored.ndim - 1))
            return torch.where(is_new, new.to(stored.dtype), stored)

        end_B1 = torch.where(is_new_B, end_B, num_steps).unsqueeze(-1)
        step_T = torch.arange(num_steps, device=mask_BT.device)
        is_end = (step_T == end_B1).unsqueeze(-1)
        reward = reward_BT.unsqueeze(-1)
        # The first one tells of the step before these, which stays as it was.
        before = torch.cat([old(self.prev_reward_key)[:, :1], reward[:, :-1]], 1)
        done, terminated, truncated = (old(key) for key in self.done_keys)
        values = [
            choose(goals_BS[:, :-1], self.goal_key),
            choose(goals_BS[:, 1:], self.next_goal_key),
            choose(reward, self.reward_key),
            choose(before, self.prev_reward_key),
            choose(reward, self.next_prev_reward_key),
            done | is_end,
            terminated | is_end,
            truncated & ~is_end,
        ]
        out = TensorDict({}, trials.batch_size)
        for key, value in zip(self.replaced_keys, values, strict=True):
            out.set(key, value)
        return out.set(keys.MASK, mask_BT & (step_T <= end_B1))

    def _check_replay(self, trials: TensorDictBase) -> None:
        mask_BT = trials.get(keys.MASK)
        again = self.with_goals(trials, self._own_goals(trials))
        changed = [
            key
            for key in self.replaced_keys
            if not torch.allclose(
                again.get(key)[mask_BT].double(), trials.get(key)[mask_BT].double(), atol=1e-5
            )
        ]
        if not torch.equal(again.get(keys.MASK), mask_BT):
            changed.append(keys.MASK)
        if changed:
            raise ValueError(
                f"{type(self).__name__} must find what was stored when it replays trials with their "
                f"own goals, but {changed} come out otherwise. Let reward_fn be the environment's "
                "reward and met_above fit it; let ends_trial say whether meeting the goal ends the "
                "trial; a trial must be a single attempt. check=False leaves this check out."
            )


def _of_next(key: NestedKey) -> NestedKey:
    return unravel_key(("next", key))


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Refuse what isn't among the choices."""
    if value not in choices:
        raise ValueError(
            f"{name} must be one of {', '.join(map(repr, choices))}, got {value!r}. "
            f"Use {choices[0]!r} where in doubt."
        )
