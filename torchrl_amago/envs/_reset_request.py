"""A request to reset rows, as environments that repeat their tasks get it."""

from __future__ import annotations

from tensordict import TensorDictBase
from torch import Tensor


def read_reset_request(
    tensordict: TensorDictBase | None, repeat_task: bool | Tensor | None
) -> tuple[bool | Tensor, bool | Tensor]:
    """Return the rows to reset, and those of them that keep their task, if they have one.

    The argument ``repeat_task`` wins over the entry; without either tasks are new, and without
    ``"_reset"`` all rows are reset.
    """
    selected = None
    if tensordict is not None:
        selected = tensordict.get("_reset", None)
        if repeat_task is None:
            repeat_task = tensordict.get("repeat_task", None)
    return (True if selected is None else selected, False if repeat_task is None else repeat_task)
