"""Meta-FrozenLake: cross an unknown frozen lake, then cross it again knowing more.

All rows of the batch are stepped by the same few tensor operations, so that 64 lakes cost about
what one does. One episode of this environment is one episode; k episodes at the same lake come
from the trial transform, which resets rows with ``repeat_task``.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from torchrl_amago.envs.tasks.batched_task import BatchedTask
from torchrl_amago.envs.tasks.frozen_lake._rules import (
    NEIGHBOURS,
    NOISE_OUTCOMES,
    NUM_ACTIONS,
    P_HOLE_BEHIND,
    P_SWAPPED,
    RECOVER_PENALTY,
    move_table,
    position_table,
)
from torchrl_amago.envs.tasks.frozen_lake.drawing import draw_lake
from torchrl_amago.envs.tasks.frozen_lake.layouts import (
    LakeSplit,
    _check_size,
    _check_split,
    random_lakes,
)

__all__ = ["MetaFrozenLake"]


class MetaFrozenLake(BatchedTask):
    """A frozen lake whose holes the agent cannot see, natively batched.

    The agent starts at cell (0, 0) and gets reward 1 at the goal, cell (size-1, size-1). Holes end
    the episode with reward 0. Observations hold the position only, so that the lake must be
    remembered from one episode to the next. Every lake can be crossed; each other cell is safe with
    probability 0.8 (Gymnasium's ``generate_random_map``). The task is the Meta-FrozenLake of
    `AMAGO-2 <https://arxiv.org/abs/2411.11188>`_'s code base, without its loop over episodes.

    Keys:
        - ``observation``: float32 ``[*B, 2]``, the cell's two coordinates divided by ``size``.
        - ``action``: 0 stays; 1 and 2 raise and lower the first coordinate (down and up in pictures),
          3 and 4 the second one (right and left). Moves into the shore stay.
        - ``terminated`` at the goal or in a hole; ``truncated`` at the step limit, if not
          terminated.

    Resets, ``repeat_task`` and ``state_dict`` (lakes drawn ahead included) as :class:`BatchedTask`
    has them.

    Args:
        size: cells per side, at least 2.
        hard_mode: positions are observed off by up to one cell in each coordinate with probability
            1/4; a cell that a move leaves becomes a hole with probability 0.33 until the episode's
            end (in recover mode also when the move fell into a hole and was undone); half of the
            tasks swap the actions 1 and 3.
        recover_mode: a hole costs 0.1 and puts the agent back where it came from, instead of ending
            the episode.
        slip_chance: probability in [0, 1) that a move is replaced by staying.
        max_episode_steps: step limit of an episode. Defaults to size*size, doubled in hard mode and
            divided by ``1 - slip_chance``.
        categorical_action_encoding: integer actions ``[*B]`` if True, else one-hot ``[*B, 5]``.
        batch_size: any shape; all rows are stepped together.
        device: device of the state and of all tensors.
        seed: as ``set_seed(seed)``; by default drawn from torch's global generator.
        layouts: which lakes to draw: ``"all"``, or the ``"train"`` (about 3 in 4) or ``"heldout"``
            ones of a fixed split with no lake in common. Each split is the distribution of all lakes,
            conditioned on being in it.

    Raises:
        ValueError: if an argument is out of its range, or an action is (checked on CPU only: on
            other devices the check would stall the step).

    Examples:
        >>> import torch
        >>> from torchrl_amago.envs.tasks import MetaFrozenLake
        >>> env = MetaFrozenLake(size=3, batch_size=[4], seed=0)
        >>> env.rollout(3, break_when_any_done=False)["observation"].shape
        torch.Size([4, 3, 2])
        >>> lakes = env.holes
        >>> _ = env.reset(repeat_task=True)
        >>> torch.equal(env.holes, lakes)
        True
    """

    action_meaning = "0 stays, 1 to 4 move; sample from env.action_spec to see them."

    def __init__(
        self,
        size: int = 3,
        *,
        hard_mode: bool = False,
        recover_mode: bool = False,
        slip_chance: float = 0.0,
        max_episode_steps: int | None = None,
        categorical_action_encoding: bool = True,
        batch_size: torch.Size | tuple[int, ...] = (),
        device: torch.device | str | int | None = None,
        seed: int | None = None,
        layouts: LakeSplit = "all",
    ) -> None:
        _check_size(size)
        _check_split(layouts, size)
        if not 0.0 <= slip_chance < 1.0:
            raise ValueError(
                f"slip_chance must be in [0, 1), got {slip_chance}. It is the probability that a "
                "move is replaced by staying; at 1 the agent would never move."
            )
        if max_episode_steps is None:
            max_episode_steps = int(size * size * (2 if hard_mode else 1) / (1.0 - slip_chance))
        super().__init__(
            [(0.0, 1.0)] * 2,
            num_actions=NUM_ACTIONS,
            max_episode_steps=max_episode_steps,
            categorical_action_encoding=categorical_action_encoding,
            batch_size=batch_size,
            device=device,
        )
        self.size = size
        self.hard_mode = hard_mode
        self.recover_mode = recover_mode
        self.slip_chance = slip_chance
        self.layouts = layouts
        self.episode_buffers = ("_cell", *(["_broken_lake"] if hard_mode else []))
        self._make_state()
        self.set_seed(seed)

    @property
    def holes(self) -> Tensor:
        """The holes of each row's lake, a new bool tensor ``[*B, size, size]``.

        In hard mode without those that opened during the episode.
        """
        return self._lake.view(*self.batch_size, self.size, self.size).clone()

    # ------------------------------------------------------------------ set-up

    def _make_state(self) -> None:
        rows, cells = self.num_rows, self.size**2
        self._constant("_moves", move_table(self.size))
        self._constant("_positions", position_table(self.size, noisy=self.hard_mode))
        self._constant("_row_start", torch.arange(rows) * cells)
        self._state("_lake", torch.zeros(rows, cells, dtype=torch.bool))
        self._state("_cell", torch.zeros(rows, dtype=torch.int64))
        if self.hard_mode:
            # The lake as the current episode has left it, and the offset of the task's move table.
            self._state("_broken_lake", torch.zeros(rows, cells, dtype=torch.bool))
            self._state("_table_start", torch.zeros(rows, dtype=torch.int64))
        # Lakes are drawn ahead: a partial reset then takes a few rows of a table instead of
        # running the generator, whose cost barely depends on how many lakes it draws.
        self._state("_pool", torch.zeros(max(1024, 8 * rows), cells, dtype=torch.bool))
        self._pool_cursor = len(self._pool)

    # ------------------------------------------------------------- randomness

    def _set_seed(self, seed: int | None) -> None:
        super()._set_seed(seed)
        self._pool_cursor = len(self._pool)

    def _take_lakes(self, num: int) -> Tensor:
        if self._pool_cursor + num > len(self._pool):
            lakes = random_lakes(len(self._pool), self.size, self._generator, layouts=self.layouts)
            self._pool.copy_(lakes.flatten(1))
            self._pool_cursor = 0
        start = self._pool_cursor
        self._pool_cursor += num
        return self._pool[start : start + num]

    def get_extra_state(self) -> dict[str, Any]:
        """What `state_dict` holds besides buffers: the generator and the place in the pool."""
        return {**super().get_extra_state(), "pool_cursor": self._pool_cursor}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restore what :meth:`get_extra_state` gave."""
        super().set_extra_state(state)
        self._pool_cursor = state["pool_cursor"]

    # ------------------------------------------------------------ reset and step

    def _draw_tasks(self, rows: Tensor) -> None:
        self._lake.index_copy_(0, rows, self._take_lakes(len(rows)))
        if self.hard_mode:
            swapped = self._random()[: len(rows)] < P_SWAPPED
            self._table_start.index_copy_(0, rows, swapped * self._moves[0].numel())

    def _begin_episodes(self, selected: Tensor) -> None:
        self._cell.masked_fill_(selected, 0)
        if self.hard_mode:
            torch.where(
                selected.unsqueeze(-1), self._lake, self._broken_lake, out=self._broken_lake
            )

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        cell = self._cell
        moved = self._move(action)
        ground = self._broken_lake if self.hard_mode else self._lake
        in_hole = ground.take(self._row_start + moved)
        at_goal = moved == self.size**2 - 1
        if self.recover_mode:
            reward = torch.where(in_hole, -RECOVER_PENALTY, at_goal.float())
            cell.copy_(torch.where(in_hole, cell, moved))
            return reward, at_goal
        cell.copy_(moved)
        return at_goal.float(), at_goal | in_hole

    def _move(self, action: Tensor) -> Tensor:
        """The cells that actions lead to; in hard mode also opens holes behind the moves."""
        if self.slip_chance > 0.0:
            action = torch.where(self._random() < self.slip_chance, 0, action)
        cell = self._cell
        index = action * self.size**2 + cell
        if not self.hard_mode:
            return self._moves.take(index)
        moved = self._moves.take(index + self._table_start)
        opens = (moved != cell) & (self._random() < P_HOLE_BEHIND)
        left = self._row_start + cell
        ground = self._broken_lake.view(-1)
        ground.index_copy_(0, left, ground.take(left) | opens)
        return moved

    def _observe(self) -> Tensor:
        index = self._cell
        if self.hard_mode:
            noise = torch.randint(
                NOISE_OUTCOMES, index.shape, generator=self._generator, device=index.device
            )
            index = index * (NEIGHBOURS + 1) + noise.clamp_(max=NEIGHBOURS)
        return self._positions.index_select(0, index)

    # ----------------------------------------------------------------- render

    def render(
        self, row: int | tuple[int, ...] | None = None, *, cell_pixels: int = 32
    ) -> np.ndarray:
        """Draw one row's lake, with the holes that the agent cannot see.

        The first coordinate runs down and the second one to the right, so that the start is top
        left. Holes that opened during the episode are drawn cracked.

        Args:
            row: which row of the batch: an index into the flattened batch or one index per batch
                dimension. May be left out if there is only one.
            cell_pixels: side of a cell, in pixels.

        Returns:
            uint8 ``[size * cell_pixels, size * cell_pixels, 3]``.

        Raises:
            ValueError: if row is missing although there are several.
            IndexError: if there is no such row.
        """
        index = self._flat_row(row)
        holes = self._lake[index]
        ground = self._broken_lake[index] if self.hard_mode else holes
        shape = (self.size, self.size)
        return draw_lake(
            holes.view(shape).cpu().numpy(),
            divmod(int(self._cell[index]), self.size),
            opened=(ground & ~holes).view(shape).cpu().numpy(),
            cell_pixels=cell_pixels,
        )
