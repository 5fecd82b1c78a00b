"""Symbolic Alchemy: find out by experiments which potions improve stones, then make use of it."""

from __future__ import annotations

from typing import Any, get_args

import numpy as np
import torch
from tensordict import TensorDict
from torch import Tensor

from torchrl_amago._validation import check_choice
from torchrl_amago.envs.tasks.alchemy._picture import draw_table
from torchrl_amago.envs.tasks.alchemy.chemistry import (
    CAULDRON,
    MAX_POTIONS,
    MAX_STONES,
    NUM_POTION_TYPES,
    NUM_ROTATIONS,
    NUM_STONE_TYPES,
    USED_POTION,
    USED_STONE,
    Bottleneck,
)
from torchrl_amago.envs.tasks.alchemy.planner import optimal_return
from torchrl_amago.envs.tasks.alchemy.rules import PARTS, Rules
from torchrl_amago.envs.tasks.batched_task import BatchedTask

# A place without a potion, after the cauldron and the potions: to use it is to do nothing.
_IDLE = MAX_POTIONS + 1
_STONE_BOUNDS = [(-1.0, 2.0)] * 4 + [(0.0, 1.0)]
_POTION_BOUNDS = [(-1.0, 1.0), (0.0, 1.0)]


class SymbolicAlchemy(BatchedTask):
    """The symbolic version of Alchemy (`arXiv 2102.02926 <https://arxiv.org/abs/2102.02926>`_).

    An episode (a trial in the paper) has three stones, twelve potions, a cauldron and 20 steps. A
    potion moves a stone along one of three latent axes, or leaves it as it is; a stone in the
    cauldron is worth -3, -1, 1 or 15. The task is the chemistry, one of 167,424: the axis of each
    colour, the impossible moves, the looks of stones. Each episode draws its items uniformly.

    Observations, actions and probabilities are those of ``dm_alchemy``, and ten episodes make one
    of the paper: ``make_trial_env(SymbolicAlchemy(), episodes=10)``. Its returns are 145.7 for
    random potions, 155.4 for the agent, 284.4 for an ideal observer and 288.5 for the optimum.

    Keys:
        - ``observation``: float32 ``[*B, 39]``. Three stones of five numbers: perceived coordinates
          -1, 0 or 1; sum of the latent coordinates, divided by 3; 0, or 1 if it is used (the others
          are 2 then). Twelve potions of two: colour in [-1, 2/3]; 0, or 1 if it is used (the other
          is 1 then). With ``show_chemistry`` 28 more: 12 edges, 6 orders of the potions' axes and 3
          directions, 3 directions of the stones' axes, 4 rotations.
        - ``action``: 0 does nothing, ``1 + 13 * s`` puts stone s into the cauldron, ``2 + 13 * s +
          p`` into potion p. Used items do nothing.

    Args:
        bottleneck: impossible moves: ``"random"``, ``"none"``, or one of the three fixed sets of
            ``dm_alchemy``'s levels.
        random_maps: draw what colours do and which way the stones' axes run; else both are fixed.
        rotation: turn two of the stones' perceived axes by 45 degrees, in three of four tasks.
        num_stones, num_potions: items of an episode; places beyond are used from the start.
        end_action: action 0 ends the episode, and all others are numbered one higher.
        colour_actions: ``1 + 7 * s`` is the cauldron, ``2 + 7 * s + c`` a potion of colour c. The
            previous action then tells the colour.
        shaping: add to the reward what a potion adds to its stone's worth.
        show_chemistry: show the task: then no memory is needed (the ablation).
        max_episode_steps: steps of an episode, which terminate it.
        shared: other arguments: see :class:`BatchedTask`.

    Examples:
        >>> from torchrl_amago.envs.tasks import SymbolicAlchemy
        >>> env = SymbolicAlchemy(batch_size=[4], seed=0)
        >>> env.rollout(20)["observation"].shape
        torch.Size([4, 20, 39])
    """

    action_meaning = "0 does nothing; sample from env.action_spec to see the others."
    episode_buffers = ("_stones", "_potions")

    def __init__(
        self,
        *,
        bottleneck: Bottleneck = "random",
        random_maps: bool = True,
        rotation: bool = True,
        num_stones: int = MAX_STONES,
        num_potions: int = MAX_POTIONS,
        end_action: bool = False,
        colour_actions: bool = False,
        shaping: bool = False,
        show_chemistry: bool = False,
        max_episode_steps: int = 20,
        **shared: Any,
    ) -> None:
        check_choice("bottleneck", bottleneck, get_args(Bottleneck))
        check_choice("num_stones", num_stones, range(1, MAX_STONES + 1))
        check_choice("num_potions", num_potions, range(MAX_POTIONS + 1))
        bounds = _STONE_BOUNDS * MAX_STONES + _POTION_BOUNDS * MAX_POTIONS
        meanings = _action_meanings(NUM_POTION_TYPES if colour_actions else MAX_POTIONS, end_action)
        super().__init__(
            bounds + [(0.0, 1.0)] * 28 * show_chemistry,
            num_actions=len(meanings),
            max_episode_steps=max_episode_steps,
            **shared,
        )
        self.num_stones, self.num_potions = num_stones, num_potions
        self.end_action, self.colour_actions = end_action, colour_actions
        self.shaping, self.show_chemistry = shaping, show_chemistry
        # Without randomness, the maps and the rotation that change nothing.
        maps = ((0, 48), (0, 8)) if random_maps else ((7, 8), (7, 8))
        self._task_ranges = (*maps, (0, NUM_ROTATIONS) if rotation else (0, 1))
        self.rules = Rules(bottleneck).to(self.device)
        self._constant("_meanings", meanings)
        self._state("_chemistry", torch.zeros(self.num_rows, len(PARTS), dtype=torch.int64))
        self._state("_stones", torch.full((self.num_rows, MAX_STONES), USED_STONE))
        potions = torch.tensor([CAULDRON] + [USED_POTION] * _IDLE)
        self._state("_potions", potions.repeat(self.num_rows, 1))

    @property
    def task(self) -> TensorDict:
        """Graph, potion map, stone map and rotation, new int64 tensors ``[*B]``."""
        columns = self._chemistry.view(*self.batch_size, 4).clone().unbind(-1)
        return TensorDict(dict(zip(PARTS, columns, strict=True)), self.batch_size)

    @property
    def optimal_return(self) -> Tensor:
        """Largest return of the steps left to one who knows the chemistry, float32 ``[*B]``."""
        left = self.max_episode_steps - self._num_steps
        items = self._chemistry[:, 0], self._stones, self._potions
        return optimal_return(*items, left).view(self.batch_size)

    def _integers(self, low: int, high: int, *shape: int) -> Tensor:
        device = self._num_steps.device
        return torch.randint(low, high, shape, generator=self._generator, device=device)

    def _draw_tasks(self, rows: Tensor) -> None:
        graph = torch.searchsorted(self.rules.graph_cdf, self._random(len(rows)), right=True)
        others = [self._integers(*limits, len(rows)) for limits in self._task_ranges]
        self._chemistry.index_copy_(0, rows, torch.stack([graph, *others], -1))

    def _begin_episodes(self, selected: Tensor) -> None:
        for items, types in (
            (self._stones[:, : self.num_stones], NUM_STONE_TYPES),
            (self._potions[:, 1 : 1 + self.num_potions], NUM_POTION_TYPES),
        ):
            drawn = self._integers(0, types, *items.shape)
            items.copy_(drawn.where(selected[:, None], items))

    def _advance(self, action: Tensor) -> tuple[Tensor, Tensor]:
        stone_place, potion_place = self._meanings.index_select(0, action).split(1, -1)
        if self.colour_actions:
            potion_place = self.rules.find(potion_place, self._chemistry, self._potions)
        stone = self._stones.gather(1, stone_place)
        potion = self._potions.gather(1, potion_place)
        outcome, leftover, reward = self.rules.react(self._chemistry[:, :1], potion, stone)
        if self.shaping:
            gain = self.rules.worth.take(outcome) - self.rules.worth.take(stone)
            reward = reward + torch.where(potion == CAULDRON, 0.0, gain).squeeze(-1)
        self._stones.scatter_(1, stone_place, outcome)
        self._potions.scatter_(1, potion_place, leftover)
        # The step limit isn't a truncation: items that are left then are lost.
        over = self._num_steps >= self.max_episode_steps
        if self.end_action:
            over = over | (action == 0)
        return reward, over

    def _observe(self) -> Tensor:
        items = self.rules.observe_items(self._chemistry, self._stones, self._potions[:, 1:_IDLE])
        if not self.show_chemistry:
            return items
        return torch.cat([items, self.rules.observe_chemistry(self._chemistry)], -1)

    def _draw(self, row: int, cell_pixels: int) -> np.ndarray:
        stones = self._observe()[row, : len(_STONE_BOUNDS) * MAX_STONES].view(MAX_STONES, -1)
        graph, potion_map = self._chemistry[row, :2]
        colours, moves = self.rules.colours[potion_map], self.rules.outcomes[graph]
        return draw_table(stones, self._potions[row, 1:_IDLE], colours, moves, cell_pixels)


def _action_meanings(num_targets: int, end_action: bool) -> Tensor:
    """Tabulate the stone and the target of actions, int64 ``[A, 2]``; 0 is the cauldron."""
    used = [divmod(action, num_targets + 1) for action in range(MAX_STONES * (num_targets + 1))]
    return torch.tensor([(0, _IDLE)] * (1 + end_action) + used)
