"""Passive T-Maze: see the goal once, walk down a corridor, turn to the right side at its end.

Nothing but memory is tested: which arm is right is shown at the first step only, and the choice comes
after as many steps as the corridor is long.
"""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor

from torchrl_amago.envs.tasks.batched_task import BatchedTask
from torchrl_amago.envs.tasks.tmaze._drawing import draw_tmaze

__all__ = ["TMaze"]

Penalize = Literal["behind", "dawdling"]

# Along the corridor and back, to the sides at its end: (towards the junction, sidewards).
MOVES = ((1, 0), (0, 1), (-1, 0), (0, -1))
NUM_ACTIONS = len(MOVES)


class TMaze(BatchedTask):
    """The Passive T-Maze of Ni et al. (`arXiv 2307.03864 <https://arxiv.org/abs/2307.03864>`_).

    The agent starts at one end of a corridor; at the other end, the junction, are two arms. One of
    them, drawn with probability 1/2 each, is right. Exactly at the episode's last step the reward is
    1 in the right arm and 0 anywhere else. Each step before costs ``penalty`` if the agent is behind,
    that is, has come less far than steps have passed (and is not at the junction yet); or, with
    ``penalize="dawdling"``, if its action isn't 0. The first is the paper's rule. But a single wrong
    step then costs all that can be lost, and what follows teaches nothing; the second rule, of
    `AMAGO <https://arxiv.org/abs/2310.09971>`_'s experiments, has the same best agent and teaches
    walking at every step.

    An episode succeeds, and only then, if its return is above 0: the default ``success_threshold``
    of :func:`~torchrl_amago.evaluation.evaluate`. With the default lengths each step counts: an
    agent that dawdles once cannot reach an arm in time.

    Keys:
        - ``observation``: float32 ``[*B, 3]``, and one more entry with ``show_time``:
          how far the agent has come (0 at the start, 1 at the junction and in its arms), side
          (1 and -1 in the arms, else 0), goal (side of the right arm at the episode's first step,
          later 0 unless ``oracle``), fraction of the episode that is used up.
        - ``action``: 0 walks towards the junction, 2 back; 1 and 3 walk sidewards, to the arms of
          side 1 and -1. Moves into walls stay.
        - ``terminated`` at the last step.

    Resets, ``repeat_task`` (the same goal again) and ``state_dict`` as :class:`BatchedTask` has them.
    ``make_trial_env(TMaze(...), episodes=1)`` makes it a trial of one episode.

    Args:
        corridor_length: steps from the start to the junction, at least 1.
        max_episode_steps: steps of an episode. Defaults to ``corridor_length + 1``, the least that
            suffices.
        ambiguous_position: cells of the corridor look like the start, so that the agent doesn't see
            how far it has come.
        penalty: cost of each such step; default ``1 / (max_episode_steps - 1)``,
            as in the paper, which is also the most.
        penalize: which steps cost: ``"behind"`` or ``"dawdling"``.
        show_time: observe the time step. A trajectory encoder with positions knows it anyway.
        oracle: show the goal at every step: then no memory is needed (the ablation).
        categorical_action_encoding: integer actions ``[*B]`` if True, else one-hot ``[*B, 4]``.
        batch_size: any shape; all rows are stepped together.
        device: device of the state and of all tensors.
        seed: as ``set_seed(seed)``; by default drawn from torch's global generator.

    Raises:
        ValueError: if an argument is out of its range, or an action is (checked on CPU only).

    Examples:
        >>> import torch
        >>> from torchrl_amago.envs.tasks import TMaze
        >>> env = TMaze(corridor_length=2, batch_size=[4], seed=0)
        >>> ahead = lambda td: td.set("action", torch.zeros(4, dtype=torch.int64))
        >>> steps = env.rollout(3, ahead)
        >>> steps["observation"][0, :, 0].tolist()
        [0.0, 0.5, 1.0]
        >>> steps["observation"][..., 2].abs()[0].tolist()
        [1.0, 0.0, 0.0]
    """

    action_meaning = "0 walks towards the junction, 2 back, 1 and 3 sidewards."
    episode_buffers = ("_cell",)

    def __init__(
        self,
        corridor_length: int = 10,
        *,
        max_episode_steps: int | None = None,
        ambiguous_position: bool = False,
        penalty: float | None = None,
        penalize: Penalize = "behind",
        show_time: bool = False,
        oracle: bool = False,
        categorical_action_encoding: bool = True,
        batch_size: torch.Size | tuple[int, ...] = (),
        device: torch.device | str | int | None = None,
        seed: int | None = None,
    ) -> None:
        if max_episode_steps is None and isinstance(corridor_length, int):
            max_episode_steps = corridor_length + 1
        _check_lengths(corridor_length, max_episode_steps)
        self.corridor_length = corridor_length
        self.max_episode_steps = max_episode_steps
        self.ambiguous_position = ambiguous_position
        self.penalty = _checked_penalty(penalty, max_episode_steps)
        self.penalize = _checked_penalize(penalize)
        self.show_time = show_time
        self.oracle = oracle
        super().__init__(
            [(0.0, 1.0), (-1.0, 1.0), (-1.0, 1.0), *([(0.0, 1.0)] if show_time else [])],
            num_actions=NUM_ACTIONS,
            max_episode_steps=max_episode_steps,
            categorical_action_encoding=categorical_action_encoding,
            batch_size=batch_size,
            device=device,
        )
        # Cells are numbered along the corridor, junction included; then come the two arms.
        num_cells = corridor_length + 3
        self._constant("_moves", _move_table(corridor_length))
        places = _place_table(corridor_length, ambiguous=ambiguous_position)
        self._constant("_places", places)
        self._constant("_sides", places[:, 1].clone())
        self._constant("_progress", torch.arange(num_cells).clamp(max=corridor_length))
        self._state("_goal", torch.zeros(self.num_rows))
        self._state("_cell", torch.zeros(self.num_rows, dtype=torch.int64))
        self.set_seed(seed)

    @property
    def goal(self) -> Tensor:
        """Side of the right arm, 1 or -1, a new float32 tensor ``[*B]``."""
        return self._goal.view(self.batch_size).clone()

    def _draw_tasks(self, rows: Tensor) -> None:
        goal = torch.where(self._random() < 0.5, -1.0, 1.0)
        self._goal.index_copy_(0, rows, goal[rows])

    def _begin_episodes(self, selected: Tensor) -> None:
        self._cell.masked_fill_(selected, 0)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        cell = self._moves.take(action * self._progress.numel() + self._cell)
        self._cell.copy_(cell)
        over = self._num_steps >= self.max_episode_steps
        if self.penalize == "behind":
            is_slow = self._progress.take(cell) < self._num_steps.clamp(max=self.corridor_length)
        else:
            is_slow = action != 0
        in_right_arm = self._sides.take(cell) == self._goal
        cost = torch.where(is_slow, -self.penalty, 0.0)
        return torch.where(over, in_right_arm.float(), cost), over

    def _observe(self) -> Tensor:
        place = self._places.index_select(0, self._cell)
        goal = self._goal
        if not self.oracle:
            goal = torch.where(self._num_steps == 0, goal, 0.0)
        seen = [place, goal.unsqueeze(-1)]
        if self.show_time:
            seen.append((self._num_steps / self.max_episode_steps).unsqueeze(-1))
        return torch.cat(seen, -1)

    def render(
        self, row: int | tuple[int, ...] | None = None, *, cell_pixels: int = 32
    ) -> np.ndarray:
        """Draw one row's maze from above: start left, arms right, the one of side 1 on top.

        The corridor is drawn five cells long, whatever its length; the agent stands where its share
        of the way is. The right arm has the flag, and the agent a lamp while it sees the goal.

        Args:
            row: which row of the batch: an index into the flattened batch or one index per batch
                dimension. May be left out if there is only one.
            cell_pixels: side of a cell, in pixels.

        Returns:
            uint8 ``[3 * cell_pixels, 6 * cell_pixels, 3]``.

        Raises:
            ValueError: if row is missing although there are several, or cells are too small.
            IndexError: if there is no such row.
        """
        index = self._flat_row(row)
        cell = int(self._cell[index])
        return draw_tmaze(
            int(self._progress[cell]) / self.corridor_length,
            int(self._sides[cell]),
            int(self._goal[index]),
            sees_goal=self.oracle or int(self._num_steps[index]) == 0,
            cell_pixels=cell_pixels,
        )


def _move_table(corridor_length: int) -> Tensor:
    """Where each action leads from each cell, int64 ``[4, corridor_length + 3]``."""
    junction, arms = corridor_length, {1: corridor_length + 1, -1: corridor_length + 2}
    table = torch.arange(corridor_length + 3).repeat(NUM_ACTIONS, 1)
    for action, (ahead, sidewards) in enumerate(MOVES):
        corridor = table[action, : junction + 1]
        corridor.add_(ahead).clamp_(0, junction)
        if sidewards:
            table[action, junction] = arms[sidewards]
            table[action, arms[-sidewards]] = junction
    return table


def _place_table(corridor_length: int, *, ambiguous: bool) -> Tensor:
    """What is seen of each cell: how far and on which side, float32 ``[corridor_length + 3, 2]``."""
    far = (torch.arange(corridor_length + 3) / corridor_length).clamp(max=1.0)
    if ambiguous:
        far = far.floor()
    side = torch.zeros_like(far)
    side[-2:] = torch.tensor([1.0, -1.0])
    return torch.stack([far, side], -1)


def _check_lengths(corridor_length: int, max_episode_steps: int | None) -> None:
    if not isinstance(corridor_length, int) or corridor_length < 1:
        raise ValueError(
            f"corridor_length must be an integer of at least 1, got {corridor_length!r}. It is the "
            "number of steps from the start to the junction."
        )
    if not isinstance(max_episode_steps, int) or max_episode_steps <= corridor_length:
        raise ValueError(
            f"max_episode_steps must be an integer larger than corridor_length={corridor_length}, got "
            f"{max_episode_steps!r}. Fewer steps don't reach an arm; leave it out for the fewest."
        )


def _checked_penalize(penalize: Penalize) -> Penalize:
    if penalize not in get_args(Penalize):
        raise ValueError(
            f"penalize must be one of {get_args(Penalize)}, got {penalize!r}. It says which steps "
            "cost the penalty."
        )
    return penalize


def _checked_penalty(penalty: float | None, max_episode_steps: int) -> float:
    most = 1.0 / (max_episode_steps - 1)
    if penalty is None:
        return most
    if not 0.0 <= penalty <= most:
        raise ValueError(
            f"penalty must be in [0, 1 / (max_episode_steps - 1)] = [0, {most:.6g}], got {penalty}. It "
            "is a cost per step; a larger one could outweigh the reward for the right arm."
        )
    return penalty
