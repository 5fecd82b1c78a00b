"""Which steps end a trial."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor

_END_KEYS = ("done", "terminated", "truncated")


def trial_ends(steps: TensorDictBase) -> Tensor | None:
    """Whether each step is its trial's last, by any of the flags under ``next``.

    Args:
        steps: ``[N]``.

    Returns:
        bool ``[N]``; None where there is no flag.

    Example:
        >>> from tensordict import TensorDict
        >>> done = torch.tensor([[False], [True]])
        >>> trial_ends(TensorDict({"next": {"done": done}}, [2])).tolist()
        [False, True]
    """
    flags = [steps.get(("next", key), None) for key in _END_KEYS]
    flags = [flag.reshape(len(steps), -1).any(-1) for flag in flags if flag is not None]
    return torch.stack(flags).any(0) if flags else None
