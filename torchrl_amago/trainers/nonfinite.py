"""NaN and infinity: found before they can reach the weights, named, and kept for inspection."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, is_tensor_collection
from torch import Tensor, nn

from torchrl_amago import keys

DUMP_FOLDER = "nonfinite_batch"


class NonFiniteError(RuntimeError):
    """NaN or infinity in data or loss. The weights have not been touched.

    `dump` is the batch's folder, for :meth:`tensordict.TensorDict.load_memmap`.
    """

    dump: Path | None = None


def _float_entries(batch: TensorDictBase) -> dict[NestedKey, Tensor]:
    entries = batch.items(include_nested=True, leaves_only=True)
    return {key: x for key, x in entries if isinstance(x, Tensor) and x.is_floating_point()}


def seems_finite(tensors: Iterable[Tensor]) -> bool:
    """Cheap test over many tensors: their sums, added up, are finite.

    NaN and infinity always survive a sum; so may an overflow of huge numbers.
    """
    total = sum(x.sum(dtype=torch.float32) for x in tensors)
    return bool(torch.isfinite(total)) if isinstance(total, Tensor) else True


def nonfinite_entries(batch: TensorDictBase, mask_key: NestedKey = keys.MASK) -> list[str]:
    """Describe each entry with NaN or infinity on real steps; padding may hold anything.

    Example:
        >>> from tensordict import TensorDict
        >>> nonfinite_entries(TensorDict(reward=torch.tensor([1.0, float("nan")]), batch_size=[2]))
        ["'reward' (1 of 2 steps)"]
    """
    mask = batch.get(mask_key, None)
    found = []
    for key, value in _float_entries(batch).items():
        is_bad = ~torch.isfinite(value)
        is_bad = is_bad.flatten(batch.ndim).any(-1) if is_bad.ndim > batch.ndim else is_bad
        if mask is not None:
            is_bad = is_bad & mask.reshape(is_bad.shape)
        if is_bad.any():
            steps = is_bad.numel() if mask is None else int(mask.sum())
            found.append(f"{key!r} ({int(is_bad.sum())} of {steps} steps)")
    return found


def check_data(batch: TensorDictBase, run_dir: Path, when: str) -> None:
    """Raise :class:`NonFiniteError` if real steps of ``batch`` hold NaN or infinity.

    ``("collector", "mask")`` tells real steps where it exists; ``when`` tells in the message where
    the batch came from.
    """
    if seems_finite(_float_entries(batch).values()):
        return
    found = nonfinite_entries(batch)
    if found:
        problem = f"{when} must be finite, but NaN or infinity is in {', '.join(found)}"
        raise _error(problem, batch, run_dir)


def stop_on_loss(
    losses: TensorDictBase, grad_norm: float, batch: TensorDictBase, run_dir: Path
) -> None:
    """Raise :class:`NonFiniteError` for a loss or gradient that is not finite."""
    named = {str(key): float(x) for key, x in losses.items() if x.numel() == 1}
    bad = [f"{key!r} ({value})" for key, value in named.items() if not math.isfinite(value)]
    if not bad:
        bad = [f"the gradients (norm {grad_norm})"]
    found = nonfinite_entries(batch)
    data = f"; in the batch: {', '.join(found)}" if found else "; the batch itself is finite"
    problem = f"losses and gradients must be finite, but not so: {', '.join(bad)}{data}"
    raise _error(problem, batch, run_dir)


@contextmanager
def blame_inputs(policy: Any, run_dir: Path) -> Iterator[None]:
    """Re-raise an error as NonFiniteError if the policy's last input was not finite.

    Sampling an action from NaN fails in many ways, before the rollout's data can be checked.
    """
    if not isinstance(policy, nn.Module):
        yield
        return
    shown: list[Any] = []

    def remember(_: nn.Module, arguments: tuple) -> None:
        shown[:] = arguments[:1]

    hook = policy.register_forward_pre_hook(remember)
    try:
        yield
    except Exception as error:
        found = nonfinite_entries(shown[0]) if shown and is_tensor_collection(shown[0]) else []
        if not found:
            raise
        problem = (
            f"what the policy sees must be finite, but NaN or infinity is in {', '.join(found)}"
        )
        raise _error(problem, shown[0], run_dir) from error
    finally:
        hook.remove()


def _error(problem: str, batch: TensorDictBase, run_dir: Path) -> NonFiniteError:
    dump = dump_batch(batch, run_dir / DUMP_FOLDER)
    error = NonFiniteError(
        f"{problem}. The weights were not changed. The batch is in {dump}: look at it with "
        "TensorDict.load_memmap(...), fix the environment or lower the learning rate, and resume "
        "from the last checkpoint."
    )
    error.dump = dump
    return error


def dump_batch(batch: TensorDictBase, path: Path) -> Path:
    """Write the tensors of ``batch`` to the folder ``path``, as memory maps and JSON (no pickle)."""
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    leaves = [
        key
        for key, x in batch.items(include_nested=True, leaves_only=True)
        if isinstance(x, Tensor)
    ]
    batch.select(*leaves).detach().cpu().contiguous().memmap(path, copy_existing=True)
    return path
