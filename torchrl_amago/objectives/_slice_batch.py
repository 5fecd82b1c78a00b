"""A batch as the loss reads it: entries by their keys, checked, in rows of one trial each.

Legend: B rows, T steps, S = T + 1 states, A action size, M the computed steps, see
:class:`~torchrl_amago._masking.Steps`; R rows of one trial each, L steps of the longest.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from torchrl_amago import keys
from torchrl_amago._masking import Steps
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.rows import index_of_rows, trial_starts

# Returns of a million steps of such rewards have squares within float32, and so have sums of them.
LARGEST_REWARD = 1e12


class SliceBatch:
    """Slices of trials: the batch `given`, its `tensordict` in rows of one trial, their `steps`.

    Flat batches, and rows that hold several trials, are split into rows of one trial each. Under
    `torch.compile`, and if the batch `is_checked`, a row must hold one trial, and nothing of a
    batch's data is checked.
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
        is_compiling, shape = torch.compiler.is_compiling(), tensordict.shape
        if len(shape) not in (1, 2) or 0 in shape[-1:] or (len(shape) == 1 and is_compiling):
            raise ValueError(
                "the loss reads batches [B, T] of slices and, unless it is compiled, flat ones "
                f"[N], of at least one step, got the batch size {list(shape)}. Use "
                "split_trials(batch) or batch.reshape(-1, T)."
            )
        self.given = self.tensordict = tensordict
        self.keys, self._index_RL = tensor_keys, None
        mask = tensordict.get(tensor_keys.mask, None)
        if mask is None:
            mask = torch.ones(shape, dtype=torch.bool, device=device)
        self.steps = Steps(mask.reshape(shape), compact)
        self.is_checked = is_compiling or tensordict.get(keys.CHECKED, None) is not None
        if not self.is_checked:
            self._check_and_split(inputs, compact, reward_scale)

    @property
    def mask_BT1(self) -> Tensor:
        return self.steps.full_mask.unsqueeze(-1)

    def restore(self, x_M: Tensor) -> Tensor:
        """Put the steps that count in the shape of the batch as given, zero on padding."""
        x_RL = self.steps.restore(x_M)
        if self._index_RL is None:
            return x_RL
        shape, mask_RL = self.given.shape, self.steps.full_mask
        x_N = x_RL.new_zeros(shape.numel(), *x_RL.shape[2:])
        return x_N.index_put((self._index_RL[mask_RL],), x_RL[mask_RL]).unflatten(0, shape)

    def entry(self, key: NestedKey, *, under_next: bool = False) -> Tensor:
        """Return an entry ``[B, T, ...]``; raise KeyError if it is missing."""
        source = self.tensordict.get("next", None) if under_next else self.tensordict
        entry = None if source is None else source.get(key, None)
        if entry is None:
            raise KeyError(
                f"the loss reads {key!r} of a batch, but it is missing "
                f"{'under next' if under_next else 'at the root'}. Collect with the policy's "
                "transforms and compact_obs=False; name other keys with set_keys."
            )
        return entry

    def sequence(self, key: NestedKey) -> Tensor:
        """Return an entry at T + 1 steps ``[B, S, ...]``: the first root, then all under next."""
        return torch.cat([self.entry(key)[:, :1], self.entry(key, under_next=True)], 1)

    def action(self, space: ActionSpace) -> Tensor:
        """Return the actions taken as vectors ``[M, A]``."""
        action_M = self.steps.select(self.entry(self.keys.action), fill=0)
        if not self.is_checked:
            valid_M = space.contains(action_M) | ~self.steps.mask
            if not valid_M.all():
                raise ValueError(
                    f"{int((~valid_M).sum())} stored actions of the batch are outside of their "
                    f"{space.kind} space {tuple(space.sizes) or ''}, such as "
                    f"{action_M[~valid_M][0].tolist()}. Store actions as the policy gave them."
                )
        return space.to_vector(action_M)

    def terminated(self) -> Tensor:
        """Return the ends of trials ``[B, T, 1]``, False on padding."""
        terminated = self.entry(self.keys.terminated, under_next=True)
        return terminated.reshape(self.mask_BT1.shape) & self.mask_BT1

    def reward(self) -> Tensor:
        """Return rewards ``[B, T, 1]``, 0 on padding."""
        reward = self.entry(self.keys.reward, under_next=True)
        return torch.where(self.mask_BT1, reward.reshape(self.mask_BT1.shape), 0.0)

    def importance(self, use: bool | str) -> Tensor | None:
        """Return importance weights ``[M]``, or None; ``"auto"`` uses those that there are."""
        key = self.keys.priority_weight
        if not use or (use == "auto" and self.tensordict.get(key, None) is None):
            return None
        return self.steps.select(self.entry(key).reshape(self.tensordict.shape), fill=0)

    def _check_and_split(
        self, inputs: Sequence[NestedKey], compact: bool | None, reward_scale: float
    ) -> None:
        """Check the data and split rows of several trials, waiting for a GPU once."""
        given, mask, is_flat = self.given, self.steps.full_mask, self.given.ndim == 1
        marks = (self.keys.is_init, ("next", self.keys.done), keys.TRAJECTORY)
        begins_BT = trial_starts(mask, *(given.get(mark, None) for mark in marks))
        mask_BT = mask.reshape(begins_BT.shape)
        behind_BT = mask_BT[:, 1:] & ~mask_BT[:, :-1] & (not is_flat)
        reward = given.get(("next", self.keys.reward), None)
        scaled_BT = mask_BT.float() if reward is None else reward.reshape(mask_BT.shape)
        scaled_BT = scaled_BT * reward_scale
        is_large_BT = mask_BT & ~(scaled_BT.abs() <= LARGEST_REWARD)
        found = [given.get(("next", key), None) for key in inputs]
        found = [x for x in found if x is not None and x.is_floating_point()]
        # A sum sees every NaN, and more: what it finds is looked at step by step.
        suspicious = [~x.sum(dtype=torch.float32).isfinite() for x in found]
        flags = [mask_BT, behind_BT, is_large_BT, begins_BT[:, 1:], *suspicious]
        any_real, any_behind, any_large, any_begins, *any_suspicious = torch.stack(
            [flag.any() for flag in flags]
        ).tolist()
        if not any_real:
            warnings.warn(
                "every step of the batch is masked: the loss is zero and no statistic moves. "
                "Check the replay buffer's sampler.",
                stacklevel=3,
            )
        if any_behind:
            raise ValueError(
                "real steps of a row must come first and padding behind them, got "
                f"{int(behind_BT.any(1).sum())} of {len(mask_BT)} rows with a real step behind "
                "padding. Use make_trial_buffer(padding='right'), the default."
            )
        if any_large:
            raise ValueError(
                f"rewards times reward_scale={reward_scale:g} must be finite and within "
                f"+-{LARGEST_REWARD:g}, got {scaled_BT[is_large_BT][0]:g}. Lower reward_scale."
            )
        if any(any_suspicious):
            _check_nan(found, mask_BT)
        if any_begins or is_flat:
            self._index_RL, mask_RL = index_of_rows(begins_BT, mask_BT)
            self.tensordict = given.reshape(-1)[self._index_RL].set(self.keys.mask, mask_RL)
            self.steps = Steps(mask_RL, compact)


def _check_nan(inputs: Sequence[Tensor], mask_BT: Tensor) -> None:
    is_nan_BT = sum(x.isnan().reshape(*mask_BT.shape, -1).any(-1) for x in inputs) * mask_BT > 0
    if is_nan_BT.any():
        raise ValueError(
            f"next observations must not be NaN, got NaN under next at {int(is_nan_BT.sum())} of "
            f"{int(mask_BT.sum())} steps. TorchRL drops some: collect with compact_obs=False."
        )
