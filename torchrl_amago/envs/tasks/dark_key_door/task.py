"""Dark Key-to-Door: find an invisible key, then an invisible door; then do it again, knowing where.

One episode of this environment is one episode; a trial of as many episodes as fit into H steps comes
from the trial transform, ``make_trial_env(DarkKeyDoor(...), horizon=H)``.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from torchrl_amago.envs.tasks.batched_task import BatchedTask
from torchrl_amago.envs.tasks.dark_key_door._drawing import draw_room
from torchrl_amago.envs.tasks.frozen_lake._rules import NUM_ACTIONS, move_table, position_table

__all__ = ["DarkKeyDoor"]


class DarkKeyDoor(BatchedTask):
    """A room with a key and a door (`Algorithm Distillation <https://arxiv.org/abs/2210.14215>`_).

    The reward is 1 when the agent comes to the key, and 1 when it then comes to the door, which ends
    the episode; without the key the door does nothing. A task is where key, door and start are:
    uniform and independent of each other, so that they may share a cell. (Where key and door do, the
    door takes another step.) All three stay from episode to episode, as in `AMAGO
    <https://arxiv.org/abs/2310.09971>`_'s code base. Unlike there, the dark room shows neither the
    time nor whether the agent has the key, and beginning an episode costs no step: returns of the
    two aren't comparable.

    Keys:
        - ``observation``: dark, float32 ``[*B, 2]``: the agent's coordinates divided by ``size``.
          Light, ``[*B, 7]``: besides, whether it has the key (0 or 1), the key's coordinates and the
          door's, divided by ``size``.
        - ``action``: 0 stays; 1 and 2 raise and lower the first coordinate (down and up in pictures),
          3 and 4 the second one (right and left). Moves into walls stay.
        - ``terminated`` at the door; ``truncated`` at the step limit, if not terminated.

    Resets, ``repeat_task`` and ``state_dict`` as :class:`BatchedTask` has them.

    Args:
        size: cells per side, at least 2.
        dark: show the agent's own position only. A light room needs no memory
            unless actions are permuted.
        max_episode_steps: step limit of an episode.
        randomize_actions: each task permutes the five actions.
        categorical_action_encoding: integer actions ``[*B]`` if True, else one-hot ``[*B, 5]``.
        batch_size: any shape; all rows are stepped together.
        device: device of the state and of all tensors.
        seed: as ``set_seed(seed)``; by default drawn from torch's global generator.

    Raises:
        ValueError: if an argument is out of its range, or an action is (checked on CPU only).

    Examples:
        >>> import torch
        >>> from torchrl_amago.envs.tasks import DarkKeyDoor
        >>> room = DarkKeyDoor(size=5, batch_size=[4], seed=0)
        >>> room.rollout(3, break_when_any_done=False)["observation"].shape
        torch.Size([4, 3, 2])
        >>> door = room.door
        >>> _ = room.reset(repeat_task=True)
        >>> torch.equal(room.door, door)
        True
    """

    action_meaning = "0 stays, 1 to 4 move; sample from env.action_spec to see them."
    episode_buffers = ("_cell", "_has_key")

    def __init__(
        self,
        size: int = 9,
        *,
        dark: bool = True,
        max_episode_steps: int = 50,
        randomize_actions: bool = False,
        categorical_action_encoding: bool = True,
        batch_size: torch.Size | tuple[int, ...] = (),
        device: torch.device | str | int | None = None,
        seed: int | None = None,
    ) -> None:
        if not isinstance(size, int) or size < 2:
            raise ValueError(
                f"size must be an integer of at least 2, got {size!r}. It is the number of cells on "
                "each side of the room."
            )
        super().__init__(
            [(0.0, 1.0)] * (2 if dark else 7),
            num_actions=NUM_ACTIONS,
            max_episode_steps=max_episode_steps,
            categorical_action_encoding=categorical_action_encoding,
            batch_size=batch_size,
            device=device,
        )
        self.size = size
        self.dark = dark
        self.randomize_actions = randomize_actions
        rows = self.num_rows
        self._constant("_moves", move_table(size)[0].contiguous())
        self._constant("_positions", position_table(size, noisy=False))
        for name in ("_start", "_key", "_door", "_cell"):
            self._state(name, torch.zeros(rows, dtype=torch.int64))
        self._state("_has_key", torch.zeros(rows, dtype=torch.bool))
        if randomize_actions:
            self._state("_meaning", torch.arange(NUM_ACTIONS).repeat(rows, 1))
        self.set_seed(seed)

    @property
    def key(self) -> Tensor:
        """The key's cell, its two coordinates, a new int64 tensor ``[*B, 2]``."""
        return self._coordinates(self._key)

    @property
    def door(self) -> Tensor:
        """The door's cell, its two coordinates, a new int64 tensor ``[*B, 2]``."""
        return self._coordinates(self._door)

    @property
    def start(self) -> Tensor:
        """Where episodes begin, two coordinates, a new int64 tensor ``[*B, 2]``."""
        return self._coordinates(self._start)

    def _coordinates(self, cell: Tensor) -> Tensor:
        return torch.stack([cell // self.size, cell % self.size], -1).view(*self.batch_size, 2)

    def _draw_tasks(self, rows: Tensor) -> None:
        cells = torch.randint(
            self.size**2, (3, len(rows)), generator=self._generator, device=rows.device
        )
        for state, cell in zip((self._start, self._key, self._door), cells, strict=True):
            state.index_copy_(0, rows, cell)
        if self.randomize_actions:
            shape = (len(rows), NUM_ACTIONS)
            order = torch.rand(shape, generator=self._generator, device=rows.device).argsort(-1)
            self._meaning.index_copy_(0, rows, order)

    def _begin_episodes(self, selected: Tensor) -> None:
        torch.where(selected, self._start, self._cell, out=self._cell)
        self._has_key.masked_fill_(selected, False)

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        if self.randomize_actions:
            action = self._meaning.gather(1, action.unsqueeze(-1)).squeeze(-1)
        cell = self._moves.take(action * self.size**2 + self._cell)
        self._cell.copy_(cell)
        through_door = self._has_key & (cell == self._door)
        finds_key = ~self._has_key & (cell == self._key)
        self._has_key.logical_or_(finds_key)
        return (through_door | finds_key).float(), through_door

    def _observe(self) -> Tensor:
        position = self._positions.index_select(0, self._cell)
        if self.dark:
            return position
        key, door = (self._positions.index_select(0, cell) for cell in (self._key, self._door))
        return torch.cat([position, self._has_key.unsqueeze(-1).float(), key, door], -1)

    def render(
        self, row: int | tuple[int, ...] | None = None, *, cell_pixels: int = 32
    ) -> np.ndarray:
        """Draw one row's room, with the key and the door that the agent may not see.

        The first coordinate runs down and the second one to the right. The door is open once the
        agent has the key, which it then carries.

        Args:
            row: which row of the batch: an index into the flattened batch or one index per batch
                dimension. May be left out if there is only one.
            cell_pixels: side of a cell, in pixels.

        Returns:
            uint8 ``[size * cell_pixels, size * cell_pixels, 3]``.

        Raises:
            ValueError: if row is missing although there are several, or cells are too small.
            IndexError: if there is no such row.
        """
        index = self._flat_row(row)
        agent, key, door = (
            divmod(int(cell[index]), self.size) for cell in (self._cell, self._key, self._door)
        )
        return draw_room(
            self.size,
            agent,
            key,
            door,
            has_key=bool(self._has_key[index]),
            dark=self.dark,
            cell_pixels=cell_pixels,
        )
