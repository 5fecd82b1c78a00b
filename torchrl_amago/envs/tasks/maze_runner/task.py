"""MazeRunner: run through an unknown maze to one goal after the other."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Bounded

from torchrl_amago.envs.tasks._canvas import PLATE, Canvas
from torchrl_amago.envs.tasks.grid_task import MOVES, GridTask, check_size
from torchrl_amago.envs.tasks.maze_runner._layouts import (
    SMALLEST_SIZE,
    depth_table,
    random_goals,
    random_mazes,
    start_cell,
)

# Stands for a goal that is reached; no cell has such coordinates.
_REACHED = -1.0

# Mazes are drawn this many at once (at least), and kept: drawing one costs as much as drawing all.
_MIN_STOCK = 64

_FLOOR, _WALL, _LATER, _DOT = (244, 240, 230), (74, 82, 98), (222, 228, 238), (64, 104, 176)

# Where the picture of a later goal has its dots: one for each goal before it, seven at most.
_DOTS = ((0.5, 0.5), (0.3, 0.3), (0.7, 0.7), (0.3, 0.7), (0.7, 0.3), (0.5, 0.2), (0.5, 0.8))


class MazeRunner(GridTask):
    """A maze with a sequence of goals (`AMAGO <https://arxiv.org/abs/2310.09971>`_, Appendix C.4).

    The reward is 1 at each step that ends at the next goal; the last goal ends the episode. A task
    is a maze, the goals' cells in it (free, uniform, all different, never the start) and, with
    ``randomize_actions``, the actions' meanings. The agent starts in the lobby's middle alley.
    Walls and the lobby are as in the authors' code base.

    Keys:
        - ``observation``: float32 ``[*B, 7]``: the agent's coordinates; how many free cells lie to
          its west (left), north (up), east and south before there is a wall, divided by ``size``;
          fraction of the episode's steps that is used up.
        - ``goals``: float32 ``[*B, k, 2]``, the goals' coordinates divided by ``size``, in order;
          -1 for those reached.
        - ``achieved``: float32 ``[*B, 1, 2]``, the agent's coordinates again, for hindsight
          (:class:`~torchrl_amago.data.relabel.GoalSequenceRelabel`), not for the policy:
          ``make_policy(..., obs_keys=["observation", "goals"])``.

    Args:
        size: cells per side, odd and at least 7, walls included.
        num_goals: k, length of the sequence.
        shared: actions and other arguments: see :class:`GridTask` and :class:`BatchedTask`.

    Examples:
        >>> maze = MazeRunner(size=7, num_goals=2, batch_size=[4], seed=0)
        >>> steps = maze.rollout(3, break_when_any_done=False)
        >>> steps["observation"].shape, steps["goals"].shape, steps["achieved"].shape
        (torch.Size([4, 3, 7]), torch.Size([4, 3, 2, 2]), torch.Size([4, 3, 1, 2]))
    """

    episode_buffers = ("_cell", "_num_reached")

    def __init__(
        self, size: int = 11, *, num_goals: int = 3, max_episode_steps: int = 250, **shared: Any
    ) -> None:
        check_size(size, SMALLEST_SIZE, odd=True)
        # The lobby has a passage of size - 2 cells and three rows of size - 4, start included.
        max_goals = (size - 2) + 3 * (size - 4) - 1
        if not isinstance(num_goals, int) or not 1 <= num_goals <= max_goals:
            raise ValueError(
                f"num_goals must be an integer in [1, {max_goals}] for size={size}, got "
                f"{num_goals!r}. Goals are different free cells; a larger maze has more."
            )
        super().__init__(size, 7, max_episode_steps=max_episode_steps, **shared)
        self.num_goals = num_goals
        for key, num, low in (("goals", num_goals, _REACHED), ("achieved", 1, 0.0)):
            shape = (*self.batch_size, num, 2)
            self.observation_spec[key] = Bounded(low, 1.0, shape=shape, device=self.device)
        rows, cells = self.num_rows, size**2
        # After the positions of all cells, the stand-in for reached goals.
        reached = torch.full((1, 2), _REACHED, device=self.device)
        self._constant("_positions", torch.cat([self._positions, reached]))
        self._constant("_steps", torch.tensor(MOVES) @ torch.tensor([size, 1]))
        self._state("_walls", torch.ones(rows, cells, dtype=torch.bool))
        self._state("_depth", torch.zeros(rows, cells, 4))
        self._state("_goals", torch.zeros(rows, num_goals, dtype=torch.int64))
        self._state("_num_reached", torch.zeros(rows, dtype=torch.int64))
        stock = max(rows, _MIN_STOCK)
        self._state("_stock_walls", torch.ones(stock, cells, dtype=torch.bool))
        self._state("_stock_depth", torch.zeros(stock, cells, 4))
        self._state("_stock_left", torch.zeros((), dtype=torch.int64))

    @property
    def walls(self) -> Tensor:
        """The mazes, True at walls, a new bool tensor ``[*B, size, size]``."""
        return self._walls.view(*self.batch_size, self.size, self.size).clone()

    @property
    def goals(self) -> Tensor:
        """All goals' cells, reached or not, a new int64 tensor ``[*B, k, 2]``."""
        return self._coordinates(self._goals)

    def _set_seed(self, seed: int | None) -> None:
        super()._set_seed(seed)
        self._stock_left.zero_()

    def _draw_tasks(self, rows: Tensor) -> None:
        mazes = self._take_from_stock(len(rows))
        walls = self._stock_walls[mazes]
        self._walls.index_copy_(0, rows, walls)
        self._depth.index_copy_(0, rows, self._stock_depth[mazes])
        maze = walls.view(-1, self.size, self.size)
        self._goals.index_copy_(0, rows, random_goals(maze, self.num_goals, self._generator))
        self._draw_meanings(rows)

    def _take_from_stock(self, num: int) -> slice:
        """Take mazes from the stock, after drawing a new one if too few are left."""
        left = int(self._stock_left)
        if left < num:
            left = len(self._stock_walls)
            walls = random_mazes(left, self.size, self._generator)
            self._stock_walls.copy_(walls.flatten(1))
            self._stock_depth.copy_(depth_table(walls))
        self._stock_left.fill_(left - num)
        return slice(left - num, left)

    def _begin_episodes(self, selected: Tensor) -> None:
        self._cell.masked_fill_(selected, start_cell(self.size))
        self._num_reached.masked_fill_(selected, 0)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        ahead = self._cell + self._steps.take(self._meant(action))
        is_wall = self._walls.take(self._first_cell + ahead)
        torch.where(is_wall, self._cell, ahead, out=self._cell)
        next_goal = self._num_reached.clamp(max=self.num_goals - 1).unsqueeze(-1)
        reaches = self._cell == self._goals.gather(1, next_goal).squeeze(-1)
        reaches &= self._num_reached < self.num_goals
        self._num_reached.add_(reaches)
        return reaches.float(), self._num_reached == self.num_goals

    def _observe(self) -> Tensor:
        depth = self._depth.view(-1, 4).index_select(0, self._first_cell + self._cell)
        time = (self._num_steps / self.max_episode_steps).unsqueeze(-1)
        return torch.cat([self._position(), depth, time], -1)

    def _outcome(self, done: Tensor, terminated: Tensor, truncated: Tensor) -> TensorDict:
        out = super()._outcome(done, terminated, truncated)
        order = torch.arange(self.num_goals, device=self._goals.device)
        is_reached = order < self._num_reached.unsqueeze(-1)
        cells = torch.where(is_reached, self.size**2, self._goals)
        goals = self._positions.index_select(0, cells.flatten())
        out.set("goals", goals.view(*self.batch_size, self.num_goals, 2))
        return out.set("achieved", self._position().view(*self.batch_size, 1, 2))

    def _draw(self, row: int, cell_pixels: int) -> np.ndarray:
        canvas = Canvas(self.size, self.size, cell_pixels, _FLOOR)
        for wall in self._walls[row].nonzero().flatten().tolist():
            canvas.cell(*divmod(wall, self.size)).fill(_WALL)
        canvas.cell(*divmod(start_cell(self.size), self.size)).start()
        goals = self._goals[row, int(self._num_reached[row]) :].tolist()
        for order, goal in enumerate(goals):
            cell = canvas.cell(*divmod(goal, self.size))
            cell.box(0.05, 0.95, 0.05, 0.95, _LATER if order else PLATE)
            if not order:
                cell.flag()
            for dot in _DOTS[:order]:
                cell.disc(*dot, 0.09, _DOT)
        canvas.cell(*divmod(int(self._cell[row]), self.size)).agent()
        return canvas.image()
