"""Time of a replay sample (B=24), beside one file per trajectory; time of writing and saving.

Run with `pytest tests/benchmarks/test_replay_speed.py`. Times are those of the processor, all threads
together, so that other work of the machine counts less. Bars with 500,000 stored steps: 1.5 ms at
T=128, 5 ms at T=1000 with and without prefetch, and five times faster than one `.npz` per trajectory;
with 10,000,000 steps at most 1.3 times as long.
"""

from __future__ import annotations

import statistics
import time

import numpy as np
import pytest
import torch
from tensordict import TensorDict

from torchrl_amago.data import TrialSliceSampler, make_trial_buffer

pytestmark = pytest.mark.benchmark(timer=time.process_time)

BATCH, FEATURES, ACTIONS = 24, 39, 4


def make_trial(length: int) -> TensorDict:
    """What a collector writes of a continuous control task."""
    step = torch.arange(length + 1).unsqueeze(-1)
    both = {
        "observation": torch.randn(length + 1, FEATURES),
        "prev_action": torch.randn(length + 1, ACTIONS),
        "prev_reward": torch.randn(length + 1, 1),
        "time_idx": step,
        "is_init": step == 0,
        "done": step == length,
        "terminated": step == length,
        "truncated": torch.zeros_like(step, dtype=torch.bool),
    }
    trial = {key: x[:-1] for key, x in both.items()} | {"action": torch.randn(length, ACTIONS)}
    trial["next"] = {key: x[1:] for key, x in both.items()} | {"reward": torch.randn(length, 1)}
    return TensorDict(trial, [length])


def lengths(num_steps: int) -> list[int]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(170, 1000, (num_steps // 300,), generator=generator)
    return drawn[: int((drawn.cumsum(0) <= num_steps).sum())].tolist()


def fill(num_steps: int, path, **options):
    """Trials of 170 to 999 steps; the same thousand trials over and over."""
    rb = make_trial_buffer(num_steps, 1, BATCH, path=path, warn_short=False, **options)
    template = make_trial(1000)
    for length in lengths(num_steps):
        rb.extend(template[:length], lengths=[length])
    return rb


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(scope="module")
def half_million(folder):
    return fill(500_000, folder / "half_million")


def median_ms(function, repeats: int = 300) -> float:
    times = []
    for _ in range(repeats):
        start = time.process_time()
        function()
        times.append(time.process_time() - start)
    return 1000 * statistics.median(times)


def sampler(slice_length: int, **options) -> TrialSliceSampler:
    return TrialSliceSampler(slice_length, warn_short=False, **options)


@pytest.mark.parametrize("sample_by", ["trials", "steps", "priority"])
@pytest.mark.parametrize("slice_length", [64, 128, 250, 1000])
def test_sample(benchmark, half_million, slice_length, sample_by):
    half_million.set_sampler(sampler(slice_length, sample_by=sample_by, crop="both"))
    batch = benchmark(half_million.sample)
    assert batch.shape == (BATCH, slice_length)
    assert 1000 * benchmark.stats.stats.median <= (1.5 if slice_length == 128 else 5)


def test_sample_with_prefetch(half_million, record_property):
    rb = make_trial_buffer(
        None, 1000, BATCH, path=half_million.storage.path, mode="read", prefetch=1, warn_short=False
    )
    spent = median_ms(rb.sample)
    rb.shutdown()
    record_property("milliseconds", spent)
    assert spent <= 5


def test_ten_million_steps_are_as_fast(half_million, folder, record_property):
    """Interleaved, so that both see the same machine."""
    large = fill(10_000_000, folder / "ten_million")
    spent: dict[int, list[float]] = {len(half_million): [], len(large): []}
    for rb in (half_million, large):
        rb.set_sampler(sampler(128))
        median_ms(rb.sample, 2000)  # bring the pages in
    for _ in range(10):
        for rb in (half_million, large):
            spent[len(rb)].append(median_ms(rb.sample, 100))
    small, big = (statistics.median(times) for times in spent.values())
    record_property("milliseconds", (small, big))
    assert big <= 1.3 * small


@pytest.mark.parametrize("slice_length", [128, 1000])
def test_against_one_file_per_trajectory(half_million, folder, slice_length, record_property):
    """The public reference's way without workers: open 24 files, cut, pad, stack."""
    files, chance = [], np.random.default_rng(0)
    for number, length in enumerate(lengths(500_000)[:200]):
        arrays = {
            "_OBS_KEY_observation": chance.standard_normal((length + 1, FEATURES), np.float32),
            "rl2s": chance.standard_normal((length + 1, ACTIONS + 1), np.float32),
            "time_idxs": np.arange(length + 1)[:, None],
            "rews": chance.standard_normal((length, 1), np.float32),
            "dones": np.arange(length)[:, None] == length - 1,
            "actions": chance.standard_normal((length, ACTIONS), np.float32),
        }
        files.append(folder / f"{number}.npz")
        np.savez(files[-1], **arrays)

    def sample_files():
        rows = []
        for file in chance.choice(files, BATCH):
            with np.load(file) as arrays:
                first = chance.integers(max(1, len(arrays["rews"]) - slice_length + 1))
                rows.append(
                    {
                        key: torch.from_numpy(arrays[key][first : first + slice_length + 1])
                        for key in arrays.files
                    }
                )
        return {
            key: torch.nn.utils.rnn.pad_sequence([row[key] for row in rows], batch_first=True)
            for key in rows[0]
        }

    half_million.set_sampler(sampler(slice_length))
    ours, theirs = median_ms(half_million.sample), median_ms(sample_files, 50)
    record_property("milliseconds", (ours, theirs))
    assert theirs >= 5 * ours


def test_sample_after_every_write(benchmark, half_million):
    """The table of trials follows the writes: a write must not make the next sample slow."""
    half_million.set_sampler(sampler(128, sample_by="priority"))
    trial = make_trial(200)

    def write_and_sample():
        half_million.extend(trial)
        return half_million.sample()

    assert benchmark(write_and_sample).shape == (BATCH, 128)


def test_write_of_many_short_trials(benchmark):
    """64 rows of 45 steps, as a collector writes them."""
    rb = make_trial_buffer(400_000, 45, BATCH)
    steps = torch.cat([make_trial(45) for _ in range(64)])
    benchmark(lambda: rb.extend(steps))


def test_save(benchmark, half_million, tmp_path):
    benchmark.pedantic(half_million.dumps, (tmp_path / "replay",), rounds=2)
