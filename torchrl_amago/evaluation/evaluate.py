"""Evaluation that counts every trial it starts: a fixed number per row, from start to end.

Counting the trials that happen to end within a window of steps favours short ones, which on most
tasks are the good ones (or the bad ones). Here each row plays its quota, and the steps that quicker
rows take meanwhile are not looked at.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torch import Tensor, nn
from torchrl.envs import EnvBase
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

Measure = Literal["success", "return"]


@dataclass(frozen=True)
class TrialResults:
    """What happened in N trials of up to k episodes each.

    Attributes:
        episode_return: `[N, k]` float32, return of each episode; NaN where the trial was over
            before the episode began.
        episode_success: `[N, k]` bool, whether that return was above the threshold; False where
            there was no episode.
        trial_return: `[N]` float32, sum of the trial's rewards.
        trial_length: `[N]` int64, steps of the trial.

    Example:
        >>> nan = float("nan")
        >>> results = TrialResults(
        ...     episode_return=torch.tensor([[0.0, 1.0], [1.0, nan]]),
        ...     episode_success=torch.tensor([[False, True], [True, False]]),
        ...     trial_return=torch.tensor([1.0, 1.0]),
        ...     trial_length=torch.tensor([12, 8]),
        ... )
        >>> results.by_episode("success").nanmean(0)
        tensor([0.5000, 1.0000])
    """

    episode_return: Tensor
    episode_success: Tensor
    trial_return: Tensor
    trial_length: Tensor

    def __len__(self) -> int:
        return len(self.trial_return)

    @property
    def episode_happened(self) -> Tensor:
        """`[N, k]` bool, False where the trial was over before the episode began."""
        return ~self.episode_return.isnan()

    def by_episode(self, measure: Measure = "success") -> Tensor:
        """`[N, k]` float32: `"success"` (0 or 1) or `"return"`, NaN for episodes not begun."""
        if measure == "return":
            return self.episode_return
        if measure != "success":
            raise ValueError(
                f"measure must be 'success' or 'return', got {measure!r}. Use 'return' where "
                "episodes don't simply succeed or fail."
            )
        return torch.where(self.episode_happened, self.episode_success.float(), torch.nan)

    def summary(self) -> dict[str, float]:
        """Means over the trials, ready for a logger; `last` is each trial's own last episode."""
        success = self.by_episode("success")
        episode = torch.arange(success.shape[1])
        last = torch.where(self.episode_happened, episode, -1).amax(1, keepdim=True)
        return {
            "trial_return": self.trial_return.mean().item(),
            "trial_length": self.trial_length.float().mean().item(),
            "success": success.nanmean().item(),
            "success_first": success[:, 0].mean().item(),
            "success_last": success.gather(1, last).mean().item(),
        }

    def save(self, path: str | Path) -> None:
        """Write a file in the format `.npz` that :meth:`load` and `numpy.load` read, without pickle."""
        arrays = {field.name: getattr(self, field.name).numpy() for field in fields(self)}
        # Given a name, numpy would add a suffix to it.
        with Path(path).open("wb") as file:
            np.savez_compressed(file, **arrays)

    @classmethod
    def load(cls, path: str | Path) -> TrialResults:
        """Read what :meth:`save` wrote."""
        with np.load(path, allow_pickle=False) as arrays:
            return cls(**{name: torch.from_numpy(arrays[name]) for name in arrays.files})

    @classmethod
    def concatenate(cls, results: Sequence[TrialResults]) -> TrialResults:
        """Pool the trials of several results; episodes that some lack are filled up with NaN."""
        width = max(result.episode_return.shape[1] for result in results)

        def widen(values: Tensor, fill: float) -> Tensor:
            return nn.functional.pad(values, (0, width - values.shape[1]), value=fill)

        return cls(
            torch.cat([widen(result.episode_return, torch.nan) for result in results]),
            torch.cat([widen(result.episode_success, False) for result in results]),
            torch.cat([result.trial_return for result in results]),
            torch.cat([result.trial_length for result in results]),
        )


def evaluate(
    policy: Callable[[TensorDictBase], TensorDictBase],
    env: EnvBase,
    *,
    trials_per_row: int,
    greedy: bool = True,
    seed: int = 0,
    success_threshold: float = 0.0,
    max_trial_steps: int = 100_000,
    episode_return_key: NestedKey = "episode_return",
    soft_reset_key: NestedKey = "soft_reset",
    reward_key: NestedKey = "reward",
    done_key: NestedKey = "done",
) -> TrialResults:
    """Play `trials_per_row` whole trials in every row of a batched environment.

    The training that goes on around it is left as it was: no gradient, the global random state
    forked, and the policy's training mode of every submodule given back. The environment is seeded
    and reset, so give an environment of its own.

    Args:
        policy: reads and writes a tensordict of the environment's batch size.
        env: an environment with a trial transform. Trials are played in rows `0 ... R-1`, and trial
            j of row i is entry `i * trials_per_row + j` of the results.
        trials_per_row: trials to play in each row, however long they take.
        greedy: act by the distribution's mode (`ExplorationType.DETERMINISTIC`); otherwise sample from
            the policy (`ExplorationType.RANDOM`), without the noise that `policy.exploration`, where
            there is such a module, adds in training.
        seed: held-out seed for the environment and the sampling.
        success_threshold: an episode succeeds when its return is above this.
        max_trial_steps: a trial longer than this raises.
        episode_return_key: in `next`: return of the episode that the step belonged to.
        soft_reset_key: in `next`: True where the step ended an episode and the trial goes on.
        reward_key: in `next`: the reward.
        done_key: in `next`: True where the step ended the trial.

    Raises:
        KeyError: where the environment has no trial transform.
        RuntimeError: where a trial doesn't end.
        ValueError: where `trials_per_row` is not positive.

    Example:
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(16,)), episodes=5)
        >>> results = evaluate(env.rand_action, env, trials_per_row=2, greedy=False)
        >>> results.episode_return.shape
        torch.Size([32, 5])
    """
    if trials_per_row < 1:
        raise ValueError(
            f"trials_per_row must be at least 1, got {trials_per_row}. Every row plays that many "
            "whole trials."
        )
    tally = _Tally(env.batch_size.numel(), trials_per_row, max_trial_steps)
    with rollout_mode(policy, greedy=greedy, seed=seed):
        env.set_seed(seed)
        step = env.reset()
        while not tally.is_complete:
            step, following = env.step_and_maybe_reset(policy(step))
            step_next = step["next"]
            _check_keys(step_next, episode_return_key, soft_reset_key)
            tally.add(
                reward=step_next[reward_key],
                episode_return=step_next[episode_return_key],
                soft_reset=step_next[soft_reset_key],
                done=step_next[done_key],
            )
            step = following
    return tally.results(success_threshold)


@contextmanager
def rollout_mode(policy: Callable, *, greedy: bool, seed: int) -> Iterator[None]:
    """Act without gradient, dropout and noise, with a random state of one's own; undo at exit."""
    modules = list(policy.modules()) if isinstance(policy, nn.Module) else []
    was_training = [module.training for module in modules]
    exploration = ExplorationType.DETERMINISTIC if greedy else ExplorationType.RANDOM
    devices = {parameter.device for module in modules for parameter in module.parameters(False)}
    cuda = [device for device in devices if device.type == "cuda"]
    try:
        if modules:
            policy.eval()
        with (
            torch.random.fork_rng(devices=cuda),
            torch.no_grad(),
            set_exploration_type(exploration),
            set_recurrent_mode(False),
            _without_noise(policy),
        ):
            # Not torch.manual_seed: it would also seed the devices that aren't forked.
            torch.default_generator.manual_seed(seed)
            for device in cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        for module, training in zip(modules, was_training, strict=True):
            module.training = training


@contextmanager
def _without_noise(policy: Callable) -> Iterator[None]:
    """Let `policy.exploration` leave actions as they are, also where they are sampled."""
    exploration = getattr(policy, "exploration", None)
    if not isinstance(exploration, nn.Module):
        yield
        return
    # This module alone is told that all is greedy; the one that samples isn't.
    exploration.forward = set_exploration_type(ExplorationType.DETERMINISTIC)(exploration.forward)
    try:
        yield
    finally:
        del exploration.forward


class _Tally:
    """Per-row bookkeeping of the trials and episodes that count."""

    def __init__(self, rows: int, trials_per_row: int, max_trial_steps: int):
        self.trials_per_row = trials_per_row
        self.max_trial_steps = max_trial_steps
        self.trial = np.zeros(rows, dtype=np.int64)
        self.episode = np.zeros(rows, dtype=np.int64)
        self.trial_return = np.zeros((rows, trials_per_row))
        self.trial_length = np.zeros((rows, trials_per_row), dtype=np.int64)
        # (row, trial, episode, return) of every episode that ended, one array each per step.
        self.ended: list[tuple[np.ndarray, ...]] = []

    @property
    def is_complete(self) -> bool:
        return bool((self.trial == self.trials_per_row).all())

    def add(self, reward: Tensor, episode_return: Tensor, soft_reset: Tensor, done: Tensor) -> None:
        """Count one step of every row that has trials left to play."""
        reward, episode_return, soft_reset, done = (
            value.reshape(len(self.trial)).cpu().numpy()
            for value in (reward, episode_return, soft_reset, done)
        )
        row = np.flatnonzero(self.trial < self.trials_per_row)
        self.trial_return[row, self.trial[row]] += reward[row]
        self.trial_length[row, self.trial[row]] += 1
        if self.trial_length[row, self.trial[row]].max() > self.max_trial_steps:
            raise RuntimeError(
                f"A trial must end within max_trial_steps={self.max_trial_steps} steps, one did "
                "not. Give the trial transform episodes= or horizon=, or raise max_trial_steps."
            )
        over = row[soft_reset[row] | done[row]]
        if over.size:
            self.ended.append((over, self.trial[over], self.episode[over], episode_return[over]))
            self.episode[over] = np.where(done[over], 0, self.episode[over] + 1)
            self.trial[over] += done[over]

    def results(self, success_threshold: float) -> TrialResults:
        """Everything counted, trials in the order of rows."""
        row, trial, episode, value = map(np.concatenate, zip(*self.ended, strict=True))
        episode_return = np.full((self.trial.size * self.trials_per_row, episode.max() + 1), np.nan)
        episode_return[row * self.trials_per_row + trial, episode] = value
        episode_return = torch.from_numpy(episode_return).float()
        return TrialResults(
            episode_return,
            episode_return > success_threshold,
            torch.from_numpy(self.trial_return.reshape(-1)).float(),
            torch.from_numpy(self.trial_length.reshape(-1)),
        )


def _check_keys(step_next: TensorDictBase, *keys: NestedKey) -> None:
    for key in keys:
        if step_next.get(key, None) is None:
            raise KeyError(
                f"evaluate reads {key!r} after each step, and the environment gives only "
                f"{sorted(map(str, step_next.keys()))}. Append the trial transform, or name the key."
            )
