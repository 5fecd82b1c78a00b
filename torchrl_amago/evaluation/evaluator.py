"""Trials of one held-out seed, for all evaluations of a run: during training and at its end."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
from tensordict import TensorDictBase
from torchrl.envs import EnvBase

from torchrl_amago.evaluation.evaluate import TrialResults, evaluate
from torchrl_amago.evaluation.rollout_pictures import rollout_pictures

HELD_OUT_SEED = 10_000_019
"""Seed of evaluation by default; far from the small numbers that runs are seeded with."""


class BothResults(NamedTuple):
    """Trials of one seed played greedily, and with actions sampled from the policy without noise.

    How far their tasks are the same is said in :class:`HeldOut`.

    Example:
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(16,), seed=0), episodes=5)
        >>> results = HeldOut(env.rand_action, env).evaluate_both(16)
        >>> print(results.describe("trial_return"))  # doctest: +ELLIPSIS
        On 16 held-out trials: greedy trial_return ...; sampled (as trained, without epsilon) trial_return ...
    """

    greedy: TrialResults
    sampled: TrialResults

    def save(self, run_dir: str | Path) -> None:
        """Write `evaluation.npz` (greedy) and `evaluation_sampled.npz` into the run's folder."""
        self.greedy.save(Path(run_dir) / "evaluation.npz")
        self.sampled.save(Path(run_dir) / "evaluation_sampled.npz")

    def describe(self, *names: str) -> str:
        """One line with both summaries side by side.

        Args:
            names: entries of :meth:`TrialResults.summary`; by default all.
        """
        means = [results.summary() for results in self]
        greedy, sampled = (
            ", ".join(f"{name} {mean[name]:.3f}" for name in names or mean) for mean in means
        )
        return (
            f"On {len(self.greedy)} held-out trials: greedy {greedy}; "
            f"sampled (as trained, without epsilon) {sampled}"
        )


class HeldOut:
    """Whole trials in an environment of its own, seeded anew at every evaluation.

    The first trial of each row has the same task every time. So have those after it where a task is a
    reset seed, as in Gymnasium environments. The rows of a native task (`BatchedTask`) share a
    generator: there, the later tasks are the same if trials end at the same steps, and else other draws
    of the same distribution. Where each trial is to be compared with its counterpart, give the
    environment as many rows as there are trials.

    Args:
        policy: as for :func:`evaluate`.
        env: with trial transform; not the one that training goes on in. It is seeded and reset.
        seed: of the environment and of sampling.
        success_threshold: an episode succeeds when its return is above this.

    Example:
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(16,), seed=0), episodes=5)
        >>> held_out = HeldOut(env.rand_action, env)
        >>> len(held_out.evaluate(40))
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
        """Play `num_trials` or a few more: every row of the environment plays equally many.

        Args:
            num_trials: trials to play; at least one per row in any case.
            greedy: as for :func:`evaluate`.
        """
        return evaluate(
            self.policy,
            self.env,
            trials_per_row=max(1, math.ceil(num_trials / self.env.batch_size.numel())),
            greedy=greedy,
            seed=self.seed,
            success_threshold=self.success_threshold,
        )

    def evaluate_both(self, num_trials: int) -> BothResults:
        """Play trials greedily, then sampled, both from the same seed."""
        return BothResults(self.evaluate(num_trials), self.evaluate(num_trials, greedy=False))

    def pictures(self) -> list[list[np.ndarray]]:
        """Pictures of one greedy trial of another seed; see :func:`rollout_pictures`."""
        return rollout_pictures(self.policy, self.env, seed=self.seed + 1)
