"""Evaluation on the trials of one held-out seed, during training and at its end."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from tensordict import TensorDictBase
from torchrl.checkpoint import GlobalRNGState
from torchrl.envs import EnvBase

from torchrl_amago.evaluation.evaluate import evaluate
from torchrl_amago.evaluation.results import EvaluationResults, Results, TrialResults
from torchrl_amago.evaluation.rollout_pictures import rollout_pictures

#: Called without arguments; returns numbers by name or `TrialResults`.
Evaluator = Callable[[], Results]

HELD_OUT_SEED = 10_000_019
"""Default seed of evaluation, far from the small numbers that runs are seeded with."""


class HeldOutEvaluator:
    """Evaluator with its own environment, seeded again at every evaluation.

    The first trial of each environment has the same task every time; so have the later ones if a
    task is a reset seed, as in Gymnasium environments. The environments of a native batch
    (`BatchedTask`) share a generator, so their later tasks depend on the steps at which trials end.
    For a comparison trial by trial, use as many environments as trials.

    Arguments: see :func:`evaluate`. The environment must not be training's.

    Example:
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(16,), seed=0), episodes=5)
        >>> evaluator = HeldOutEvaluator(env.rand_action, env)
        >>> len(evaluator.evaluate(40))
        48
    """

    def __init__(
        self,
        policy: Callable[[TensorDictBase], TensorDictBase],
        env: EnvBase,
        seed: int = HELD_OUT_SEED,
        success_threshold: float = 0.0,
    ) -> None:
        self.policy, self.env, self.seed = policy, env, seed
        self.success_threshold = success_threshold

    def evaluate(self, num_trials: int, *, greedy: bool = True) -> TrialResults:
        """Play `num_trials`, rounded up to equally many in each environment of the batch."""
        number = max(1, math.ceil(num_trials / self.env.batch_size.numel()))
        options = {"seed": self.seed, "success_threshold": self.success_threshold}
        return evaluate(self.policy, self.env, trials_per_env=number, greedy=greedy, **options)

    def evaluate_greedy_and_sampled(self, num_trials: int) -> EvaluationResults:
        """Play trials greedily, then with sampled actions, both from the same seed."""
        return EvaluationResults(self.evaluate(num_trials), self.evaluate(num_trials, greedy=False))

    def pictures(self) -> list[list[np.ndarray]]:
        """Return pictures of one greedy trial of another seed; see :func:`rollout_pictures`."""
        return rollout_pictures(self.policy, self.env, seed=self.seed + 1)


def run_evaluator(evaluator: Evaluator) -> Results:
    """Evaluate, and put the global random generators back."""
    rng = GlobalRNGState()
    before = rng.state_dict()
    results = evaluator()
    rng.load_state_dict(before)
    return results
