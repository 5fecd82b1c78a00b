"""The parts of a run's state: each has `state_dict` and `load_state_dict`, saved by one loop."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler
from torchrl import logger as torchrl_logger
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import BaseCollector, Collector


class Components(dict[str, Any]):
    """Parts by name, saved and loaded together, in order."""

    def __init__(self, **parts: Any) -> None:
        for name, part in parts.items():
            if not (hasattr(part, "state_dict") and hasattr(part, "load_state_dict")):
                raise TypeError(
                    "a component must have state_dict() and load_state_dict(state), got "
                    f"{name}={type(part).__name__}. Wrap it in an object that has both."
                )
        super().__init__(parts)

    def state_dict(self) -> dict[str, Any]:
        return {name: part.state_dict() for name, part in self.items()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Load every part; ValueError if other parts were saved."""
        if state.keys() != self.keys():
            raise ValueError(
                f"a run goes on with the parts it was saved with, {sorted(state)}; got "
                f"{sorted(self)}. Make the trainer with the arguments of that run."
            )
        for name, part in self.items():
            part.load_state_dict(state[name])


@dataclass
class Counts:
    """How far a run is."""

    updates: int = 0
    frames: int = 0
    updates_left: int = 0
    """Updates of the round under way that are still to come."""
    evaluated_at: int = -1

    def state_dict(self) -> dict[str, int]:
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        vars(self).update(state)


class Optimisation:
    """Optimiser and learning-rate schedule.

    Moments and the position in the schedule come back; the rates are this run's own, so that one that
    diverged can go on with a lower learning rate.
    """

    def __init__(self, optimizer: Optimizer, scheduler: LRScheduler | None) -> None:
        self.optimizer, self.scheduler = optimizer, scheduler

    def state_dict(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer.state_dict(),
            "scheduler": {} if self.scheduler is None else self.scheduler.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        scheduler, saved = self.scheduler, dict(state["scheduler"])
        groups, names = self.optimizer.param_groups, ("lr", "initial_lr")
        own = [{name: group[name] for name in names if name in group} for group in groups]
        self.optimizer.load_state_dict(state["optimizer"])
        if isinstance(scheduler, LambdaLR):
            factors = [factor(saved["last_epoch"]) for factor in scheduler.lr_lambdas]
            rates = [x * factor for x, factor in zip(scheduler.base_lrs, factors, strict=True)]
            saved |= {"base_lrs": scheduler.base_lrs, "_last_lr": rates}
            own = [values | {"lr": rate} for values, rate in zip(own, rates, strict=True)]
        elif scheduler is not None:
            own = []  # of other schedules nothing is known but their state
        if scheduler is not None:
            scheduler.load_state_dict(saved)
        for group, values in zip(self.optimizer.param_groups, own, strict=False):
            group.update(values)


class Rollouts:
    """The collector with its trials in progress, and the global generators that they draw from.

    Where the collector's state has ``in_progress``, a checkpoint leaves trials alone and the resumed
    run goes on with them. Otherwise every checkpoint ends them: the environment is seeded with a
    number that is part of the checkpoint, in the run that goes on as in one that resumes.
    """

    def __init__(self, collector: BaseCollector) -> None:
        self.collector = collector
        self._saved: dict[str, Any] = {}
        self._resumed: Mapping[str, Any] | None = None

    def begin(self) -> None:
        """Start the trials of a new run, or those after a checkpoint."""
        state = self._resumed
        if state is None:
            self._restart(_draw_seed(), self._state())
            return
        GlobalRNGState().load_state_dict(state["random"])
        if state["seed"] is not None:
            torchrl_logger.info("the trials in progress ended: this collector cannot save them")
            self._restart(state["seed"], state["collector"])
            return
        try:
            self.collector.load_state_dict(state["collector"], strict=False)
        except ValueError as error:
            torchrl_logger.info(f"the trials in progress at the checkpoint end here: {error}")
            self._restart(_draw_seed(), state["collector"])

    def prepare(self) -> None:
        """Take the state of a checkpoint."""
        state = self._state()
        seed = None if "in_progress" in state else _draw_seed()
        random = GlobalRNGState().state_dict()
        self._saved = {"seed": seed, "collector": state, "random": random}

    def proceed(self) -> bool:
        """Go on after a checkpoint; return False if trials in progress have ended."""
        if self._saved["seed"] is None:
            return True
        self._restart(self._saved["seed"], self._saved["collector"])
        return False

    def _restart(self, seed: int, collector: Mapping[str, Any]) -> None:
        """End the trials in progress; ``seed`` and torch's generator decide those that begin."""
        if collector:
            env_state = collector.get("env_state_dict")
            if env_state:
                self.collector.env.load_state_dict(env_state)
            # Loaded by the run that goes on as well: that hands out trial numbers.
            others = ("env_state_dict", "in_progress")
            numbers = {key: value for key, value in collector.items() if key not in others}
            self.collector.load_state_dict(numbers, strict=False)
        # Some environments seed torch's generator too, from which exploration draws its noise.
        rng = torch.get_rng_state()
        self.collector.set_seed(seed)
        torch.set_rng_state(rng)
        self.collector.reset()

    def _state(self) -> dict[str, Any]:
        # The policy's weights are the loss's. Collectors of several processes start anew.
        if not isinstance(self.collector, Collector):
            return {}
        state = self.collector.state_dict()
        return {key: value for key, value in state.items() if key != "policy_state_dict"}

    def state_dict(self) -> dict[str, Any]:
        return self._saved

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Remember a state for :meth:`begin`: what sets up a run may draw random numbers."""
        self._resumed = state


def _draw_seed() -> int:
    return int(torch.randint(2**31 - 1, ()))
