from __future__ import annotations

import pytest
import torch
from torchrl.collectors import Collector, MultiCollector
from torchrl.envs import InitTracker, TransformedEnv

from tests.evaluation.scripted import ScriptedTrials, act
from torchrl_amago.data import load_replay, make_trial_buffer, save_replay


def make_env() -> TransformedEnv:
    """Rows whose trials end at different steps; rewards number the steps of each trial from 1."""
    lengths = [[3, 5], [4], [7, 2, 6]]
    script = [[[list(range(1, n + 1))] for n in row] for row in lengths]
    script = [
        [[[float(step) for step in attempt] for attempt in trial] for trial in row]
        for row in script
    ]
    return TransformedEnv(ScriptedTrials(script), InitTracker())


def make_policy():
    return act


def assert_whole_trials(rb, capacity: int) -> None:
    """Every listed trial counts 1, 2, ... to its end, and so does every row behind the mask."""
    assert rb.can_sample()
    table, steps = rb.sampler._table, rb.storage[:]
    for start, length in zip(table.start.tolist(), table.length.tolist(), strict=True):
        slots = [(start + step) % capacity for step in range(length)]
        trial = steps[slots]
        assert trial["next", "reward"].squeeze(-1).tolist() == list(range(1, length + 1))
        assert trial["is_init"].squeeze(-1).tolist() == [True] + [False] * (length - 1)
        assert trial["next", "done"].squeeze(-1).tolist() == [False] * (length - 1) + [True]
    batch = rb.sample()
    step_BT, mask_BT = batch["next", "reward"].squeeze(-1), batch["collector", "mask"]
    follows_BT = step_BT.diff(dim=1) == 1
    assert torch.equal(follows_BT, mask_BT[:, 1:])
    assert mask_BT[:, 0].all()


def test_collector_writes_whole_trials_that_survive_the_fifo():
    rb = make_trial_buffer(capacity=40, slice_len=5, batch_size=32, warn_short=False)
    collector = Collector(
        make_env(),
        act,
        frames_per_batch=9,
        total_frames=9 * 30,
        trajs_per_batch=1,
        replay_buffer=rb,
    )
    ready = []
    for _ in collector:
        ready.append(rb.can_sample())
        if ready[-1]:
            assert_whole_trials(rb, capacity=40)
    collector.shutdown()
    assert ready[-1]
    assert len(rb) == 40
    # 40 steps of trials of at most 7: never fewer than this many fit.
    assert rb.sampler.num_trials(rb.storage) >= 5


@pytest.mark.slow
def test_two_processes_write_into_one_buffer(tmp_path):
    rb = make_trial_buffer(capacity=60, slice_len=5, batch_size=32, warn_short=False, shared=True)
    assert not rb.can_sample()
    collector = MultiCollector(
        [make_env, make_env],
        policy_factory=make_policy,
        sync=True,
        frames_per_batch=24,
        total_frames=24 * 15,
        trajs_per_batch=1,
        replay_buffer=rb,
    )
    checked = 0
    try:
        for _ in collector:
            if rb.can_sample():
                assert_whole_trials(rb, capacity=60)
                checked += 1
    finally:
        collector.shutdown()
    assert checked > 5
    assert rb.write_count > 120
    save_replay(rb, tmp_path / "replay")
    other = make_trial_buffer(capacity=60, slice_len=5, batch_size=32, warn_short=False)
    load_replay(other, tmp_path / "replay")
    torch.manual_seed(1)
    expected = rb.sample()
    torch.manual_seed(1)
    assert (other.sample() == expected).all()


def test_scratch_dir_holds_the_files(tmp_path):
    rb = make_trial_buffer(100, 4, 2, scratch_dir=tmp_path / "scratch")
    rb.extend(make_env().rollout(3, act)[0])
    assert (tmp_path / "scratch" / "next" / "reward.memmap").exists()


def test_prefetched_batches_are_like_the_others():
    rb = make_trial_buffer(
        100, 4, 8, prefetch=2, generator=torch.Generator().manual_seed(0), warn_short=False
    )
    rb.extend(make_env().rollout(3, act)[0])
    for _ in range(5):
        assert rb.sample()["next", "reward"][:, :3, 0].tolist() == [[1.0, 2.0, 3.0]] * 8


def test_refuses_sizes_that_cannot_work():
    with pytest.raises(ValueError, match=r"slice_len must be in \[1, capacity=10\], got 11"):
        make_trial_buffer(10, 11, 1)
    with pytest.raises(ValueError, match="batch_size must be at least 1, got 0"):
        make_trial_buffer(10, 5, 0)
