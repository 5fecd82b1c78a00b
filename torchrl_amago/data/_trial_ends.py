"""Ends of trials, read from the flags under ``next``."""

from __future__ import annotations

import torch
from tensordict import TensorDictBase
from torch import Tensor


def trial_ends(steps: TensorDictBase) -> Tensor | None:
    """Find the steps ``[N]`` that end their trial: bool ``[N]``, or None without any flag."""
    flags = [steps.get(("next", key), None) for key in ("done", "terminated", "truncated")]
    flags = [flag.reshape(len(steps), -1).any(-1) for flag in flags if flag is not None]
    return torch.stack(flags).any(0) if flags else None


def known_ends(steps: TensorDictBase) -> Tensor:
    """Find the steps ``[N]`` that end their trial; ValueError unless flags mark them."""
    ends = trial_ends(steps) if steps.ndim == 1 else None
    if ends is None:
        raise ValueError(
            "a write must be the steps [N] of whole trials with a flag 'done', 'terminated' or "
            f"'truncated' under 'next', got steps {[*steps.shape]} with "
            f"{sorted(map(str, steps.keys(True, True)))}. "
            "Use TrialCollector, or Collector(..., trajs_per_batch=1)."
        )
    return ends


def trial_lengths(steps: TensorDictBase) -> list[int]:
    """Return lengths of trials side by side; ValueError for steps after the last end."""
    last = known_ends(steps).nonzero().squeeze(-1)
    open_steps = len(steps) - 1 - (int(last[-1]) if len(last) else -1)
    if open_steps:
        raise ValueError(
            f"a write must end with the end of a trial, got {open_steps} steps after the last one "
            "that is done. Write trials when they are complete; for pieces of endless ones give "
            "lengths=, or use TrialCollector(fragment_length=...)."
        )
    return torch.diff(last, prepend=last.new_tensor([-1])).tolist()
