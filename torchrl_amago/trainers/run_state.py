"""Everything a run is made of besides its replay: captured at a checkpoint, restored on resume."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import BaseCollector

from torchrl_amago.data.mixture import TrialMixture

if TYPE_CHECKING:
    from torchrl_amago.trainers.amago import AMAGOTrainer


def describe_architecture(
    modules: Mapping[str, nn.Module], optimizer: Optimizer | None = None
) -> dict[str, str]:
    """Shape and dtype of every parameter and buffer, and the size of every parameter group.

    Example:
        >>> describe_architecture({"net": nn.Linear(2, 1, bias=False)})
        {'net.weight': '1x2 float32'}
    """
    described = {
        f"{prefix}.{name}": f"{'x'.join(map(str, x.shape)) or 'scalar'} {str(x.dtype)[6:]}"
        for prefix, module in modules.items()
        for name, x in module.state_dict().items()
        if isinstance(x, torch.Tensor)
    }
    groups = [] if optimizer is None else optimizer.param_groups
    for number, group in enumerate(groups):
        described[f"optimizer.group_{number}"] = f"{len(group['params'])} parameters"
    return described


def architecture(trainer: AMAGOTrainer) -> dict[str, str]:
    """What a checkpoint must agree with to be loaded into this trainer."""
    modules = {"loss": trainer.loss_module}
    if trainer.exploration is not None:
        modules["exploration"] = trainer.exploration
    task = {f"task.{name}": str(value) for name, value in trainer.task.items()}
    return describe_architecture(modules, trainer.optimizer) | task


def capture(trainer: AMAGOTrainer, env_seed: int, collector: dict[str, Any]) -> dict[str, Any]:
    """The state of a run as a nested dict of tensors and plain values.

    Args:
        trainer: the run.
        env_seed: seed of the trials that begin after the checkpoint.
        collector: :func:`collector_state`.
    """
    exploration, buffer = trainer.exploration, trainer.replay_buffer
    return {
        "loss": trainer.loss_module.state_dict(),
        "optimizer": trainer.optimizer.state_dict(),
        "scheduler": trainer.scheduler.state_dict(),
        "exploration": {} if exploration is None else exploration.state_dict(),
        "collector": collector,
        "env_seed": env_seed,
        "rng": GlobalRNGState().state_dict(),
        "counters": trainer.counters(),
        "monitor": trainer.monitor.state_dict(),
        "report": trainer.report.state_dict(),
        "mixture": buffer.state_dict() if isinstance(buffer, TrialMixture) else {},
    }


def restore(trainer: AMAGOTrainer, state: Mapping[str, Any]) -> None:
    """Put back what :func:`capture` gave, except the report, generators and collector.

    The replay must be back already. The last two follow when training starts
    (:func:`restart_trials`): whatever is done in between may draw random numbers.
    """
    trainer.loss_module.load_state_dict(state["loss"])
    _restore_optimizer(trainer, state)
    if trainer.exploration is not None:
        trainer.exploration.load_state_dict(state["exploration"])
    trainer.set_counters(state["counters"])
    trainer.monitor.load_state_dict(state["monitor"])
    if isinstance(trainer.replay_buffer, TrialMixture):
        trainer.replay_buffer.load_state_dict(state["mixture"])


def _restore_optimizer(trainer: AMAGOTrainer, state: Mapping[str, Any]) -> None:
    """Moments and position in the schedule come back; the rates are this trainer's own.

    So a run that diverged can go on with a lower learning rate. With the same one, its rates are those
    that were saved.
    """
    optimizer, scheduler = trainer.optimizer, trainer.scheduler
    peaks = scheduler.base_lrs
    optimizer.load_state_dict(state["optimizer"])
    scheduler.load_state_dict(state["scheduler"])
    scheduler.base_lrs = peaks
    for group, peak, share in zip(optimizer.param_groups, peaks, scheduler.lr_lambdas, strict=True):
        group["initial_lr"], group["lr"] = peak, peak * share(scheduler.last_epoch)
    scheduler._last_lr = [group["lr"] for group in optimizer.param_groups]


def draw_seed() -> int:
    """A seed from torch's global generator."""
    return int(torch.randint(2**31 - 1, ()))


def collector_state(collector: BaseCollector) -> dict[str, Any]:
    """Counters (trial numbers are stored in the replay) and statistics of the transforms.

    Without the policy's weights: they are the loss's, and saved there; and without the trials under
    way, which end here.
    """
    state = collector.state_dict()
    left_out = ("policy_state_dict", "in_progress")
    return {key: value for key, value in state.items() if key not in left_out}


def restart_trials(collector: BaseCollector, seed: int, state: Mapping[str, Any]) -> None:
    """End the trials in progress; ``seed`` and torch's generator decide those that begin.

    The collector's numbers are always loaded, by the run that is going on as well: loading them
    hands out trial numbers, and both must hand out the same.
    """
    env_state = state.get("env_state_dict")
    if env_state:
        collector.env.load_state_dict(env_state)
    counters = {key: value for key, value in state.items() if key != "env_state_dict"}
    collector.load_state_dict(counters, strict=False)
    # Some environments seed torch's generator too, from which exploration draws its noise.
    rng = torch.get_rng_state()
    collector.set_seed(seed)
    torch.set_rng_state(rng)
    collector.reset()
