"""Meta-FrozenLake: cross an unknown frozen lake, then cross it again knowing more."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_amago.envs.tasks._canvas import PLATE, Canvas
from torchrl_amago.envs.tasks.frozen_lake.layouts import LakeSplit, check_lakes, random_lakes
from torchrl_amago.envs.tasks.grid_task import GridTask, move_table, position_table

# Constants of the reference task (AMAGO's MetaFrozenLake, hard and recover modes).
_P_NOISY = 1 / 4
_P_HOLE_BEHIND = 0.33
_P_SWAPPED = 1 / 2
_RECOVER_PENALTY = 0.1

# A noisy position is one of 9 neighbours. Drawing from 36 outcomes, of which 27 mean "exact",
# gives probability 1/4 with a single draw.
_NEIGHBOURS = tuple((down, right) for down in (-1, 0, 1) for right in (-1, 0, 1))
_NOISE_OUTCOMES = round(len(_NEIGHBOURS) / _P_NOISY)

_ICE, _LINES = (214, 234, 246), (176, 206, 226)
_RIM, _WATER, _DEEP = (124, 160, 190), (24, 52, 92), (12, 30, 60)


class MetaFrozenLake(GridTask):
    """A frozen lake whose holes the agent cannot see, natively batched.

    The agent starts at cell (0, 0) and gets reward 1 at the goal, cell (size-1, size-1). Holes end
    the episode with reward 0. Observations hold the position only, so that the lake must be
    remembered from one episode to the next. Every lake can be crossed; each other cell is safe with
    probability 0.8 (Gymnasium's ``generate_random_map``). The task is the Meta-FrozenLake of
    `AMAGO-2 <https://arxiv.org/abs/2411.11188>`_'s code base, without its loop over episodes.

    ``observation``: float32 ``[*B, 2]``, the agent's coordinates. ``terminated`` at the goal or in
    a hole.

    Args:
        hard_mode: positions are observed off by up to one cell in each coordinate with probability
            1/4; a cell that a move leaves becomes a hole with probability 0.33 until the episode's
            end (in recover mode also when the move fell into a hole and was undone); half of the
            tasks swap the actions 1 and 3.
        recover_mode: a hole costs 0.1 and undoes the move, instead of ending the episode.
        slip_chance: probability in [0, 1) that a move is replaced by staying.
        max_episode_steps: step limit of an episode. Defaults to size*size, doubled in hard mode and
            divided by ``1 - slip_chance``.
        layouts: the lakes to draw from: ``"all"``, or the ``"train"`` (about 3 in 4) or
            ``"heldout"`` ones of a fixed split with no lake in common.
        shared: size, actions and other arguments: see :class:`GridTask` and :class:`BatchedTask`.

    Examples:
        >>> env = MetaFrozenLake(size=3, batch_size=[4], seed=0)
        >>> env.rollout(3, break_when_any_done=False)["observation"].shape
        torch.Size([4, 3, 2])
    """

    def __init__(
        self,
        size: int = 3,
        *,
        hard_mode: bool = False,
        recover_mode: bool = False,
        slip_chance: float = 0.0,
        max_episode_steps: int | None = None,
        layouts: LakeSplit = "all",
        **shared: Any,
    ) -> None:
        check_lakes(size, layouts)
        if not 0.0 <= slip_chance < 1.0:
            rule = "slip_chance must be in [0, 1)"
            raise ValueError(f"{rule}, got {slip_chance}: at 1 the agent would never move.")
        if max_episode_steps is None:
            max_episode_steps = int(size * size * (2 if hard_mode else 1) / (1.0 - slip_chance))
        super().__init__(size, 2, max_episode_steps=max_episode_steps, **shared)
        self.hard_mode, self.recover_mode = hard_mode, recover_mode
        self.slip_chance, self.layouts = slip_chance, layouts
        self.episode_buffers = ("_cell", *(["_broken_lake"] if hard_mode else []))
        rows, cells, moves = self.num_rows, size**2, move_table(size)
        # The second half is for tasks that swap the actions 1 and 3.
        self._constant("_moves", torch.cat([moves, moves[[0, 3, 2, 1, 4]]]))
        self._state("_lake", torch.zeros(rows, cells, dtype=torch.bool))
        if hard_mode:
            # Each cell's noisy positions, then its exact one.
            self._constant("_positions", position_table(size, (*_NEIGHBOURS, (0, 0))))
            # The lake as the current episode has left it, and the offset of the task's move table.
            self._state("_broken_lake", torch.zeros(rows, cells, dtype=torch.bool))
            self._state("_table_start", torch.zeros(rows, dtype=torch.int64))
        # Lakes are drawn ahead, because the cost of drawing barely depends on their number.
        self._state("_pool", torch.zeros(max(1024, 8 * rows), cells, dtype=torch.bool))
        self._state("_pool_left", torch.zeros((), dtype=torch.int64))

    @property
    def holes(self) -> Tensor:
        """The holes that episodes begin with, a new bool tensor ``[*B, size, size]``."""
        return self._lake.view(*self.batch_size, self.size, self.size).clone()

    def _set_seed(self, seed: int | None) -> None:
        super()._set_seed(seed)
        self._pool_left.zero_()

    def _take_lakes(self, num: int) -> Tensor:
        left = int(self._pool_left)
        if left < num:
            left = len(self._pool)
            lakes = random_lakes(left, self.size, self._generator, layouts=self.layouts)
            self._pool.copy_(lakes.flatten(1))
        self._pool_left.fill_(left - num)
        start = len(self._pool) - left
        return self._pool[start : start + num]

    def _draw_tasks(self, rows: Tensor) -> None:
        self._lake.index_copy_(0, rows, self._take_lakes(len(rows)))
        if self.hard_mode:
            swapped = self._random()[: len(rows)] < _P_SWAPPED
            self._table_start.index_copy_(0, rows, swapped * (self._moves.numel() // 2))
        self._draw_meanings(rows)

    def _begin_episodes(self, selected: Tensor) -> None:
        self._cell.masked_fill_(selected, 0)
        if self.hard_mode:
            broken = self._broken_lake
            torch.where(selected.unsqueeze(-1), self._lake, broken, out=broken)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        cell = self._cell
        moved = self._move(action)
        ground = self._broken_lake if self.hard_mode else self._lake
        in_hole = ground.take(self._first_cell + moved)
        at_goal = moved == self.size**2 - 1
        if self.recover_mode:
            reward = torch.where(in_hole, -_RECOVER_PENALTY, at_goal.float())
            cell.copy_(torch.where(in_hole, cell, moved))
            return reward, at_goal
        cell.copy_(moved)
        return at_goal.float(), at_goal | in_hole

    def _move(self, action: Tensor) -> Tensor:
        """Look up the cells that actions lead to; in hard mode also open holes behind the moves."""
        action = self._meant(action)
        if self.slip_chance > 0.0:
            action = torch.where(self._random() < self.slip_chance, 0, action)
        cell = self._cell
        index = action * self.size**2 + cell
        if not self.hard_mode:
            return self._moves.take(index)
        moved = self._moves.take(index + self._table_start)
        opens = (moved != cell) & (self._random() < _P_HOLE_BEHIND)
        left = self._first_cell + cell
        ground = self._broken_lake.view(-1)
        ground.index_copy_(0, left, ground.take(left) | opens)
        return moved

    def _observe(self) -> Tensor:
        if not self.hard_mode:
            return self._position()
        cell, exact = self._cell, len(_NEIGHBOURS)
        where = {"generator": self._generator, "device": cell.device}
        noise = torch.randint(_NOISE_OUTCOMES, cell.shape, **where)
        return self._positions.index_select(0, cell * (exact + 1) + noise.clamp_(max=exact))

    def _draw(self, row: int, cell_pixels: int) -> np.ndarray:
        canvas = Canvas(self.size, self.size, cell_pixels, _ICE, _LINES)
        canvas.cell(0, 0).start()
        goal = canvas.cell(self.size - 1, self.size - 1)
        goal.fill(PLATE)
        goal.flag()
        holes = self._broken_lake[row] if self.hard_mode else self._lake[row]
        for hole in holes.nonzero().flatten().tolist():
            cell = canvas.cell(*divmod(hole, self.size))
            radius = 0.38 if self._lake[row, hole] else 0.22  # opened in this episode
            cell.disc(0.5, 0.5, radius + 0.05, _RIM)
            cell.disc(0.5, 0.5, radius, _WATER)
            cell.disc(0.56, 0.53, 0.66 * radius, _DEEP)
        canvas.cell(*divmod(int(self._cell[row]), self.size)).agent()
        return canvas.image()
