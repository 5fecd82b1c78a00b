"""Passive T-Maze: see the goal once, walk down a corridor, turn to the right side at its end."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from torchrl_amago._validation import check_choice, check_counts
from torchrl_amago.envs.tasks._canvas import Canvas
from torchrl_amago.envs.tasks.batched_task import BatchedTask

Penalize = Literal["behind", "dawdling"]

_NUM_ACTIONS = 4
_WALL, _FLOOR, _LINES, _LAMP = (70, 74, 84), (232, 226, 212), (208, 200, 182), (252, 214, 92)


class TMaze(BatchedTask):
    """The Passive T-Maze of Ni et al. (`arXiv 2307.03864 <https://arxiv.org/abs/2307.03864>`_).

    The agent starts at one end of a corridor; at the other end, the junction, are two arms, of
    which a random one is right. At the episode's last step the reward is 1 in the right arm and 0
    anywhere else. Each earlier step costs ``penalty`` if the agent is behind, that is, has come
    less far than steps have passed (the paper's rule: after one wrong step nothing more can be
    lost, and nothing learned); or, with ``penalize="dawdling"``, if its action isn't 0 (the rule of
    `AMAGO <https://arxiv.org/abs/2310.09971>`_'s experiments, with the same best agent).

    An episode succeeds if and only if its return is above 0. With the default lengths, an agent
    that dawdles once cannot reach an arm in time.

    Keys:
        - ``observation``: float32 ``[*B, 3]``: fraction of the corridor that is behind the agent,
          side (1 and -1 in the arms, else 0), goal (side of the right arm at the episode's first
          step, later 0 unless ``oracle``); with ``show_time`` also that of the episode's steps.
        - ``action``: 0 walks towards the junction, 2 back; 1 and 3 walk sidewards, to the arms of
          side 1 and -1. Moves into walls stay.

    ``make_trial_env(TMaze(...), episodes=1)`` makes it a trial of one episode.

    Args:
        corridor_length: steps from the start to the junction, at least 1.
        max_episode_steps: steps of an episode. Defaults to the fewest, ``corridor_length + 1``.
        ambiguous_position: cells of the corridor look like the start.
        penalty: cost of each such step. Defaults to the paper's, ``1 / (max_episode_steps - 1)``.
        penalize: the steps that cost: ``"behind"`` or ``"dawdling"``.
        show_time: observe the time step, which encoders with positions have anyway.
        oracle: show the goal at every step: then no memory is needed (the ablation).
        shared: other arguments: see :class:`BatchedTask`.

    Examples:
        >>> TMaze(corridor_length=2, batch_size=[4], seed=0).rollout(3)["observation"].shape
        torch.Size([4, 3, 3])
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
        **shared: Any,
    ) -> None:
        check_counts("It is the steps to the junction.", corridor_length=corridor_length)
        max_episode_steps = corridor_length + 1 if max_episode_steps is None else max_episode_steps
        if max_episode_steps <= corridor_length:
            raise ValueError(
                f"max_episode_steps must be larger than corridor_length={corridor_length}, got "
                f"{max_episode_steps}. Fewer steps don't reach an arm; leave it out for the fewest."
            )
        max_penalty = 1.0 / (max_episode_steps - 1)
        if penalty is not None and not 0.0 <= penalty <= max_penalty:
            raise ValueError(
                f"penalty must be in [0, 1 / (max_episode_steps - 1)] = [0, {max_penalty:.6g}], "
                f"got {penalty}. It is a cost per step; more could outweigh the final reward."
            )
        check_choice("penalize", penalize, get_args(Penalize))
        observation_bounds = [(0.0, 1.0), (-1.0, 1.0), (-1.0, 1.0)] + [(0.0, 1.0)] * show_time
        shared["max_episode_steps"] = max_episode_steps
        super().__init__(observation_bounds, num_actions=_NUM_ACTIONS, **shared)
        self.corridor_length, self.ambiguous_position = corridor_length, ambiguous_position
        self.penalty, self.penalize = max_penalty if penalty is None else penalty, penalize
        self.show_time, self.oracle = show_time, oracle
        # Cells are numbered along the corridor, junction included; then come the two arms.
        progress = torch.arange(corridor_length + 3).clamp(max=corridor_length)
        side = torch.tensor([0.0] * (corridor_length + 1) + [1.0, -1.0])
        far = progress // corridor_length if ambiguous_position else progress / corridor_length
        self._constant("_moves", _move_table(corridor_length))
        self._constant("_places", torch.stack([far, side], -1))
        self._constant("_sides", side)
        self._constant("_progress", progress)
        self._state("_goal", torch.zeros(self.num_rows))
        self._state("_cell", torch.zeros(self.num_rows, dtype=torch.int64))

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
        cell = self._cell.copy_(self._moves.take(action * self._progress.numel() + self._cell))
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
        is_shown = (self._num_steps == 0) | self.oracle
        goal = torch.where(is_shown, self._goal, 0.0)
        seen = [place, goal.unsqueeze(-1)]
        if self.show_time:
            seen.append((self._num_steps / self.max_episode_steps).unsqueeze(-1))
        return torch.cat(seen, -1)

    def _draw(self, row: int, cell_pixels: int) -> np.ndarray:
        # The corridor is drawn five cells long, whatever its length.
        cell, goal, junction = self._cell[row], int(self._goal[row]), 5
        progress = int(self._progress[cell]) / self.corridor_length * junction
        canvas = Canvas(3, junction + 1, cell_pixels, _WALL)
        corridor = [(1, column) for column in range(junction)]
        for place in corridor + [(line, junction) for line in range(3)]:
            canvas.cell(*place).fill(_FLOOR)
            canvas.cell(*place).frame(_LINES)
        canvas.cell(1 - goal, junction).flag()
        if self.oracle or self._num_steps[row] == 0:  # a lamp on the goal's side while it shows
            canvas.cell(1 - goal, progress).disc(0.5, 0.5, 0.26, _LAMP)
        canvas.cell(1 - int(self._sides[cell]), progress).agent()
        return canvas.image()


def _move_table(corridor_length: int) -> Tensor:
    """Tabulate where each action leads from each cell, int64 ``[4, corridor_length + 3]``."""
    junction, left, right = range(corridor_length, corridor_length + 3)
    table = torch.arange(corridor_length + 3).repeat(_NUM_ACTIONS, 1)
    ahead, to_left, back, to_right = table
    ahead[:junction] += 1
    back[1:left] -= 1
    to_left[junction], to_left[right] = left, junction
    to_right[junction], to_right[left] = right, junction
    return table
