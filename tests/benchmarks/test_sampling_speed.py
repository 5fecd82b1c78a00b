"""Time of one replay sample (B=24), of the collector's trial assembly, and of saving.

Run with `pytest tests/benchmarks/test_sampling_speed.py`.
"""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import LazyMemmapStorage, SliceSampler, TensorDictReplayBuffer

from torchrl_amago.data import make_trial_buffer, save_replay

CAPACITY, TRIALS = 490_000, 837


def make_trial(length: int, features: int = 39) -> TensorDict:
    step = torch.arange(length).unsqueeze(-1)
    done = step == length - 1
    return TensorDict(
        {
            "observation": torch.randn(length, features),
            "action": torch.randn(length, 4),
            "prev_action": torch.randn(length, 4),
            "prev_reward": torch.randn(length, 1),
            "time_idx": step,
            "is_init": step == 0,
            "next": {
                "observation": torch.randn(length, features),
                "reward": torch.randn(length, 1),
                "done": done,
                "terminated": done.clone(),
                "truncated": torch.zeros_like(done),
            },
        },
        [length],
    )


def fill(rb) -> None:
    generator = torch.Generator().manual_seed(0)
    for length in torch.randint(170, 1000, (TRIALS,), generator=generator).tolist():
        rb.extend(make_trial(length))


@pytest.fixture(scope="module")
def filled():
    """Half a million steps in 837 trials, sampled in slices of any length."""
    rb = make_trial_buffer(CAPACITY, 1, 24, warn_short=False)
    fill(rb)
    return rb


@pytest.mark.parametrize("slice_len", [64, 128, 250, 1000])
def test_sample(benchmark, filled, slice_len):
    filled.sampler.slice_len = slice_len
    batch = benchmark(filled.sample)
    assert batch.shape == (24, slice_len)


@pytest.mark.parametrize("slice_len", [128, 1000])
def test_sample_with_torchrl_slice_sampler(benchmark, slice_len):
    """For comparison: strict slices, the table of trajectories cached."""
    rb = TensorDictReplayBuffer(
        storage=LazyMemmapStorage(CAPACITY),
        sampler=SliceSampler(
            slice_len=slice_len,
            end_key=("next", "done"),
            cache_values=True,
            strict_length=False,
            pad_output=True,
        ),
        batch_size=24 * slice_len,
    )
    fill(rb)
    batch = benchmark(rb.sample)
    assert batch.numel() == 24 * slice_len


def test_sample_after_every_write(benchmark, filled):
    """The table of trials follows the writes: a write must not make the next sample slow."""
    filled.sampler.slice_len = 128
    trial = make_trial(200)

    def write_and_sample():
        filled.extend(trial)
        return filled.sample()

    assert benchmark(write_and_sample).shape == (24, 128)


def test_save(benchmark, filled, tmp_path):
    benchmark.pedantic(save_replay, (filled, tmp_path / "replay"), rounds=2)


def test_trial_assembly_of_the_collector(benchmark):
    """64 rows of 45 steps: from the collector's batch to whole trials in the buffer."""
    from torchrl.collectors.utils import _traj_ingest

    rows = [make_trial(45, features=2) for _ in range(64)]
    batch = torch.stack(rows)
    batch["collector", "traj_ids"] = torch.arange(64).unsqueeze(-1).expand(64, 45).clone()
    rb = make_trial_buffer(400_000, 45, 24)

    def assemble():
        complete: list[TensorDict] = []
        _traj_ingest(batch, {}, complete)
        rb.extend(torch.cat(complete))

    benchmark(assemble)
    assert rb.can_sample()
