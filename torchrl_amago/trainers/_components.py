"""Intervals of a run, and the parts of its state, each with `state_dict` and `load_state_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchrl import logger as torchrl_logger
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import BaseCollector, Collector
from torchrl.data import ReplayBuffer

from torchrl_amago._validation import check_counts
from torchrl_amago.data import TrialReplayBuffer
from torchrl_amago.scaling import WorkerPool


@dataclass(frozen=True)
class Intervals:
    """Updates between rows of ``progress.csv``, evaluations and checkpoints.

    Example:
        >>> Intervals(log=100, checkpoint=1000)
        Intervals(log=100, evaluate=500, checkpoint=1000)
    """

    log: int = 50
    evaluate: int = 500
    checkpoint: int = 500

    def __post_init__(self) -> None:
        check_counts(**{f"{name}_interval": value for name, value in asdict(self).items()})


class Components(dict[str, Any]):
    """Parts by name, saved and loaded together, in order."""

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        for name, part in self.items():
            part.load_state_dict(state[name])


class Counts(SimpleNamespace):
    """Numbers that a run counts."""

    def state_dict(self) -> dict[str, int]:
        return dict(vars(self))

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        vars(self).update(state)


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
        scheduler, groups = self.scheduler, self.optimizer.param_groups
        rates = [group["lr"] for group in groups]
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


class Rollouts:
    """The collector with its trials in progress, and the global random generators.

    If the collector's state has ``in_progress``, a checkpoint leaves the trials alone, and the
    resumed run goes on with them. Otherwise every checkpoint ends them and seeds the environment
    with a number that it holds, in the uninterrupted run as in a resumed one.
    """

    def __init__(
        self, collector: BaseCollector, loss_module: nn.Module, replay_buffer: ReplayBuffer
    ) -> None:
        own, is_local = getattr(collector, "replay_buffer", None), isinstance(collector, Collector)
        writes_pieces = type(collector) is Collector and collector.trajs_per_batch is None
        if own is not replay_buffer or (writes_pieces and isinstance(own, TrialReplayBuffer)):
            raise ValueError(
                "the collector must write whole trials to the trainer's replay_buffer, got a "
                f"{type(collector).__name__} with replay_buffer={type(own).__name__}"
                f"{' and trajs_per_batch=None' if writes_pieces else ''}. "
                "Make it with TrialCollector(..., replay_buffer=replay_buffer)."
            )
        # On the loss's device a local collector runs the policy itself, elsewhere a copy of it.
        policy, device = getattr(collector, "policy", None), next(loss_module.parameters()).device
        weights = policy.parameters() if isinstance(policy, nn.Module) else ()
        self._has_own_policy = not is_local or any(p.device != device for p in weights)
        self.collector, self._is_local = collector, is_local
        # None where several processes write: then the buffer counts.
        self.frames_per_batch = collector.requested_frames_per_batch if is_local else None
        self._saved: Mapping[str, Any] = {}

    def sync_policy(self) -> None:
        """Copy the trained weights to the collector's own copies of the policy."""
        if self._has_own_policy:
            self.collector.update_policy_weights_()

    def start(self) -> bool:
        """Go on from the loaded checkpoint; return False if new trials begin instead."""
        saved = self._saved
        if not saved:
            return self._restart(_draw_seed(), self._collector_state())
        GlobalRNGState().load_state_dict(saved["random"])
        seed, problem = saved["seed"], "this collector cannot save them"
        if seed is None:
            try:
                self.collector.load_state_dict(saved["collector"], strict=False)
                return True
            except ValueError as error:
                seed, problem = _draw_seed(), str(error)
        torchrl_logger.info(f"the trials in progress at the checkpoint end here: {problem}")
        return self._restart(seed, saved["collector"])

    def capture(self) -> None:
        """Take the state for a checkpoint."""
        state = self._collector_state()
        seed = None if "in_progress" in state else _draw_seed()
        self._saved = {"seed": seed, "collector": state, "random": GlobalRNGState().state_dict()}

    def go_on(self) -> bool:
        """Go on after a checkpoint; return False if it ended the trials in progress."""
        # Collectors of several processes, whose runs are not exact, can't be reset while they run.
        if self._saved["seed"] is None or not self._is_local:
            return True
        return self._restart(self._saved["seed"], self._saved["collector"])

    def _restart(self, seed: int, collector: Mapping[str, Any]) -> Literal[False]:
        """Begin new trials, determined by ``seed`` and torch's generator; return False."""
        if env_state := collector.get("env_state_dict"):
            self.collector.env.load_state_dict(env_state)
        # The uninterrupted run loads them too: loading hands out new numbers of trials.
        if numbers := collector.keys() - {"env_state_dict", "in_progress"}:
            self.collector.load_state_dict({k: collector[k] for k in numbers}, strict=False)
        # Some environments seed torch's generator too, from which exploration draws its noise.
        rng = torch.get_rng_state()
        self.collector.set_seed(seed)
        torch.set_rng_state(rng)
        self.collector.reset()
        return False

    def _collector_state(self) -> dict[str, Any]:
        # The policy's weights are the loss's. Collectors of several processes start anew.
        has_state = self._is_local or isinstance(self.collector, WorkerPool)
        state = self.collector.state_dict() if has_state else {}
        return {key: value for key, value in state.items() if key != "policy_state_dict"}

    def state_dict(self) -> Mapping[str, Any]:
        return self._saved

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # `start` loads it: setting up a run may draw random numbers.
        self._saved = state


def _draw_seed() -> int:
    return int(torch.randint(2**31 - 1, ()))
