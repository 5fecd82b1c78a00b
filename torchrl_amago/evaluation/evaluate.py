"""Evaluation that counts every trial it starts: a fixed number per environment of the batch.

Counting the trials that happen to end within a window of steps favours short ones, which on most
tasks are the good ones (or the bad ones). Here each environment plays its quota, and the steps that
quicker ones take meanwhile are ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from tensordict import NestedKey, TensorDictBase
from torch import nn
from torchrl.envs import EnvBase, ParallelEnv, SerialEnv, TransformedEnv
from torchrl.envs.utils import ExplorationType, set_exploration_type
from torchrl.modules import set_recurrent_mode

from torchrl_amago import keys
from torchrl_amago._validation import check_counts
from torchrl_amago.evaluation.results import TrialResults


def evaluate(
    policy: Callable[[TensorDictBase], TensorDictBase],
    env: EnvBase,
    *,
    trials_per_env: int,
    greedy: bool = True,
    seed: int = 0,
    success_threshold: float = 0.0,
    max_trial_steps: int = 100_000,
    episode_return_key: NestedKey = "episode_return",
    soft_reset_key: NestedKey = "soft_reset",
    reward_key: NestedKey = "reward",
    done_key: NestedKey = "done",
) -> TrialResults:
    """Play a fixed number of whole trials in every environment of a batch.

    Training around it stays undisturbed: no gradient, a forked global random state, and the
    training mode of every submodule restored. The environment is seeded and reset.

    Args:
        policy: reads and writes a tensordict of the environment's batch size.
        env: an environment with a trial transform. Trial j of environment i is entry
            `i * trials_per_env + j` of the results.
        trials_per_env: trials that each environment of the batch plays, however long they take.
        greedy: act by the distribution's mode (`ExplorationType.DETERMINISTIC`); otherwise sample
            from the policy (`ExplorationType.RANDOM`), with `policy.exploration.enabled` off.
        seed: of the environment and the sampling.
        success_threshold: an episode succeeds if its return is larger; not read if the environment
            reports successes (`success_key` of the trial transform).
        max_trial_steps: longest trial allowed.
        episode_return_key: in `next`, as all keys: return of the step's episode so far.
        soft_reset_key: True if the step ends an episode and the trial continues.
        reward_key, done_key: reward, and True if the step ends the trial.

    Raises:
        KeyError: if the environment has no trial transform.
        RuntimeError: if a trial is longer than `max_trial_steps`.

    Example:
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(16,)), episodes=5)
        >>> results = evaluate(env.rand_action, env, trials_per_env=2, greedy=False)
        >>> results.episode_return.shape
        torch.Size([32, 5])
    """
    check_counts(trials_per_env=trials_per_env)
    tally = _Tally(env.batch_size.numel(), trials_per_env, max_trial_steps)
    read = (reward_key, episode_return_key, soft_reset_key, done_key)
    with rollout_mode(policy, greedy=greedy, seed=seed):
        env.set_seed(seed)
        step, act = env.reset(), acting(policy, env)
        while not tally.is_complete:
            step, following = env.step_and_maybe_reset(act(step))
            tally.add(_read(step["next"], read, success_threshold))
            step = following
    return tally.results(_task_names(env))


def acting(policy: Callable, env: EnvBase) -> Callable[[TensorDictBase], TensorDictBase]:
    """Return the policy as a function of steps on the environment's device."""
    weight = next(policy.parameters(), None) if isinstance(policy, nn.Module) else None
    here = env.device or torch.device("cpu")
    if weight is None or weight.device == here:
        return policy
    return lambda step: policy(step.to(weight.device)).to(here)


@contextmanager
def rollout_mode(policy: Callable, *, greedy: bool, seed: int) -> Iterator[None]:
    """Act without gradient, dropout and noise, with a separate random state; undo at exit."""
    modules = list(policy.modules()) if isinstance(policy, nn.Module) else []
    was_training = [module.training for module in modules]
    exploration = getattr(policy, "exploration", None)
    was_enabled = getattr(exploration, "enabled", False)
    devices = {parameter.device for module in modules for parameter in module.parameters(False)}
    cuda = [device for device in devices if device.type == "cuda"]
    mode = ExplorationType.DETERMINISTIC if greedy else ExplorationType.RANDOM
    try:
        if modules:
            policy.eval()
        if was_enabled:
            exploration.enabled = False
        with (
            torch.random.fork_rng(devices=cuda),
            torch.no_grad(),
            set_exploration_type(mode),
            set_recurrent_mode(False),
        ):
            # Not torch.manual_seed: it would also seed the devices that aren't forked.
            torch.default_generator.manual_seed(seed)
            for device in cuda:
                with torch.cuda.device(device):
                    torch.cuda.manual_seed(seed)
            yield
    finally:
        if was_enabled:
            exploration.enabled = True
        for module, training in zip(modules, was_training, strict=True):
            module.training = training


def _read(
    step_next: TensorDictBase, read: tuple[NestedKey, ...], success_threshold: float
) -> list[np.ndarray]:
    try:
        reward, episode_return, soft_reset, done = (step_next[key] for key in read)
    except KeyError as error:
        raise KeyError(
            f"evaluate reads {read} after each step, but the environment gives only "
            f"{sorted(map(str, step_next.keys()))}. Append the trial transform, or name the keys."
        ) from error
    success = step_next.get(keys.EPISODE_SUCCESS, episode_return > success_threshold)
    task_id = step_next.get(keys.TASK_ID, torch.full_like(done, -1, dtype=torch.int64))
    entries = reward, episode_return, soft_reset, done, success, task_id
    return [entry.reshape(-1).cpu().numpy() for entry in entries]


def _task_names(env: EnvBase) -> Sequence[str]:
    while isinstance(env, TransformedEnv):
        env = env.base_env
    if isinstance(env, SerialEnv):
        return _task_names(env._envs[0])
    # Workers would die of a missing attribute: tasks of a ParallelEnv have numbers only.
    return () if isinstance(env, ParallelEnv) else getattr(env, "task_names", ())


class _Tally:
    """Count of trials and episodes, in arrays with one row per environment."""

    def __init__(self, num_envs: int, trials_per_env: int, max_trial_steps: int):
        self.trials_per_env, self.max_trial_steps = trials_per_env, max_trial_steps
        self.trial, self.episode = np.zeros((2, num_envs), dtype=np.int64)
        self.trial_return = np.zeros((num_envs, trials_per_env))
        self.trial_length, self.task_id = np.zeros((2, num_envs, trials_per_env), dtype=np.int64)
        # (row, trial, episode, return, success) of every episode that ended, a tuple per step.
        self.ended: list[tuple[np.ndarray, ...]] = []

    @property
    def is_complete(self) -> bool:
        return bool((self.trial == self.trials_per_env).all())

    def add(self, step: list[np.ndarray]) -> None:
        """Count one step of every environment that has trials left to play."""
        reward, episode_return, soft_reset, done, success, task_id = step
        row = np.flatnonzero(self.trial < self.trials_per_env)
        place = (row, self.trial[row])
        self.trial_return[place] += reward[row]
        self.trial_length[place] += 1
        self.task_id[place] = task_id[row]
        if self.trial_length[place].max() > self.max_trial_steps:
            raise RuntimeError(
                f"a trial must end within max_trial_steps={self.max_trial_steps} steps, one did "
                "not. Give the trial transform episodes= or horizon=, or raise max_trial_steps."
            )
        over = row[soft_reset[row] | done[row]]
        if over.size:
            outcome = episode_return[over], success[over]
            self.ended.append((over, self.trial[over], self.episode[over], *outcome))
            self.episode[over] = np.where(done[over], 0, self.episode[over] + 1)
            self.trial[over] += done[over]

    def results(self, task_names: Sequence[str]) -> TrialResults:
        """Return all that was counted, in the order of environments."""
        *place, value, success = map(np.concatenate, zip(*self.ended, strict=True))
        shape = (*self.trial_return.shape, place[2].max() + 1)
        returns, is_success = np.full(shape, np.nan, np.float32), np.zeros(shape, dtype=bool)
        returns[tuple(place)], is_success[tuple(place)] = value, success
        trial_return = self.trial_return.astype(np.float32)
        arrays = returns, is_success, trial_return, self.trial_length, self.task_id
        tensors = (torch.from_numpy(array).flatten(0, 1) for array in arrays)
        return TrialResults(*tensors, tuple(task_names))
