"""Promises that the environments of every domain keep: rows, trials, repeats, updates, evaluation, pictures."""

from __future__ import annotations

from collections.abc import Callable
from ctypes.util import find_library
from types import ModuleType

import pytest
import torch
from tensordict import TensorDictBase
from torch import Tensor
from torchrl.envs import EnvBase
from torchrl.envs.utils import check_env_specs
from torchrl.objectives import SoftUpdate

from torchrl_amago import TrialCollector, amago_loss, make_policy, make_trial_buffer
from torchrl_amago.evaluation import evaluate, rollout_pictures
from torchrl_amago.trainers import make_optimizer

#: Entries that say where in its trial a step is, rather than what the environment shows.
BOOKKEEPING = {
    "prev_action",
    "prev_reward",
    "time_idx",
    "episode_idx",
    "episode_return",
    "is_init",
    "action_mask",
}
BOOKKEEPING |= {"soft_reset", "trial_progress", "episode_success", "task_id"}

needs_egl = pytest.mark.skipif(
    find_library("EGL") is None, reason="pictures need the system's EGL library"
)


def need(package: str, extra: str) -> ModuleType:
    """Return the package of an extra; skip the test where it is missing."""
    return pytest.importorskip(package, reason=f'pip install "torchrl-amago[{extra}]"')


def play(env: EnvBase, num_steps: int, seed: int = 0) -> TensorDictBase:
    """Act at random; rows start new trials at different times. Returns steps ``[rows, num_steps]``."""
    env.set_seed(seed)
    torch.manual_seed(seed)
    return env.rollout(num_steps, legal_actions(env), break_when_any_done=False)


def legal_actions(env: EnvBase) -> Callable[[TensorDictBase], TensorDictBase]:
    """Return a random policy that heeds the action mask, if there is one."""

    def act(tensordict: TensorDictBase) -> TensorDictBase:
        mask = tensordict.get("action_mask", None)
        if mask is None:
            return env.rand_action(tensordict)
        return tensordict.set("action", torch.multinomial(mask.float(), 1).squeeze(-1))

    return act


def shown(steps: TensorDictBase) -> TensorDictBase:
    """Return what the environment shows."""
    return steps.exclude(
        *BOOKKEEPING, "next", "action", "collector", "done", "terminated", "truncated"
    )


def first_steps(steps: TensorDictBase, row: int) -> list[list[int]]:
    """Return the first steps of the episodes of each of a row's trials."""
    trials: list[list[int]] = []
    for step in steps["soft_reset"][row].flatten().nonzero().flatten().tolist():
        if steps["is_init"][row, step]:
            trials.append([])
        trials[-1].append(step)
    return trials


def check_trials(
    steps: TensorDictBase, same_task: Callable[[TensorDictBase], Tensor], min_rows: int
) -> None:
    """An episode repeats its trial's task, and another trial has another one.

    Args:
        steps: of two trials in each row.
        same_task: what a task decides, from the first steps of episodes ``[n]``: a tensor ``[n, ...]``.
        min_rows: rows whose two trials must have different tasks, so that luck is no failure.
    """
    num_rows, differing = len(steps), 0
    for row in range(num_rows):
        trials = first_steps(steps, row)
        assert len(trials) >= 2, f"row {row} played {len(trials)} trials in {steps.shape[1]} steps"
        tasks = [same_task(steps[row, firsts]) for firsts in trials]
        for task in tasks:
            assert torch.equal(task, task[:1].expand_as(task)), (
                f"row {row}: an episode has another task"
            )
        differing += not torch.equal(tasks[0][0], tasks[1][0])
    assert differing >= min_rows, f"{differing} of {num_rows} rows drew a second task"


def everything(steps: TensorDictBase) -> Tensor:
    """Return all that the environment shows, as vectors."""
    entries = shown(steps)
    return torch.cat([x.reshape(len(entries), -1).double() for x in entries.values(True, True)], -1)


def check_learning(env: EnvBase, frames: int, *, loss=amago_loss, **policy_options) -> None:
    """Collect, make two updates, evaluate."""
    options = dict(seq_model="gru", seq_model_options={"d_model": 16}, discounts=(0.9, 0.99))
    policy = make_policy(env, context_length=16, **(options | policy_options))
    rb = make_trial_buffer(10_000, slice_length=16, batch_size=4, warn_short=False)
    collector = TrialCollector(env, policy, frames_per_batch=frames, replay_buffer=rb)
    for _ in collector:
        if rb.can_sample():
            break
    collector.shutdown(close_env=False)
    loss_module = loss(policy, critic_options={"hidden_size": 16})
    optimizer, targets = make_optimizer(loss_module), SoftUpdate(loss_module, tau=0.1)
    before = [p.clone() for p in policy.parameters()]
    for _ in range(2):
        losses = loss_module(rb.sample())
        total = sum(value for name, value in losses.items() if name.startswith("loss"))
        assert torch.isfinite(total)
        total.backward()
        optimizer.step()
        optimizer.zero_grad()
        targets.step()
    changed = [not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True)]
    assert any(changed)
    results = evaluate(policy, env, trials_per_env=1, seed=1)
    assert torch.isfinite(results.trial_return).all()


def check_domain(
    make_env: Callable[[int], EnvBase],
    *,
    num_steps: int,
    rows: int = 3,
    same_task: Callable[[TensorDictBase], Tensor] = everything,
    min_rows: int = 1,
    **learning,
) -> None:
    """Check all but the pictures.

    Args:
        make_env: called with a number of rows; returns trials of two episodes.
        num_steps: steps in which random actions end two trials in each row.
        same_task, min_rows: see :func:`check_trials`.
        learning: options of :func:`check_learning`.
    """
    env = make_env(rows)
    if "action_mask" not in [*env.observation_spec.keys()]:  # random actions may be illegal
        check_env_specs(env, seed=0)
    check_trials(play(env, num_steps), same_task, min_rows)
    check_learning(env, rows * num_steps, **learning)
    env.close()


def check_pictures(env: EnvBase, **options) -> None:
    """A trial is drawn: different pictures of one size, episode by episode."""
    episodes = rollout_pictures(legal_actions(env), env, greedy=False, **options)
    pictures = [picture for episode in episodes for picture in episode]
    assert len(episodes) >= 2
    assert len({picture.shape for picture in pictures}) == 1
    assert pictures[0].shape[-1] == 3
    assert any((picture != pictures[0]).any() for picture in pictures)
    env.close()
