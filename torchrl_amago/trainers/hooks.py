"""Hooks of a stock :class:`torchrl.trainers.Trainer`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from tensordict import TensorDictBase
from torchrl.checkpoint import GlobalRNGState
from torchrl.trainers import Trainer, TrainerHookBase

from torchrl_amago.evaluation import TrialResults
from torchrl_amago.trainers.report import evaluation_metrics


class EvaluationHook(TrainerHookBase):
    """Evaluates every few collected batches, without a trace in the training's random numbers.

    Args:
        evaluator: called without arguments; gives named numbers or ``TrialResults``.
        interval: collected batches between evaluations.

    Example:
        >>> hook = EvaluationHook(lambda: {"score": 1}, interval=2)
        >>> hook(), hook()
        (None, {'eval/score': 1.0})
    """

    def __init__(
        self, evaluator: Callable[[], Mapping[str, float] | TrialResults], interval: int = 1
    ) -> None:
        self.evaluator, self.interval, self._batches = evaluator, interval, 0

    def register(self, trainer: Trainer, name: str = "evaluation") -> None:
        """Evaluate after the updates of a batch, and log with the trainer."""
        trainer.register_op("post_steps_log", self)
        trainer.register_module(name, self)

    def __call__(self, batch: TensorDictBase | None = None) -> dict[str, float] | None:
        """Count a batch, and evaluate if it is time."""
        self._batches += 1
        if self._batches % self.interval:
            return None
        rng = GlobalRNGState()
        before = rng.state_dict()
        results = self.evaluator()
        rng.load_state_dict(before)
        return evaluation_metrics(results)

    def state_dict(self) -> dict[str, Any]:
        """Batches so far."""
        return {"batches": self._batches}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on counting."""
        self._batches = int(state_dict["batches"])
