"""Intervals of a run, and the parts of its state, each with `state_dict` and `load_state_dict`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from torchrl import logger as torchrl_logger
from torchrl.checkpoint import GlobalRNGState
from torchrl.collectors import BaseCollector, Collector

from torchrl_amago._validation import check_counts
from torchrl_amago.data import TrialReplayBuffer
from torchrl_amago.scaling import WorkerPool
from torchrl_amago.trainers.hooks import TrialMonitor


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


class Rollouts:
    """The collector with its trials in progress, and the global random generators.

    If the collector's state has ``in_progress``, a checkpoint leaves the trials alone, and the
    resumed run goes on with them. Otherwise every checkpoint ends them and seeds the environment
    with the next number of torch's generator, in the uninterrupted run as in a resumed one.
    The monitor forgets trials that are ended, whose remaining steps will not be written.
    """

    def __init__(self, collector: BaseCollector, loss: nn.Module, monitor: TrialMonitor) -> None:
        own, is_local = getattr(collector, "replay_buffer", None), isinstance(collector, Collector)
        in_pieces = type(collector) is Collector and collector.trajs_per_batch is None
        if own is not monitor.replay_buffer or (in_pieces and isinstance(own, TrialReplayBuffer)):
            raise ValueError(
                "the collector must write whole trials to the trainer's replay_buffer, got a "
                f"{type(collector).__name__} with replay_buffer={type(own).__name__}"
                f"{' and trajs_per_batch=None' if in_pieces else ''}. "
                "Make it with TrialCollector(..., replay_buffer=replay_buffer)."
            )
        # On the loss's device a local collector runs the policy itself, elsewhere a copy of it.
        policy, device = getattr(collector, "policy", None), next(loss.parameters()).device
        weights = policy.parameters() if isinstance(policy, nn.Module) else ()
        self._has_own_policy = not is_local or any(p.device != device for p in weights)
        self.collector, self._is_local, self._monitor = collector, is_local, monitor
        # None where several processes write: then the buffer counts.
        self.frames_per_batch = collector.requested_frames_per_batch if is_local else None
        self._saved: Mapping[str, Any] = {}

    def sync_policy(self) -> None:
        """Copy the trained weights to the collector's own copies of the policy."""
        if self._has_own_policy:
            self.collector.update_policy_weights_()

    def begin(self) -> None:
        """Begin the first trials of a new run."""
        self._restart({})

    def resume(self) -> None:
        """Go on from the loaded checkpoint, in its trials if the collector can."""
        state, problem = self._saved["collector"], "this collector cannot save them"
        GlobalRNGState().load_state_dict(self._saved["random"])
        if "in_progress" in state:
            try:
                return self.collector.load_state_dict(state, strict=False)
            except ValueError as error:
                problem = str(error)
        torchrl_logger.info(f"the trials in progress at the checkpoint end here: {problem}")
        self._restart(state)

    def capture(self) -> None:
        """Take the state for a checkpoint."""
        # The policy's weights are the loss's. Collectors of several processes start anew.
        has_state = self._is_local or isinstance(self.collector, WorkerPool)
        state = dict(self.collector.state_dict()) if has_state else {}
        state.pop("policy_state_dict", None)
        self._saved = {"collector": state, "random": GlobalRNGState().state_dict()}

    def go_on(self) -> None:
        """Go on after a checkpoint as a resumed run does."""
        # Collectors of several processes, whose runs are not exact, can't be reset while they run.
        if self._is_local and "in_progress" not in self._saved["collector"]:
            self._restart(self._saved["collector"])

    def _restart(self, state: Mapping[str, Any]) -> None:
        """End the trials, and begin new ones, which torch's generator determines."""
        seed = int(torch.randint(2**31 - 1, ()))
        if env_state := state.get("env_state_dict"):
            self.collector.env.load_state_dict(env_state)
        # The uninterrupted run loads them too: loading hands out new numbers of trials.
        if numbers := state.keys() - {"env_state_dict", "in_progress"}:
            self.collector.load_state_dict({k: state[k] for k in numbers}, strict=False)
        # Some environments seed torch's generator too, from which exploration draws its noise.
        with torch.random.fork_rng(devices=[]):
            self.collector.set_seed(seed)
        self.collector.reset()
        self._monitor.forget_unfinished()

    def state_dict(self) -> Mapping[str, Any]:
        return self._saved

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        # `resume` loads it: setting up a run may draw random numbers.
        self._saved = state
