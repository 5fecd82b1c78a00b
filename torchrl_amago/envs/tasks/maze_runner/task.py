"""MazeRunner: run through an unknown maze to one goal after the other.

What the agent sees around it are distances to walls only; which goals it has still to reach it is
told. Goals, and what was achieved, are observations of their own, so that hindsight can exchange
them (:class:`~torchrl_amago.data.relabel.GoalSequenceRelabel`).
"""

from __future__ import annotations

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor
from torchrl.data import Bounded, Composite

from torchrl_amago.envs.tasks.batched_task import BatchedTask
from torchrl_amago.envs.tasks.frozen_lake._rules import NUM_ACTIONS, position_table
from torchrl_amago.envs.tasks.maze_runner._drawing import draw_maze
from torchrl_amago.envs.tasks.maze_runner._layouts import (
    check_maze_size,
    random_goals,
    random_mazes,
    start_cell,
)
from torchrl_amago.envs.tasks.maze_runner._rules import depth_table, move_steps

__all__ = ["MazeRunner"]

# Shown in place of a goal that is reached; no cell has such coordinates.
_REACHED = -1.0

# Mazes are drawn this many at once (at least), and kept: drawing one costs as much as drawing all.
_LEAST_STOCK = 64


class MazeRunner(BatchedTask):
    """A maze with a sequence of goals (`AMAGO <https://arxiv.org/abs/2310.09971>`_, Appendix C.4).

    The reward is 1 at each step that ends at the next goal; the last goal ends the episode. A task
    is a maze, where the goals are in it (free cells, uniform, all different, never the start) and,
    with ``randomize_actions``, what the actions do. The agent starts at the bottom of the lobby's
    middle alley. Walls and the lobby are as in the authors' code base
    (:func:`~torchrl_amago.envs.tasks.maze_runner._layouts.random_mazes`); goals are shown as
    coordinates divided by ``size``, there as cells.

    Keys:
        - ``observation``: float32 ``[*B, 7]``: the agent's coordinates; how many free cells lie to
          its west (left), north (up), east and south before there is a wall; all divided by
          ``size``; fraction of the episode's steps that is used up.
        - ``goals``: float32 ``[*B, k, 2]``, the goals' coordinates divided by ``size``, in order;
          -1 for those reached.
        - ``achieved``: float32 ``[*B, 1, 2]``, where the agent is, in the same units. It is for
          hindsight, not for the policy: ``make_policy(..., obs_keys=["observation", "goals"])``.
        - ``action``: 0 stays; 1 and 2 raise and lower the first coordinate (down and up in pictures),
          3 and 4 the second one (right and left). Moves into walls stay.
        - ``terminated`` at the last goal; ``truncated`` at the step limit, if not terminated.

    Resets, ``repeat_task`` (the same maze and goals) and ``state_dict`` as :class:`BatchedTask` has
    them. ``make_trial_env(MazeRunner(...), episodes=1)`` makes it a trial of one episode; the agent
    sees the time, so that a trial that is out of time may count as terminated, as is the default
    there.

    Args:
        size: cells per side, odd and at least 7, walls included.
        num_goals: k, length of the sequence.
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
        >>> from torchrl_amago.envs.tasks import MazeRunner
        >>> maze = MazeRunner(size=7, num_goals=2, batch_size=[4], seed=0)
        >>> steps = maze.rollout(3, break_when_any_done=False)
        >>> steps["observation"].shape, steps["goals"].shape, steps["achieved"].shape
        (torch.Size([4, 3, 7]), torch.Size([4, 3, 2, 2]), torch.Size([4, 3, 1, 2]))
        >>> torch.equal(steps["achieved"][..., 0, :], steps["observation"][..., :2])
        True
    """

    action_meaning = "0 stays, 1 to 4 move; sample from env.action_spec to see them."
    episode_buffers = ("_cell", "_num_reached")

    def __init__(
        self,
        size: int = 11,
        *,
        num_goals: int = 3,
        max_episode_steps: int = 250,
        randomize_actions: bool = False,
        categorical_action_encoding: bool = True,
        batch_size: torch.Size | tuple[int, ...] = (),
        device: torch.device | str | int | None = None,
        seed: int | None = None,
    ) -> None:
        check_maze_size(size)
        _check_goals(num_goals, size)
        super().__init__(
            [(0.0, 1.0)] * 7,
            num_actions=NUM_ACTIONS,
            max_episode_steps=max_episode_steps,
            categorical_action_encoding=categorical_action_encoding,
            batch_size=batch_size,
            device=device,
        )
        self.size = size
        self.num_goals = num_goals
        self.randomize_actions = randomize_actions
        self._make_goal_specs()
        self._make_buffers()
        self.set_seed(seed)

    @property
    def walls(self) -> Tensor:
        """The mazes, True at walls, a new bool tensor ``[*B, size, size]``."""
        return self._walls.view(*self.batch_size, self.size, self.size).clone()

    @property
    def goals(self) -> Tensor:
        """All goals' cells, reached or not, a new int64 tensor ``[*B, k, 2]``."""
        cell = self._goals.view(*self.batch_size, self.num_goals)
        return torch.stack([cell // self.size, cell % self.size], -1)

    # ------------------------------------------------------------------ set-up

    def _make_goal_specs(self) -> None:
        def places(num: int, low: float) -> Bounded:
            return Bounded(low, 1.0, shape=(*self.batch_size, num, 2), device=self.device)

        self.observation_spec = Composite(
            observation=self.observation_spec["observation"],
            goals=places(self.num_goals, _REACHED),
            achieved=places(1, 0.0),
            shape=self.batch_size,
            device=self.device,
        )

    def _make_buffers(self) -> None:
        rows, size = self.num_rows, self.size
        cells = size**2
        reached = torch.full((1, 2), _REACHED)
        self._constant("_positions", torch.cat([position_table(size, noisy=False), reached]))
        self._constant("_steps", move_steps(size))
        self._constant("_first_cell", cells * torch.arange(rows))
        self._state("_walls", torch.ones(rows, cells, dtype=torch.bool))
        self._state("_depth", torch.zeros(rows, cells, 4))
        self._state("_goals", torch.zeros(rows, self.num_goals, dtype=torch.int64))
        self._state("_num_reached", torch.zeros(rows, dtype=torch.int64))
        self._state("_cell", torch.full((rows,), start_cell(size)))
        if self.randomize_actions:
            self._state("_meaning", torch.arange(NUM_ACTIONS).repeat(rows, 1))
        stock = max(rows, _LEAST_STOCK)
        self._state("_stock_walls", torch.ones(stock, cells, dtype=torch.bool))
        self._state("_stock_depth", torch.zeros(stock, cells, 4))
        self._state("_stock_left", torch.zeros((), dtype=torch.int64))

    def _set_seed(self, seed: int | None) -> None:
        super()._set_seed(seed)
        self._stock_left.zero_()

    # -------------------------------------------------------------------- task

    def _draw_tasks(self, rows: Tensor) -> None:
        mazes = self._take_from_stock(len(rows))
        walls = self._stock_walls[mazes]
        self._walls.index_copy_(0, rows, walls)
        self._depth.index_copy_(0, rows, self._stock_depth[mazes])
        maze = walls.view(-1, self.size, self.size)
        goals = random_goals(maze, self.num_goals, self._generator)
        self._goals.index_copy_(0, rows, goals)
        if self.randomize_actions:
            shape = (len(rows), NUM_ACTIONS)
            order = torch.rand(shape, generator=self._generator, device=rows.device).argsort(-1)
            self._meaning.index_copy_(0, rows, order)

    def _take_from_stock(self, num: int) -> slice:
        """Where the next mazes are in the stock; if it has too few, it is drawn anew."""
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

    # -------------------------------------------------------------------- step

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        if self.randomize_actions:
            action = self._meaning.gather(1, action.unsqueeze(-1)).squeeze(-1)
        ahead = self._cell + self._steps.take(action)
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

    def _position(self) -> Tensor:
        return self._positions.index_select(0, self._cell)

    def _outcome(self, done: Tensor, terminated: Tensor, truncated: Tensor) -> TensorDict:
        out = super()._outcome(done, terminated, truncated)
        order = torch.arange(self.num_goals, device=self._goals.device)
        is_reached = order < self._num_reached.unsqueeze(-1)
        # The table's last entry, after those of all cells, is what is shown of reached goals.
        shown = torch.where(is_reached, self.size**2, self._goals)
        goals = self._positions.index_select(0, shown.flatten())
        out.set("goals", goals.view(*self.batch_size, self.num_goals, 2))
        return out.set("achieved", self._position().view(*self.batch_size, 1, 2))

    # ------------------------------------------------------------------ render

    def render(
        self, row: int | tuple[int, ...] | None = None, *, cell_pixels: int = 32
    ) -> np.ndarray:
        """Draw one row's maze with the goals that aren't reached yet: the next one has the flag.

        The first coordinate runs down and the second one to the right.

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
        goals = self._goals[index, int(self._num_reached[index]) :].tolist()
        return draw_maze(
            self._walls[index].view(self.size, self.size).cpu().numpy(),
            divmod(int(self._cell[index]), self.size),
            [divmod(goal, self.size) for goal in goals],
            start=divmod(start_cell(self.size), self.size),
            cell_pixels=cell_pixels,
        )


def _check_goals(num_goals: int, size: int) -> None:
    # The lobby alone has a passage of size - 2 cells and alleys of three times size - 4; one is the start.
    most = (size - 2) + 3 * (size - 4) - 1
    if not isinstance(num_goals, int) or not 1 <= num_goals <= most:
        raise ValueError(
            f"num_goals must be an integer in [1, {most}] for size={size}, got {num_goals!r}. Goals are "
            "different free cells; ask for fewer, or use a larger maze."
        )
