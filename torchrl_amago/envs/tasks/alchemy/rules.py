"""The rules of Alchemy for all rows of a batch at once: reactions and observations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import embedding

from torchrl_amago.envs.tasks.alchemy import chemistry
from torchrl_amago.envs.tasks.alchemy.chemistry import (
    CAULDRON,
    NUM_POTION_MAPS,
    NUM_ROTATIONS,
    USED_POTION,
    USED_STONE,
    Bottleneck,
)

PARTS = ("graph", "potion_map", "stone_map", "rotation")
_STONES, _POTIONS = USED_STONE + 1, CAULDRON + 1


class Rules(nn.Module):
    """Look-up tables of all chemistries, as buffers that aren't saved.

    Shapes: R rows; a chemistry is ``[R, 4]``, a column for each of ``PARTS``.

    Args:
        bottleneck: graphs that :attr:`graph_cdf` allows.

    Examples:
        >>> import torch
        >>> from torchrl_amago.envs.tasks.alchemy.rules import Rules
        >>> cube, raise_axis_0, lowest = torch.tensor([[[108]], [[1]], [[0]]])
        >>> stone, potion, reward = Rules().react(cube, raise_axis_0, lowest)
        >>> int(stone), int(potion), float(reward)
        (1, 6, 0.0)
    """

    def __init__(self, bottleneck: Bottleneck = "random") -> None:
        super().__init__()
        rewards = torch.zeros(_POTIONS, _STONES)
        rewards[CAULDRON] = chemistry.stone_rewards()
        # Targets of actions: the cauldron is 0, colours come next, a used potion is none.
        colours = torch.full((NUM_POTION_MAPS, _POTIONS), -1)
        colours[:, :USED_POTION] = chemistry.potion_colours() + 1
        colours[:, CAULDRON] = 0
        tables = {
            "graph_cdf": chemistry.graph_probabilities(bottleneck).cumsum(0).float(),
            "outcomes": chemistry.outcome_table(),
            "leftovers": chemistry.leftover_table(),
            "rewards": rewards,
            "worth": rewards[CAULDRON],
            "stone_features": chemistry.stone_appearances().flatten(0, 2),
            "potion_features": chemistry.potion_appearances().flatten(0, 1),
            "colours": colours,
            **dict(zip(PARTS, chemistry.chemistry_appearances(), strict=True)),
        }
        for name, table in tables.items():
            self.register_buffer(name, table, persistent=False)

    def react(
        self, graph_R1: Tensor, potion_R1: Tensor, stone_R1: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Put stones into potions; returns what becomes of both, and the rewards ``[R]``."""
        pair_R1 = potion_R1 * _STONES + stone_R1
        outcome_R1 = self.outcomes.take(graph_R1 * _POTIONS * _STONES + pair_R1)
        return outcome_R1, self.leftovers.take(pair_R1), self.rewards.take(pair_R1).squeeze(-1)

    def find(self, target_R1: Tensor, chemistry_R4: Tensor, potions_RP: Tensor) -> Tensor:
        """Find the cauldron (0) or the first potion of a colour (1 to 6), else the last place."""
        colours_RP = self.colours.take(chemistry_R4[:, 1:2] * _POTIONS + potions_RP)
        found_RP = colours_RP == target_R1
        last = potions_RP.shape[1] - 1
        return torch.where(found_RP.any(-1), found_RP.byte().argmax(-1), last).unsqueeze(-1)

    def observe_items(self, chemistry_R4: Tensor, stones_RS: Tensor, potions_RP: Tensor) -> Tensor:
        """Look up the features of stones, then of potions, float32 ``[R, 5 S + 2 P]``."""
        _, potion_map_R1, stone_map_R1, rotation_R1 = chemistry_R4.split(1, -1)
        stones_RS = (stone_map_R1 * NUM_ROTATIONS + rotation_R1) * _STONES + stones_RS
        potions_RP = potion_map_R1 * (USED_POTION + 1) + potions_RP
        stone_RSF = embedding(stones_RS, self.stone_features)
        potion_RPF = embedding(potions_RP, self.potion_features)
        return torch.cat([stone_RSF.flatten(1), potion_RPF.flatten(1)], -1)

    def observe_chemistry(self, chemistry_R4: Tensor) -> Tensor:
        """Look up the four parts of chemistries, float32 ``[R, 28]``."""
        parts = zip(PARTS, chemistry_R4.unbind(-1), strict=True)
        return torch.cat([embedding(part, getattr(self, name)) for name, part in parts], -1)
