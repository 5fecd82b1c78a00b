"""One optimiser step, which changes nothing unless everything is finite."""

from __future__ import annotations

import contextlib
import math
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDictBase
from torch import nn
from torch.optim import Optimizer
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import OptimizationStepper

from torchrl_amago.choice import check_choice
from torchrl_amago.trainers.nonfinite import check_data, stop_on_loss
from torchrl_amago.trainers.optim import parameters_of


class FiniteOptimizationStepper(OptimizationStepper):
    """Loss, backward, clipping and optimiser step; nothing changes if anything is not finite.

    The entries of the loss whose names begin with ``loss`` are added up. The batch is checked
    before the forward (which updates running statistics), loss and gradient norm before the step.
    The norm's check reads one number from the device: the only synchronisation of an update.

    :class:`~torchrl_amago.trainers.AMAGOTrainer` calls :meth:`update`; a stock
    :class:`torchrl.trainers.Trainer` takes the stepper as ``optimization_stepper`` and calls
    :meth:`step`.

    Args:
        clip_norm: largest gradient norm, more than 0; None for no clipping.
        precision: ``"bf16"`` computes forward and loss in bfloat16 where autocast says so; weights
            stay as they are.
        dump_dir: folder for a batch that has to be looked at; the trainer's ``run_dir`` by default.

    Raises:
        ValueError: for a norm that is not positive, or an unknown precision.

    Example:
        >>> from tensordict import TensorDict
        >>> class Square(nn.Linear):
        ...     def forward(self, batch):
        ...         return TensorDict(loss_square=super().forward(batch["x"]).square().mean())
        >>> loss = Square(2, 1)
        >>> optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
        >>> stepper = FiniteOptimizationStepper(clip_norm=1.0)
        >>> metrics = stepper.update(loss, optimizer, TensorDict(x=torch.ones(3, 2), batch_size=3))
        >>> sorted(metrics.keys())
        ['grad_norm', 'grad_norm_other', 'loss_square']
    """

    updates_replay_priority = True

    def __init__(
        self,
        clip_norm: float | None = 1.0,
        precision: Literal["fp32", "bf16"] = "fp32",
        dump_dir: str | Path | None = None,
    ) -> None:
        check_choice("precision", precision, ("fp32", "bf16"))
        # `not >`, since NaN is neither.
        if clip_norm is not None and not clip_norm > 0:
            raise ValueError(
                f"clip_norm must be larger than 0, got {clip_norm}. It is the largest norm that a "
                "gradient keeps; None does not clip."
            )
        self.clip_norm, self.precision = clip_norm, precision
        self.dump_dir = None if dump_dir is None else Path(dump_dir)
        self._optimizer: Optimizer | None = None
        self._parameters: list[nn.Parameter] = []
        self._parts: dict[str, list[nn.Parameter]] = {}

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """Make one update for a stock trainer, which runs the hooks around it."""
        batch = self.prepare(sub_batch, trainer.loss_module)
        metrics = self.update(trainer.loss_module, trainer.optimizer, batch)
        if trainer.replay_buffer is not None:
            update_priorities(trainer.replay_buffer, batch)
        return metrics

    def prepare(self, batch: TensorDictBase, loss_module: nn.Module) -> TensorDictBase:
        """Check a batch, and move it to the device of the loss.

        Raises:
            NonFiniteError: for NaN or infinity in real steps.
        """
        check_data(batch, self._dump_dir, "observations and rewards of a training batch")
        device = next(loss_module.parameters()).device
        return batch if device.type == "cpu" else batch.to(device)

    def update(
        self, loss_module: nn.Module, optimizer: Optimizer, batch: TensorDictBase
    ) -> TensorDictBase:
        """Make one update; return losses, metrics and gradient norms, detached scalars.

        Raises:
            NonFiniteError: for NaN or infinity in loss or gradient; the weights stay as they were.
        """
        if self._optimizer is not optimizer:
            self._optimizer, self._parameters = optimizer, list(parameters_of(optimizer))
            self._parts = _by_network(loss_module, self._parameters)
        with self._autocast():
            losses = loss_module(batch)
        total = sum(value for key, value in losses.items() if key.startswith("loss"))
        total.backward()
        metrics = _scalars(losses.detach(), loss_module)
        norms = {
            part: torch.nn.utils.get_total_norm(gradients)
            for part, parameters in self._parts.items()
            if (gradients := [p.grad for p in parameters if p.grad is not None])
        }
        norm = torch.stack([*norms.values()]).norm()
        checked, grad_norm = torch.stack([total.detach().float() + norm, norm]).tolist()
        if not math.isfinite(checked):
            optimizer.zero_grad()
            stop_on_loss(metrics, grad_norm, batch, self._dump_dir)
        # As clip_grad_norm_, which also multiplies where there is nothing to clip.
        if self.clip_norm is not None and grad_norm + 1e-6 > self.clip_norm:
            torch.nn.utils.clip_grads_with_norm_(self._parameters, self.clip_norm, norm)
        optimizer.step()
        optimizer.zero_grad()
        metrics.update({f"grad_norm_{part}": value for part, value in norms.items()})
        return metrics.set("grad_norm", norm)

    @property
    def _dump_dir(self) -> Path:
        return Path() if self.dump_dir is None else self.dump_dir

    def _autocast(self) -> contextlib.AbstractContextManager:
        if self.precision == "fp32":
            return contextlib.nullcontext()
        return torch.autocast(self._parameters[0].device.type, dtype=torch.bfloat16)


def update_priorities(replay_buffer: Any, batch: TensorDictBase) -> None:
    """Tell a buffer that draws by priority the errors that the loss has put into a batch."""
    if "priority_weight" in batch.keys() and hasattr(  # noqa: SIM118 - not a dict
        replay_buffer, "update_tensordict_priority"
    ):
        replay_buffer.update_tensordict_priority(batch)
    elif "priority_weight" in batch.keys():  # noqa: SIM118
        replay_buffer.update_priority(batch)


def _by_network(
    loss_module: nn.Module, parameters: list[nn.Parameter]
) -> dict[str, list[nn.Parameter]]:
    """Group the optimised parameters by the network they belong to."""
    parts: dict[str, list[nn.Parameter]] = {}
    optimised = set(parameters)
    for name, p in loss_module.named_parameters():
        if p in optimised:
            optimised.remove(p)
            part = name.partition("_network_params")[0] if "_network_params" in name else "other"
            parts.setdefault(part, []).append(p)
    if optimised:
        parts.setdefault("other", []).extend(optimised)
    return parts


def _scalars(losses: TensorDictBase, loss_module: nn.Module) -> TensorDictBase:
    """Keep scalars; a loss that reports values of every discount has one for each of them."""
    q_value_G = losses.pop("per_discount", {}).get("q_value", None)
    if q_value_G is not None:
        named = zip(loss_module.discounts.tolist(), q_value_G.unbind(), strict=True)
        losses.update({f"q_value/{discount:g}": value for discount, value in named})
    return losses.select(*[key for key, value in losses.items() if value.numel() == 1])
