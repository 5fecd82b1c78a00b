from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict

from torchrl_amago.data import make_trial_buffer
from torchrl_amago.evaluation import TrialResults
from torchrl_amago.trainers import MetricWindow, TrialMonitor, evaluation_metrics


def trial(*attempts):
    """Steps of one trial; each attempt is a list of rewards."""
    rewards = torch.tensor([r for attempt in attempts for r in attempt]).unsqueeze(-1)
    index = torch.tensor([i for i, attempt in enumerate(attempts) for _ in attempt]).unsqueeze(-1)
    ends = torch.tensor([n == len(a) - 1 for a in attempts for n in range(len(a))]).unsqueeze(-1)
    returns = torch.tensor([sum(a[: n + 1]) for a in attempts for n in range(len(a))])
    done = torch.zeros_like(ends)
    done[-1] = True
    following = {
        "reward": rewards,
        "done": done,
        "soft_reset": ends & ~done,
        "attempt_return": returns.unsqueeze(-1),
    }
    return TensorDict({"episode_idx": index, "next": following}, [len(rewards)])


@pytest.fixture
def monitor(tmp_path):
    rb = make_trial_buffer(12, 1, 1)
    return TrialMonitor(rb, MetricWindow(), tmp_path)


def test_counts_and_means(monitor):
    monitor()
    assert monitor.trials == 0
    monitor.replay_buffer.extend(trial([0.0, 0.0], [0.0, 1.0], [1.0]))
    monitor.replay_buffer.extend(trial([1.0], [0.0, 0.0]))
    monitor()
    assert monitor.trials == 2
    assert monitor.window.means() == {
        "train/trial_return": 1.5,
        "train/trial_length": 4.0,
        "train/success_first": 0.5,
        "train/success_last": 0.5,
    }
    monitor()
    assert monitor.trials == 2
    assert monitor.window.means() == {}


def test_follows_what_is_written(monitor):
    for number in range(7):
        monitor.replay_buffer.extend(trial([float(number)] * 2, [0.0] * 3))
        monitor()
        assert monitor.window.means()["train/trial_return"] == 2 * number
    assert monitor.trials == 7


def test_tasks_without_attempts(monitor):
    steps = trial([1.0, 2.0]).exclude("episode_idx", ("next", "attempt_return"))
    monitor.replay_buffer.extend(steps)
    monitor()
    assert monitor.window.means() == {"train/trial_return": 3.0, "train/trial_length": 2.0}


def test_existing_trials_count_but_are_not_logged(monitor):
    monitor.replay_buffer.extend(trial([1.0], [1.0]))
    monitor.skip_existing()
    monitor()
    assert monitor.trials == 1
    assert monitor.window.means() == {}


def test_evaluation_metrics():
    assert evaluation_metrics({"score": torch.tensor(2.0)}) == {"eval/score": 2.0}
    results = TrialResults(
        attempt_return=torch.tensor([[0.0, 2.0], [1.0, 1.0]]),
        attempt_success=torch.tensor([[False, True], [True, True]]),
        trial_return=torch.tensor([2.0, 2.0]),
        trial_length=torch.tensor([4, 6]),
    )
    metrics = evaluation_metrics(results)
    assert metrics["eval/trial_return"] == 2.0
    assert metrics["eval/trial_length"] == 5.0
    assert metrics["eval/success_first"] == 0.5
    assert metrics["eval/success_last"] == 1.0
