"""Entries of a batch as the loss reads them: by its keys, checked, in rows of one trial each.

Legend: B rows, T steps, S = T + 1 states, A action size, M the steps that count, see
:class:`~torchrl_amago._masking.Steps`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from torchrl_amago import keys
from torchrl_amago._masking import Steps
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.objectives._checks import (
    check_actions,
    check_batch_size,
    check_reward,
    check_steps,
)
from torchrl_amago.rows import index_of_rows, trial_begins


class Slices:
    """Slices of trials, ``[B, T]``, as the loss reads them.

    Flat batches, and rows that hold several trials, are split into rows of one trial each, but not
    under `torch.compile`: there a row must hold one trial, and nothing of a batch's data is checked.

    Args:
        tensordict: the batch, ``[B, T]`` or ``[N]``.
        tensor_keys: the loss's.
        inputs: entries that encoder and actor read.
        compact: see :class:`~torchrl_amago._masking.Steps`.
        reward_scale: factor of rewards.
        device: of the mask, where the batch has none.

    Raises:
        ValueError: for batches of another shape, and those that :func:`check_steps` refuses.
    """

    def __init__(
        self,
        tensordict: TensorDictBase,
        tensor_keys: Any,
        inputs: Sequence[NestedKey],
        compact: bool | None,
        reward_scale: float,
        device: torch.device,
    ) -> None:
        check_batch_size(tensordict.shape)
        #: The batch as it was given; :attr:`tensordict` has rows of one trial each.
        self.given = self.tensordict = tensordict
        self.keys, self._index_RL = tensor_keys, None
        mask = tensordict.get(tensor_keys.mask, None)
        if mask is None:
            mask = torch.ones(tensordict.shape, dtype=torch.bool, device=device)
        #: Which steps count.
        self.steps = Steps(mask.reshape(tensordict.shape), compact)
        if not torch.compiler.is_compiling():
            self._check_and_split(inputs, compact, reward_scale)

    def _check_and_split(
        self, inputs: Sequence[NestedKey], compact: bool | None, reward_scale: float
    ) -> None:
        given, mask = self.given, self.steps.full_mask
        marks = (self.keys.is_init, ("next", self.keys.done), keys.TRAJECTORY)
        begins_BT = trial_begins(mask, *(given.get(mark, None) for mark in marks))
        mask_BT = mask.reshape(begins_BT.shape)
        found = [given.get(("next", key), None) for key in inputs]
        reward = given.get(("next", self.keys.reward), None)
        is_flat = given.ndim == 1
        if check_steps(mask_BT, begins_BT, found, reward, reward_scale, is_flat) or is_flat:
            self._index_RL, mask_RL = index_of_rows(begins_BT, mask_BT)
            self.tensordict = given.reshape(-1)[self._index_RL].set(self.keys.mask, mask_RL)
            self.steps = Steps(mask_RL, compact)

    def restore(self, x_M: Tensor) -> Tensor:
        """Values of the steps that count in the shape of the batch as given, zero on padding."""
        x_RL = self.steps.restore(x_M)
        if self._index_RL is None:
            return x_RL
        shape, mask_RL = self.given.shape, self.steps.full_mask
        x_N = x_RL.new_zeros(shape.numel(), *x_RL.shape[2:])
        return x_N.index_put((self._index_RL[mask_RL],), x_RL[mask_RL]).unflatten(0, shape)

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
                "transforms as the policy was built for, and with compact_obs=False; name other keys "
                "with set_keys."
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
                "buffer with sample_by='priority', or use 'auto'."
            )
        return None
