"""Rows of one trial each, from flat batches and from rows that hold several trials.

Legend: N steps, B rows, T steps of a row, R rows of one trial each, L steps of the longest.
"""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor

from torchrl_amago import keys


def split_trials(
    batch: TensorDictBase,
    *,
    mask_key: NestedKey = keys.MASK,
    is_init_key: NestedKey = keys.IS_INIT,
    end_key: NestedKey = ("next", "done"),
    trajectory_key: NestedKey = keys.TRAJECTORY,
) -> TensorDictBase:
    """Split consecutive steps into rows of one trial each, padded at their ends.

    A row is cut before a step where `is_init` is True or the trajectory's number changes, after one
    where `end_key` is True (which slice samplers set at the end of each slice), and around padding.
    An entry that is missing cuts nothing.

    Args:
        batch: ``[N]``, flat, or rows ``[B, T]``.
        mask_key: True on real steps; if missing, all are.
        is_init_key, end_key: True on the first and the last step of a trial or slice.
        trajectory_key: a number that differs between consecutive trials.

    Returns:
        ``[R, L]``, a copy, with the mask under `mask_key`. Padding repeats a row's last step. Rows
        keep the order of their first steps.

    Raises:
        ValueError: for another number of dimensions, or a flat batch in which nothing marks trials.

    Example:
        >>> from tensordict import TensorDict
        >>> flat = TensorDict({"x": torch.arange(5), "is_init": torch.zeros(5, 1).bool()}, [5])
        >>> flat["is_init"][2] = True
        >>> rows = split_trials(flat)
        >>> rows["x"].tolist(), rows["collector", "mask"].sum(1).tolist()
        ([[0, 1, 1], [2, 3, 4]], [2, 3])
    """
    if batch.ndim not in (1, 2):
        got = f"got {list(batch.shape)}. Use batch.reshape(-1, batch.shape[-1])."
        raise ValueError(f"a batch to split must be flat, [N], or rows of steps, [B, T], {got}")
    mask = batch.get(mask_key, None)
    if mask is None:
        mask = torch.ones(batch.shape, dtype=torch.bool, device=batch.device)
    marks = (batch.get(key, None) for key in (is_init_key, end_key, trajectory_key))
    is_start_BT = trial_starts(mask.reshape(batch.shape), *marks)
    index_RL, mask_RL = index_of_rows(is_start_BT, mask.reshape(is_start_BT.shape))
    return batch.reshape(-1)[index_RL].set(mask_key, mask_RL)


def trial_starts(
    mask: Tensor,
    is_init: Tensor | None = None,
    is_last: Tensor | None = None,
    trajectory: Tensor | None = None,
) -> Tensor:
    """Mark the first steps of trials, or of parts of them: bool ``[B, T]``, ``[1, N]`` if flat.

    The mask and marks are entries of a batch, see :func:`split_trials`.
    """
    if mask.ndim == 1 and is_init is None and is_last is None and trajectory is None:
        got = "got none of is_init, ('next', 'done') and ('collector', 'traj_ids')"
        raise ValueError(f"a flat batch must mark where trials start or end, {got}.")
    mask_BT = mask.reshape(-1, mask.shape[-1])
    cut_BT = ~mask_BT[:, :-1]
    if is_init is not None:
        cut_BT = cut_BT | is_init.reshape(mask_BT.shape)[:, 1:].bool()
    if is_last is not None:
        cut_BT = cut_BT | is_last.reshape(mask_BT.shape)[:, :-1].bool()
    if trajectory is not None:
        cut_BT = cut_BT | (trajectory.reshape(mask_BT.shape).diff(dim=1) != 0)
    return torch.cat([mask_BT[:, :1], mask_BT[:, 1:] & cut_BT], 1)


def index_of_rows(is_start_BT: Tensor, mask_BT: Tensor) -> tuple[Tensor, Tensor]:
    """Index each row's steps among all ``B T`` of them; return index and mask, both ``[R, L]``."""
    is_start_N, mask_N = is_start_BT.reshape(-1), mask_BT.reshape(-1)
    start_R = is_start_N.nonzero().squeeze(1)
    # Without any real step, there is one row of one step of padding.
    length_R = (is_start_N.cumsum(0)[mask_N] - 1).bincount(minlength=1)
    start_R1 = (start_R if len(start_R) else torch.zeros_like(length_R)).unsqueeze(1)
    length_R1 = length_R.unsqueeze(1)
    step_L = torch.arange(max(1, int(length_R.max())), device=mask_BT.device)
    return start_R1 + torch.minimum(step_L, (length_R1 - 1).clamp_min(0)), step_L < length_R1
