"""NaN and infinity: found before they reach the weights, named, and kept for inspection."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase, is_tensor_collection
from torch import Tensor, nn

from torchrl_amago import keys
from torchrl_amago.scaling.ranks import Ranks


class NonFiniteError(RuntimeError):
    """NaN or infinity in data or loss; the weights have not been changed.

    `dump` is the folder of the batch, for :meth:`tensordict.TensorDict.load_memmap`. A nearly full
    disk has none.
    """

    def __init__(self, problem: str, batch: TensorDictBase, run_dir: str | Path) -> None:
        self.dump = Path(run_dir) / "nonfinite_batch"
        shutil.rmtree(self.dump, ignore_errors=True)
        self.dump.parent.mkdir(parents=True, exist_ok=True)
        # Tensors only, as memory maps and JSON: other entries would be pickled.
        tensors = batch.filter_non_tensor_data().detach().cpu().contiguous()
        where = f"There is no room for the batch in {self.dump}"
        # Writing mapped files on a full disk would end the process.
        if shutil.disk_usage(run_dir).free > 2 * tensors.bytes() + (1 << 20):
            tensors.memmap(self.dump, copy_existing=True)
            where = f"The batch is in {self.dump}: look at it with TensorDict.load_memmap(...)"
        super().__init__(
            f"{problem}. The weights were not changed. {where}. Fix the environment or lower the "
            "learning rate, and resume from the last checkpoint."
        )


def _floats(batch: TensorDictBase) -> dict[NestedKey, Tensor]:
    entries = batch.items(include_nested=True, leaves_only=True)
    return {key: x for key, x in entries if isinstance(x, Tensor) and x.is_floating_point()}


def nonfinite_entries(batch: TensorDictBase) -> str:
    """Describe each entry with NaN or infinity on the steps of ``("collector", "mask")``."""
    mask, found = batch.get(keys.MASK, None), []
    for key, value in _floats(batch).items():
        is_bad = ~value.isfinite().unsqueeze(-1).flatten(batch.ndim).all(-1)
        is_step = torch.ones_like(is_bad) if mask is None else mask.reshape(is_bad.shape)
        if bad := int((is_bad & is_step).sum()):
            found.append(f"{key!r} ({bad} of {int(is_step.sum())} steps)")
    return ", ".join(found)


def check_data(batch: TensorDictBase, run_dir: Path, name: str, ranks: Ranks = Ranks()) -> float:
    """Return a rank's fraction of all real steps; raise NonFiniteError for NaN or infinity."""
    # Cheap: NaN and infinity survive a sum. So may an overflow, which is looked at entry by entry.
    total = sum(x.sum(dtype=torch.float32) for x in _floats(batch).values())
    found = "" if math.isfinite(total) else nonfinite_entries(batch)
    fraction, found = ranks.weigh(batch, found)
    if found:
        problem = f"{name} must be finite, but NaN or infinity is in {found}"
        raise NonFiniteError(problem, batch, run_dir)
    return fraction


def describe_loss(losses: TensorDictBase, grad_norm: float, batch: TensorDictBase) -> str:
    """Describe a loss or gradient that is not finite, for :class:`NonFiniteError`."""
    named = {str(key): float(x) for key, x in losses.items() if x.numel() == 1}
    bad = ", ".join(f"{key!r} ({x})" for key, x in named.items() if not math.isfinite(x))
    bad, found = bad or f"the gradients (norm {grad_norm})", nonfinite_entries(batch)
    data = f"in the batch: {found}" if found else "the batch itself is finite"
    return f"losses and gradients must be finite, but not so: {bad}; {data}"


@contextmanager
def explain_nonfinite_inputs(policy: Any, run_dir: Path) -> Iterator[None]:
    """Raise :class:`NonFiniteError` for an error after an input of the policy that is not finite.

    Sampling an action from NaN fails in many ways, before the rollout's data can be checked.
    """
    hook, inputs = nullcontext(), {"last": None}
    if isinstance(policy, nn.Module):
        hook = policy.register_forward_pre_hook(lambda _, x: inputs.update(last=x and x[0]))
    with hook:
        try:
            yield
        except Exception as error:
            last = inputs["last"]
            if is_tensor_collection(last) and (found := nonfinite_entries(last)):
                problem = f"the policy's inputs must be finite, but NaN or infinity is in {found}"
                raise NonFiniteError(problem, last, run_dir) from error
            raise
