"""What the loss reads of a batch: entries by the loss's keys, refused where they can't be right.

Legend: B rows, T steps, S = T + 1 states, A action size, M the steps that count, see
:class:`~torchrl_amago.steps.Steps`.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from torchrl_amago import keys
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.objectives.checks import (
    check_actions,
    check_batch_size,
    check_reward,
    check_rows,
)
from torchrl_amago.steps import Steps


class Slices:
    """Slices of trials, ``[B, T]``, as the loss reads them.

    Args:
        tensordict: the batch.
        tensor_keys: the loss's.
        compact: see :class:`~torchrl_amago.steps.Steps`.
        device: of the mask, where the batch has none.

    Raises:
        ValueError: for batches of another shape, and rows that don't hold steps of one trial with
            padding behind them.
    """

    def __init__(
        self,
        tensordict: TensorDictBase,
        tensor_keys: Any,
        compact: bool | None,
        device: torch.device,
    ) -> None:
        check_batch_size(tensordict.shape)
        self.tensordict, self.keys = tensordict, tensor_keys
        mask_BT = tensordict.get(tensor_keys.mask, None)
        if mask_BT is None:
            mask_BT = torch.ones(tensordict.shape, dtype=torch.bool, device=device)
        mask_BT = mask_BT.reshape(tensordict.shape)
        if not torch.compiler.is_compiling():
            check_rows(mask_BT, tensordict.get(keys.IS_INIT, None))
        #: Which steps count.
        self.steps = Steps(mask_BT, compact)

    @property
    def mask_BT1(self) -> Tensor:
        """True on real steps."""
        return self.steps.full_mask.unsqueeze(-1)

    def entry(
        self, key: NestedKey, place: Literal["at the root", "under next"] = "at the root"
    ) -> Tensor:
        """An entry ``[B, T, ...]``.

        Raises:
            KeyError: with its name and place, if there is none.
        """
        source = self.tensordict
        if place == "under next":
            source = source.get("next", None)
        entry = None if source is None else source.get(key, None)
        if entry is None:
            raise KeyError(
                f"the loss reads {key!r} of a batch, but it is missing {place}. Collect with the same "
                "transforms as the policy was built for; name other keys with set_keys."
            )
        return entry

    def sequence(self, key: NestedKey) -> Tensor:
        """An entry at T + 1 steps ``[B, S, ...]``: at the first root, then at what every step led to."""
        return torch.cat([self.entry(key)[:, :1], self.entry(key, "under next")], 1)

    def action(self, space: ActionSpace) -> Tensor:
        """Actions taken, as vectors ``[M, A]``.

        Raises:
            ValueError: for actions outside of the space.
        """
        action_M = self.steps.select(self.entry(self.keys.action), fill=0)
        if not torch.compiler.is_compiling():
            check_actions(space, action_M, self.steps.mask)
        return space.to_vector(action_M)

    def terminated(self) -> Tensor:
        """Where nothing follows, ``[B, T, 1]``, False on padding."""
        terminated = self.entry(self.keys.terminated, "under next")
        return terminated.reshape(self.mask_BT1.shape) & self.mask_BT1

    def reward(self) -> Tensor:
        """Rewards ``[B, T, 1]``, 0 on padding.

        Raises:
            ValueError: for rewards of several numbers.
        """
        reward = self.entry(self.keys.reward, "under next")
        check_reward(reward, self.mask_BT1)
        return torch.where(self.mask_BT1, reward.reshape(self.mask_BT1.shape), 0.0)

    def importance(self, required: bool) -> Tensor | None:
        """Importance weights ``[M]``; None if the batch has none.

        Raises:
            KeyError: if it has none, and they are required.
        """
        key = self.keys.priority_weight
        weight_BT = self.tensordict.get(key, None)
        if weight_BT is not None:
            return self.steps.select(weight_BT.reshape(self.tensordict.shape), fill=0)
        if required:
            raise KeyError(
                f"use_prioritized_weights=True reads {key!r}, but the batch lacks it. Sample from a "
                "buffer with draw='priority', or use 'auto'."
            )
        return None
