"""What hindsight adds to a sample of 24 slices, and what a batch of trials costs to relabel alone.

Run with `pytest tests/benchmarks/test_relabel_speed.py`.
"""

from __future__ import annotations

import statistics
import time

import pytest
import torch
from tensordict import TensorDict

from tests.benchmarks.test_update_speed import make_update
from torchrl_amago.data import make_trial_buffer
from torchrl_amago.data.relabel import GoalSequenceRelabel, HindsightRelabel

BATCH, STEPS, GOALS, FEATURES = 24, 250, 3, 39


def make_trials(num: int) -> TensorDict:
    """Walks that never come to their goals, `[num * STEPS]`, side by side."""
    rows = num * STEPS
    step = torch.arange(STEPS).repeat(num).unsqueeze(-1)
    goals = torch.full((rows, GOALS, 2), 9.0)
    achieved = torch.rand(num, STEPS + 1, 1, 2)
    observation = torch.randn(num, STEPS + 1, FEATURES)
    zero, last = torch.zeros(rows, 1), step == STEPS - 1
    return TensorDict(
        {
            "observation": observation[:, :-1].flatten(0, 1),
            "goals": goals,
            "achieved": achieved[:, :-1].flatten(0, 1),
            "action": torch.randint(5, (rows,)),
            "prev_action": torch.zeros(rows, 5),
            "prev_reward": zero,
            "time_idx": step,
            "is_init": step == 0,
            "next": {
                "observation": observation[:, 1:].flatten(0, 1),
                "goals": goals,
                "achieved": achieved[:, 1:].flatten(0, 1),
                "prev_action": torch.zeros(rows, 5),
                "prev_reward": zero,
                "time_idx": step + 1,
                "is_init": torch.zeros_like(last),
                "reward": zero,
                "done": last,
                "terminated": torch.zeros_like(last),
                "truncated": last,
            },
        },
        [rows],
    )


@pytest.fixture(scope="module")
def trials():
    return make_trials(400)


def make_buffer(trials: TensorDict, relabel, **options):
    buffer = make_trial_buffer(
        len(trials), STEPS, BATCH, relabel=relabel, warn_short=False, **options
    )
    buffer.extend(trials)
    return buffer


@pytest.mark.parametrize("strategy", ["none", "some", "all"])
def test_sample(benchmark, trials, strategy):
    relabel = None if strategy == "none" else GoalSequenceRelabel(strategy)
    batch = benchmark(make_buffer(trials, relabel).sample)
    assert batch.shape == (BATCH, STEPS)


def seconds(function, rounds: int) -> float:
    """Median duration of a call."""
    durations = []
    for _ in range(rounds):
        start = time.perf_counter()
        function()
        durations.append(time.perf_counter() - start)
    return statistics.median(durations)


@pytest.mark.parametrize("relabel", [GoalSequenceRelabel("some"), GoalSequenceRelabel("all")])
def test_it_adds_little(trials, relabel):
    """At most 30% of the sampling, or 1% of an update of the medium network on the same slices."""
    plain, relabelled = make_buffer(trials, None), make_buffer(trials, relabel)
    sampling = seconds(plain.sample, 100)
    added = seconds(relabelled.sample, 100) - sampling
    update = seconds(make_update(torch.ones(BATCH, STEPS, dtype=torch.bool)), 4)
    assert added <= max(0.3 * sampling, 0.01 * update), (
        f"{1e3 * added:.2f} ms of {1e3 * sampling:.2f} ms and {1e3 * update:.0f} ms"
    )


@pytest.mark.parametrize("kind", ["some", "all", "future"])
def test_relabel_alone(benchmark, trials, kind):
    batch = trials[: BATCH * STEPS].view(BATCH, STEPS).clone()
    batch["collector", "mask"] = torch.ones(BATCH, STEPS, dtype=torch.bool)
    relabel = (
        HindsightRelabel(kind, fraction=1.0) if kind == "future" else GoalSequenceRelabel(kind)
    )
    if kind == "future":
        for side in (batch, batch["next"]):
            side["desired_goal"] = side["goals"][:, :, 0]
            side["achieved_goal"] = side["achieved"][:, :, 0]
    assert benchmark(relabel.relabel_trials, batch)["collector", "mask"].shape == (BATCH, STEPS)
