"""Milliseconds of every trajectory encoder: a training pass over a window, and one step of rollouts.

python -m pytest -s tests/benchmarks/test_encoder_speed.py
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time

import pytest
import torch
from tensordict import TensorDict

from torchrl_amago.modules.policy import SEQ_MODELS

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


def training_pass(encoder, x, positions):
    states = encoder.sequence(x, positions, None)
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


@pytest.mark.parametrize("context", [1000, 4000])
def test_a_ring_that_rolled_over_is_as_fast_as_before(context):
    """Ratio of medians, taken in turn."""
    before, after = (Rollout("transformer", context, context + n) for n in (-100, 2000))
    times = {id(before): [], id(after): []}
    for i in range(90):
        for rollout in (before, after):
            start = time.perf_counter()
            rollout.step()
            if i >= 5:
                times[id(rollout)].append(time.perf_counter() - start)
    ratio = statistics.median(times[id(after)]) / statistics.median(times[id(before)])
    print(f"step of a ring of {context} after and before it rolled over: {ratio:.2f}")  # noqa: T201
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
