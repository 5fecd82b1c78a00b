"""Milliseconds of every trajectory encoder: a training pass over a window, and one step of rollouts.

python -m pytest -s tests/benchmarks/test_encoder_speed.py
"""

from __future__ import annotations

import functools
import statistics
import subprocess
import sys
import time

import pytest
import torch
from tensordict import TensorDict

from torchrl_amago.modules import SEQ_MODELS

SIZES = {"d_model": 128, "num_layers": 3}
HEADS = {"num_heads": 8}
ENCODERS = {
    "transformer": ("transformer", {**SIZES, **HEADS}),
    "transformer, window 256": ("transformer", {**SIZES, **HEADS, "window": 256}),
    "transformer, window 256, 4 sinks": (
        "transformer",
        {**SIZES, **HEADS, "window": 256, "num_sinks": 4},
    ),
    "gru": ("gru", {**SIZES, "num_layers": 2}),
    "lstm": ("lstm", {**SIZES, "num_layers": 2}),
    "mamba": ("mamba", SIZES),
    "linear_attention": ("linear_attention", SIZES),
    "feedforward": ("feedforward", {"d_model": 128}),
}
WINDOWED = [name for name in ENCODERS if "window" in name]


def build(name: str, context: int):
    torch.manual_seed(0)
    kind, options = ENCODERS[name]
    return SEQ_MODELS[kind](128, context_length=max(context, options.get("window", 0)), **options)


def training_pass(encoder, x, positions, *mask):
    states = encoder.sequence(x, positions, None, *mask)
    states.backward(torch.ones_like(states))
    encoder.zero_grad()


def window(name: str, steps: int, rows: int = 4):
    encoder = build(name, steps)
    positions = torch.arange(steps).expand(rows, -1)
    return encoder, torch.randn(rows, steps, 128), positions


@pytest.mark.parametrize("steps", [64, 250, 1000, 4000])
@pytest.mark.parametrize("name", ENCODERS)
def test_forward_and_backward_of_a_window(benchmark, name, steps):
    rounds = 9 if steps <= 1000 else 3
    benchmark.pedantic(training_pass, args=window(name, steps), rounds=rounds, warmup_rounds=1)
    benchmark.extra_info["steps_per_second"] = round(4 * steps / benchmark.stats.stats.median)


class Rollout:
    """Steps of 12 environments in mid-trial, with a full context."""

    def __init__(self, name: str, context: int, steps_before: int) -> None:
        self.encoder = build(name, context).eval()
        self.td = TensorDict(
            timestep=torch.randn(12, 128),
            time_idx=torch.zeros(12, 1, dtype=torch.int64),
            is_init=torch.ones(12, 1, dtype=torch.bool),
            batch_size=[12],
        )
        self.step()
        self.td["is_init"].zero_()
        if not self.encoder.has_memory:
            self.nbytes = 0
            return
        memory = self.encoder.memory_of(self.td)
        self.nbytes = memory.nbytes / 12
        for _ in range(steps_before - 1):
            memory.advance()  # the numbers in it don't matter
        self.td["time_idx"].fill_(steps_before)

    def step(self) -> None:
        self.encoder(self.td)
        self.td["time_idx"] += 1


@pytest.mark.parametrize("context", [250, 1000, 4000])
@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in WINDOWED])
def test_step_with_a_full_context(benchmark, name, context):
    rollout = Rollout(name, context, context)
    benchmark.pedantic(rollout.step, rounds=60, warmup_rounds=5)
    benchmark.extra_info["bytes_per_environment"] = round(rollout.nbytes)


@pytest.mark.parametrize("name", WINDOWED)
def test_step_with_a_full_window(benchmark, name):
    rollout = Rollout(name, 1000, 1000)
    benchmark.pedantic(rollout.step, rounds=60, warmup_rounds=5)
    benchmark.extra_info["bytes_per_environment"] = round(rollout.nbytes)


def ratio_of_medians(first, second, rounds: int) -> float:
    """How much longer the second takes; both in turn, so that a busy moment hits both."""
    times = ([], [])
    for i in range(rounds + 1):
        for taken, run in zip(times, (first, second), strict=True):
            start = time.perf_counter()
            run()
            if i:  # the first round warms up
                taken.append(time.perf_counter() - start)
    return statistics.median(times[1]) / statistics.median(times[0])


@pytest.mark.parametrize("context", [1000, 4000])
def test_a_ring_that_rolled_over_is_as_fast_as_before(context):
    before, after = (Rollout("transformer", context, context + n) for n in (-100, 2000))
    ratio = ratio_of_medians(before.step, after.step, rounds=90)
    print(f"step of a ring of {context}, rolled over / before: {ratio:.2f}")  # noqa: T201
    assert ratio <= 1.15


def test_padding_takes_less_time_than_steps():
    inputs = window("transformer", 64, rows=32)
    mask = torch.arange(64) < torch.linspace(16, 64, 32).long()[:, None]
    whole, real = (functools.partial(training_pass, *inputs, *more) for more in ((), (mask,)))
    ratio = ratio_of_medians(whole, real, rounds=30)
    print(f"transformer: slices with {1 - mask.float().mean():.0%} of padding: {ratio:.2f}")  # noqa: T201
    assert ratio <= 0.9


@pytest.mark.parametrize("name", [*WINDOWED, "gru", "mamba", "linear_attention"])
def test_time_grows_linearly(name):
    short, long = (functools.partial(training_pass, *window(name, n)) for n in (1000, 4000))
    ratio = ratio_of_medians(short, long, rounds=5)
    print(f"{name}: T = 4000 / 1000 takes {ratio:.2f} times as long")  # noqa: T201
    assert ratio <= 4.6


@pytest.mark.parametrize("name", ["gru", "lstm", "mamba", "linear_attention"])
def test_steps_cost_the_same_in_any_context(name):
    early, late = (Rollout(name, n, n) for n in (250, 4000))
    ratio = ratio_of_medians(early.step, late.step, rounds=90)
    print(f"{name}: step in a context of 4000 / 250: {ratio:.2f}")  # noqa: T201
    assert ratio <= 1.15


@pytest.mark.parametrize("name", ["transformer", "transformer, window 256", "mamba", "gru"])
def test_peak_memory_of_a_training_pass(name):
    """Peak resident memory of a process that does one pass, beyond one that only builds the encoder."""
    code = (
        "import re, sys; from pathlib import Path; from tests.benchmarks.test_encoder_speed import *; "
        "name, passes = sys.argv[1], int(sys.argv[2]); args = window(name, 4000); "
        "[training_pass(*args) for _ in range(passes)]; "
        # Not getrusage, which counts what the parent held when it forked.
        "print(re.search(r'VmHWM:\\s+(\\d+)', Path('/proc/self/status').read_text())[1])"
    )
    peak = [
        int(
            subprocess.run(
                [sys.executable, "-c", code, name, n], capture_output=True, check=True
            ).stdout
        )
        for n in ("0", "1")
    ]
    mebibytes = (peak[1] - peak[0]) / 1024
    print(f"{name}: {mebibytes:.0f} MiB for B=4, T=4000")  # noqa: T201
    # All scores of one layer alone: B H T T floats.
    assert mebibytes * 2**20 < 4 * 8 * 4000 * 4000 * 4
