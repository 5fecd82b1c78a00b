"""AdamW, its schedule, and an optimiser step that changes nothing unless everything is finite."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from tensordict import TensorDict, TensorDictBase
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchrl.trainers import OptimizationStepper, Trainer

from torchrl_amago import keys
from torchrl_amago._cpu import reads_are_free
from torchrl_amago._validation import check_choice, check_counts, check_fractions, check_positive
from torchrl_amago.scaling import CudaGraphs, Ranks
from torchrl_amago.trainers.nonfinite import NonFiniteError, check_data, describe_loss

# Parts of parameter names that are shifts or scales, of any number of dimensions: biases of an
# ensemble are [C, out], scales of attention heads [H, 1, 1], Mamba's log decays [channels, states].
_SHIFTS_AND_SCALES = ("bias", "gain", "gamma", "scale", "a_log")


def is_decayed(name: str, parameter: nn.Parameter) -> bool:
    """Return True for parameters of at least 2 dimensions that are no shift or scale by name."""
    last = name.rpartition(".")[2].lower()
    return parameter.ndim >= 2 and not any(word in last for word in _SHIFTS_AND_SCALES)


def make_optimizer(
    loss_module: nn.Module,
    learning_rate: float = 1e-4,
    weight_decay: float = 1e-3,
    *,
    decay_all: bool = False,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
) -> AdamW:
    """Make an AdamW over every parameter of ``loss_module`` that requires a gradient.

    It is the fused one, which takes a fifth of the others' time for many small tensors on a CPU.

    Args:
        learning_rate: 1e-4 is AMAGO's (arXiv 2310.09971, Table 2).
        weight_decay: of weights; norms, biases, gains and scales don't decay.
        decay_all: decay every parameter, as the public AMAGO code does.

    Example:
        >>> optimizer = make_optimizer(nn.Linear(3, 2), learning_rate=3e-4)
        >>> [(group["weight_decay"], len(group["params"])) for group in optimizer.param_groups]
        [(0.001, 1), (0.0, 1)]
    """
    check_positive("1e-4 is AMAGO's.", learning_rate=learning_rate)
    if weight_decay != 0:
        check_positive("0 is for none.", weight_decay=weight_decay)
    groups: dict[float, list[nn.Parameter]] = {weight_decay: []}
    for name, p in loss_module.named_parameters():
        if p.requires_grad:
            decay = weight_decay if decay_all or is_decayed(name, p) else 0.0
            groups.setdefault(decay, []).append(p)
    filled = [{"params": params, "weight_decay": d} for d, params in groups.items() if params]
    return AdamW(filled, lr=learning_rate, betas=betas, eps=eps, fused=True)


def make_schedule(
    optimizer: Optimizer, warmup_updates: int, total_updates: int = 1, final_fraction: float = 1.0
) -> LambdaLR:
    """Make a schedule that rises linearly to the optimiser's learning rate, then falls linearly.

    Args:
        warmup_updates: updates of the rise, from 1/n of the peak to all of it; 0 for none.
        total_updates: update at which ``final_fraction`` is reached, and kept from then on.
        final_fraction: fraction of the peak at the end, in [0, 1]; 1 for no fall.

    Example:
        >>> schedule = make_schedule(make_optimizer(nn.Linear(1, 1), learning_rate=8.0), 4)
        >>> schedule.get_last_lr()[0]
        2.0
    """
    check_fractions("1 keeps the rate constant.", final_fraction=final_fraction)
    if warmup_updates != 0:
        check_counts("0 is for none.", warmup_updates=warmup_updates)

    def fraction(update: int) -> float:
        if update < warmup_updates:
            return (update + 1) / warmup_updates
        done = min(1.0, (update - warmup_updates) / max(1, total_updates - warmup_updates))
        return 1.0 + done * (final_fraction - 1.0)

    return LambdaLR(optimizer, fraction)


class OptimizerState:
    """Optimiser moments and the position in the learning-rate schedule.

    Learning rates are not restored: a run that diverged can go on with a lower one.
    """

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler

    def state_dict(self) -> dict[str, Any]:
        scheduler = {} if self.scheduler is None else self.scheduler.state_dict()
        return {"optimizer": self.optimizer.state_dict(), "scheduler": scheduler}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        scheduler, rates = self.scheduler, [group["lr"] for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(scheduler, LambdaLR):
            scheduler.load_state_dict({**state["scheduler"], "base_lrs": scheduler.base_lrs})
            pairs = zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
            rates = [rate * factor(scheduler.last_epoch) for rate, factor in pairs]
            scheduler._last_lr = rates
        elif scheduler is not None:
            scheduler.load_state_dict(state["scheduler"])
            return  # the rates of other schedules can't be recomputed
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate


@dataclass(eq=False, repr=False)
class FiniteOptimizationStepper(OptimizationStepper):
    """Update with clipped gradients that raises on NaN or infinity before anything changes.

    The sum of the loss's outputs whose names begin with ``loss`` is minimised, the others are
    metrics. The batch is checked before the forward, which updates running statistics. With a fused
    AdamW, all is queued on a GPU before the host looks at a number. A stock
    :class:`torchrl.trainers.Trainer` takes it as ``optimization_stepper``.

    Args:
        clip_norm: largest gradient norm; None for no clipping.
        clip_each: bound the norm of encoder, actor and critics each, rather than that of all. A
            large gradient of the encoder then doesn't slow the others down, which otherwise leaves
            the fit of rising values to the encoder.
        precision: ``"bf16"`` computes forward and loss under bfloat16 autocast.
        compile: compile loss and gradients as one function, and replay whole updates as CUDA graphs
            on a GPU. Batches should have few shapes, as with ``trim_padding=64``.
        dump_dir: folder for a batch with NaN; by default the trainer's ``run_dir``.

    Example:
        >>> from types import SimpleNamespace
        >>> from tensordict import TensorDict
        >>> from tensordict.nn import TensorDictModule as Module, TensorDictSequential
        >>> mean = Module(torch.mean, ["y"], ["loss_y"])
        >>> loss = TensorDictSequential(Module(nn.Linear(2, 1), ["x"], ["y"]), mean)
        >>> parts = {"loss_module": loss, "optimizer": make_optimizer(loss), "replay_buffer": None}
        >>> batch = TensorDict(x=torch.ones(2))  # gradients: 1 for each weight, and for the bias
        >>> FiniteOptimizationStepper().step(SimpleNamespace(**parts), batch)["grad_norm"]
        tensor(1.7321)
    """

    clip_norm: float | None = 1.0
    precision: Literal["fp32", "bf16"] = "fp32"
    dump_dir: str | Path | None = None
    _: KW_ONLY
    clip_each: bool = False
    compile: bool = False
    updates_replay_priority = True  # read by TorchRL's trainer

    def __post_init__(self) -> None:
        check_choice("precision", self.precision, ("fp32", "bf16"))
        if self.clip_norm is not None:
            check_positive("None does not clip.", clip_norm=self.clip_norm)
        self._state: Mapping | None = None  # of the optimiser that `_prepare` has seen

    def step(self, trainer: Trainer, sub_batch: TensorDictBase) -> TensorDictBase:
        """Make one update; return losses, metrics and gradient norms, detached scalars."""
        optimizer, loss_module = trainer.optimizer, trainer.loss_module
        ranks, fraction = getattr(trainer, "ranks", Ranks()), 1.0
        is_checked = sub_batch.get(keys.CHECKED, None) is not None
        if ranks.size > 1 or not is_checked:
            fraction = self.check(sub_batch, ranks)
        if self.compile and not is_checked and hasattr(loss_module, "check"):
            sub_batch = loss_module.check(sub_batch)  # compiled code checks nothing
        # A graph holds the addresses of the optimiser's state, of which loading makes another.
        if self._state is not optimizer.state:
            self._prepare(loss_module, optimizer, self.compile and ranks.size == 1)
        batch = sub_batch if self._device.type == "cpu" else sub_batch.to(self._device)
        for group, rate in zip(optimizer.param_groups, self._rates, strict=False):
            group["lr"] = rate.fill_(group["lr"])
        metrics, norms, is_finite, priorities = self._run(batch, ranks, fraction)
        if priorities is not None:  # a graph writes to a batch of its own
            batch.set(self._priority_key, priorities)
        if not is_finite:  # the one look at the device
            problem = describe_loss(metrics, float(norms["grad_norm"]), batch)
            raise NonFiniteError(problem, batch, self.dump_dir or ".")
        buffer = trainer.replay_buffer
        if buffer is not None and "priority_weight" in batch.keys():  # noqa: SIM118
            stock = getattr(buffer, "update_tensordict_priority", None)
            for part in ranks.gather_errors(batch, buffer):
                (stock or buffer.update_priority)(part)
        return metrics.update(norms)

    def check(self, batch: TensorDictBase, ranks: Ranks = Ranks()) -> float:
        """Return a rank's fraction of real steps; raise NonFiniteError for NaN or infinity."""
        folder = Path(self.dump_dir or ".")
        return check_data(batch, folder, "observations and rewards of a training batch", ranks)

    def _prepare(self, loss_module: nn.Module, optimizer: Optimizer, compile: bool) -> None:
        """Read the parameters of a loss and an optimiser, and compile their updates."""
        self._loss, self._optimizer, self._state = loss_module, optimizer, optimizer.state
        names = {p: name for name, p in loss_module.named_parameters()}
        self._networks: dict[str, list[nn.Parameter]] = {}
        for p in (p for group in optimizer.param_groups for p in group["params"]):
            network, is_network, _ = names.get(p, "").partition("_network_params")
            self._networks.setdefault(network if is_network else "other", []).append(p)
        self._device = p.device
        named = getattr(loss_module, "tensor_keys", None)
        self._priority_key = getattr(named, "priority", "td_error")
        self._gradients, self._run, self._rates = self.gradients, self._update, []
        if compile:
            # Else gradients would split the function into two graphs.
            in_one = torch._dynamo.config.patch(trace_autograd_ops=True)
            self._gradients = in_one(torch.compile(self.gradients))
        if compile and CudaGraphs.serve(p):
            self._run = CudaGraphs(self._update)
            for group in optimizer.param_groups:  # tensors: a new learning rate records nothing
                self._rates.append(torch.zeros((), device=p.device))
                group["capturable"] = True

    def gradients(self, batch: TensorDictBase, fraction: float) -> tuple[TensorDict, dict]:
        """Compute losses and metrics, and the gradient of a fraction of the losses by parameter."""
        params = [p for params in self._networks.values() for p in params if p.requires_grad]
        with torch.autocast(self._device.type, torch.bfloat16, enabled=self.precision == "bf16"):
            losses = self._loss(batch)
        found = torch.autograd.grad(fraction * _total(losses), params, allow_unused=True)
        return losses.detach(), dict(zip(params, found, strict=True))

    def _update(self, batch: TensorDictBase, ranks: Ranks, fraction: float) -> tuple[Any, ...]:
        """Make an update, unless loss or norm are not finite, without a look at the device.

        Return metrics, gradient norms by name, whether they are finite, and new priorities.
        """
        optimizer, limit, norms = self._optimizer, self.clip_norm, {}
        metrics, gradients = self._gradients(batch, fraction)
        for p, gradient in gradients.items():
            # The optimiser reads both in the order of memory.
            p.grad = None if gradient is None else gradient.contiguous()
        metrics = ranks.sum_gradients(optimizer, metrics, fraction)
        for name, params in self._networks.items():
            if found := [p.grad for p in params if p.grad is not None]:
                norms[name] = nn.utils.get_total_norm(found)
        norm = torch.stack([*norms.values()]).norm()
        if limit is not None and not (reads_are_free(norm) and norm + 1e-6 <= limit):
            for name, of_network in norms.items():
                bounded = of_network if self.clip_each else norm
                nn.utils.clip_grads_with_norm_(self._networks[name], limit, bounded)
        is_finite = (_total(metrics).float() + norm).isfinite()
        if optimizer.defaults.get("fused"):  # its kernel looks at this itself
            optimizer.found_inf = (~is_finite).float()
            optimizer.step()
            del optimizer.found_inf  # it would stop later steps, too, that are made elsewhere
        elif is_finite:
            optimizer.step()
        optimizer.zero_grad()
        named = {f"grad_norm_{name}": value for name, value in norms.items()} | {"grad_norm": norm}
        return metrics, named, is_finite, batch.get(self._priority_key, None)


def _total(losses: TensorDictBase) -> Tensor:
    """Sum the entries whose names begin with ``loss``; the others are metrics."""
    return sum(value for key, value in losses.items() if key.startswith("loss"))
