from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import TensorDictReplayBuffer

from tests.data.trials import stock_buffer
from torchrl_amago._state_file import load_state, save_state
from torchrl_amago.data import TrialReplayBuffer, make_trial_buffer
from torchrl_amago.progress import MetricWindow
from torchrl_amago.trainers import TrialMonitor


def trial(*episodes):
    """Steps of one trial; each episode is a list of rewards."""
    rewards = torch.tensor([r for episode in episodes for r in episode]).unsqueeze(-1)
    index = torch.tensor([i for i, episode in enumerate(episodes) for _ in episode]).unsqueeze(-1)
    ends = torch.tensor([n == len(a) - 1 for a in episodes for n in range(len(a))]).unsqueeze(-1)
    returns = torch.cat([torch.tensor(a).cumsum(0) for a in episodes]).unsqueeze(-1)
    done = torch.zeros_like(ends)
    done[-1] = True
    following = {"reward": rewards, "done": done, "soft_reset": ends & ~done}
    following["episode_return"] = returns
    return TensorDict({"episode_idx": index, "next": following}, [len(rewards)])


def timed(steps):
    return steps.set("time_idx", torch.arange(len(steps)).unsqueeze(-1))


@pytest.fixture
def monitor(tmp_path):
    return TrialMonitor(make_trial_buffer(12, 1, 1), MetricWindow(), tmp_path)


def read(monitor, *pieces):
    """Write trials, or pieces of some; return the means since the last time."""
    if pieces:
        monitor.replay_buffer.extend(torch.cat(pieces), lengths=[len(piece) for piece in pieces])
    monitor.update()
    return monitor.window.means()


def return_and_length(means):
    return means.get("train/trial_return"), means.get("train/trial_length")


def test_counts_and_means(monitor):
    assert read(monitor) == {}
    assert monitor.trials == 0
    assert read(monitor, trial([0.0, 0.0], [0.0, 1.0], [1.0]), trial([1.0], [0.0, 0.0])) == {
        "train/trial_return": 1.5,
        "train/trial_length": 4.0,
        "train/success_first": 0.5,
        "train/success_last": 0.5,
    }
    assert monitor.trials == 2
    assert read(monitor) == {}
    assert monitor.trials == 2


def test_a_trial_in_fragments_counts_as_a_whole(monitor):
    fragments = trial([0.0, 1.0], [0.0, 1.0, 0.0, 1.0]).split([1, 2, 3])
    assert [read(monitor, fragment) for fragment in fragments] == [
        {},
        {"train/success_first": 1.0},
        {"train/trial_return": 3.0, "train/trial_length": 6.0, "train/success_last": 1.0},
    ]
    assert monitor.trials == 1


def test_fragments_of_several_trials_are_told_apart(monitor):
    one = timed(trial([1.0] * 5)).split([2, 3])
    other = timed(trial([10.0] * 4)).split([3, 1])
    as_old_as_one = timed(trial([100.0] * 3)).split([2, 1])
    writes = ([one[0], other[0], as_old_as_one[0]], [one[1]], [other[1], as_old_as_one[1]])
    seen = [return_and_length(read(monitor, *pieces)) for pieces in writes]
    assert seen == [(None, None), (5.0, 5.0), (170.0, 3.5)]


def test_trials_in_progress_are_saved(monitor, tmp_path):
    first, last = timed(trial([1.0] * 5)).split([3, 2])
    read(monitor, first)
    save_state(tmp_path / "x.npz", monitor.state_dict())
    other = TrialMonitor(monitor.replay_buffer, MetricWindow(), tmp_path)
    other.load_state_dict(load_state(tmp_path / "x.npz"))
    assert read(other, last)["train/trial_return"] == 5.0


@pytest.mark.parametrize("kind", ["tensor", "memmap"])
@pytest.mark.parametrize("buffer", [TensorDictReplayBuffer, TrialReplayBuffer])
def test_the_newest_steps_in_stock_storages_are_read_off_the_ring(tmp_path, kind, buffer):
    rb = stock_buffer(kind, capacity=8, buffer=buffer)
    monitor = TrialMonitor(rb, MetricWindow(), tmp_path)
    for gain in (1.0, 2.0, 3.0, 4.0):
        rb.extend(trial([gain] * 3))
        assert read(monitor)["train/trial_return"] == 3 * gain
    assert monitor.trials == 4


def test_fragments_of_trials_that_were_ended_early_do_not_count(monitor):
    read(monitor, trial([1.0] * 4)[:3])
    monitor.forget_unfinished()
    assert return_and_length(read(monitor, trial([1.0, 1.0]))) == (2.0, 2.0)


def test_tasks_without_episodes(monitor):
    steps = trial([1.0, 2.0]).exclude("episode_idx", ("next", "episode_return"))
    assert read(monitor, steps) == {"train/trial_return": 3.0, "train/trial_length": 2.0}


def test_existing_trials_count_but_are_not_logged(monitor):
    monitor.replay_buffer.extend(trial([1.0], [1.0]))
    monitor.skip_existing()
    assert read(monitor) == {}
    assert monitor.trials == 1
