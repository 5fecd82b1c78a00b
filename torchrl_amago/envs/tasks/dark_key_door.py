"""Dark Key-to-Door: find an invisible key, then an invisible door, again and again."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_amago.envs.tasks._canvas import Canvas, Cell
from torchrl_amago.envs.tasks.grid_task import GridTask, check_size, move_table

_DARK, _LIGHT = (92, 96, 112), (238, 232, 218)
_DARK_LINES, _LIGHT_LINES = (72, 76, 92), (206, 198, 180)
_KEY, _DOOR, _OPENING = (246, 206, 74), (122, 78, 46), (46, 34, 28)


class DarkKeyDoor(GridTask):
    """A room with a key and a door (`Algorithm Distillation <https://arxiv.org/abs/2210.14215>`_).

    The reward is 1 when the agent comes to the key, and 1 when it then comes to the door, which
    terminates the episode. A task is the cells of key, door and start, independent and uniform, as
    in `AMAGO <https://arxiv.org/abs/2310.09971>`_'s code base. (If key and door coincide, the door
    takes another step.) Unlike there, the dark room shows neither the time nor whether the agent
    has the key, and beginning an episode costs no step: returns of the two aren't comparable.

    ``make_trial_env(DarkKeyDoor(...), horizon=H)``: trials of the episodes that fit in H steps.

    ``observation``: dark, float32 ``[*B, 2]``: the agent's coordinates. Light, ``[*B, 7]``: also
    whether it has the key (0 or 1), the key's coordinates and the door's.

    Args:
        dark: show the agent's own position only.
        shared: size, actions and other arguments: see :class:`GridTask` and :class:`BatchedTask`.

    Examples:
        >>> room = DarkKeyDoor(size=5, batch_size=[4], seed=0)
        >>> room.rollout(3, break_when_any_done=False)["observation"].shape
        torch.Size([4, 3, 2])
    """

    episode_buffers = ("_cell", "_has_key")

    def __init__(
        self, size: int = 9, *, dark: bool = True, max_episode_steps: int = 50, **shared: Any
    ) -> None:
        check_size(size)
        super().__init__(size, 2 if dark else 7, max_episode_steps=max_episode_steps, **shared)
        self.dark = dark
        self._constant("_moves", move_table(size))
        for name in ("_start", "_key", "_door"):
            self._state(name, torch.zeros(self.num_rows, dtype=torch.int64))
        self._state("_has_key", torch.zeros(self.num_rows, dtype=torch.bool))

    @property
    def key(self) -> Tensor:
        """The two coordinates of the key's cell, a new int64 tensor ``[*B, 2]``."""
        return self._coordinates(self._key)

    @property
    def door(self) -> Tensor:
        """The two coordinates of the door's cell, a new int64 tensor ``[*B, 2]``."""
        return self._coordinates(self._door)

    @property
    def start(self) -> Tensor:
        """The two coordinates of the first cell of episodes, a new int64 tensor ``[*B, 2]``."""
        return self._coordinates(self._start)

    def _draw_tasks(self, rows: Tensor) -> None:
        where = {"generator": self._generator, "device": rows.device}
        cells = torch.randint(self.size**2, (3, len(rows)), **where)
        for state, cell in zip((self._start, self._key, self._door), cells, strict=True):
            state.index_copy_(0, rows, cell)
        self._draw_meanings(rows)

    def _begin_episodes(self, selected: Tensor) -> None:
        torch.where(selected, self._start, self._cell, out=self._cell)
        self._has_key.masked_fill_(selected, False)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        cell = self._moves.take(self._meant(action) * self.size**2 + self._cell)
        self._cell.copy_(cell)
        through_door = self._has_key & (cell == self._door)
        finds_key = ~self._has_key & (cell == self._key)
        self._has_key.logical_or_(finds_key)
        return (through_door | finds_key).float(), through_door

    def _observe(self) -> Tensor:
        position = self._position()
        if self.dark:
            return position
        key, door = (self._positions.index_select(0, cell) for cell in (self._key, self._door))
        return torch.cat([position, self._has_key.unsqueeze(-1).float(), key, door], -1)

    def _draw(self, row: int, cell_pixels: int) -> np.ndarray:
        places = (self._cell[row], self._key[row], self._door[row])
        agent, key, door = (divmod(int(cell), self.size) for cell in places)
        colours = (_DARK, _DARK_LINES) if self.dark else (_LIGHT, _LIGHT_LINES)
        canvas = Canvas(self.size, self.size, cell_pixels, *colours)
        cell = canvas.cell(*door)
        cell.box(0.08, 0.94, 0.18, 0.82, _DOOR)
        if self._has_key[row]:  # the agent carries it, and the door is open
            cell.box(0.15, 0.94, 0.26, 0.74, _OPENING)
            canvas.cell(*agent).agent()
            _draw_key(canvas.cell(agent[0] + 0.54, agent[1] + 0.3, scale=0.6))
        else:
            cell.disc(0.54, 0.70, 0.05, _KEY)
            _draw_key(canvas.cell(*key))
            canvas.cell(*agent).agent()
        return canvas.image()


def _draw_key(cell: Cell) -> None:
    cell.disc(0.5, 0.3, 0.16, _KEY, hole=0.07)
    cell.box(0.46, 0.54, 0.42, 0.83, _KEY)
    cell.box(0.5, 0.66, 0.64, 0.71, _KEY)
    cell.box(0.5, 0.66, 0.76, 0.83, _KEY)
