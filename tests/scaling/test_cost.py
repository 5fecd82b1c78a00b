"""The cost model of an update, against what an update is counted to do; and the benchmark's tables."""

from __future__ import annotations

import pytest
import torch

from tests.benchmarks import gpu
from tests.benchmarks.cost import Machine, update_flops


@pytest.mark.filterwarnings("ignore:No target network updater")
@pytest.mark.parametrize(
    ("size", "rows", "steps"),
    [((64, 1, 64), 3, 20), ((128, 3, 64), 2, 1000), ((256, 3, 256), 2, 3000)],
)
def test_flops_are_those_that_are_counted(size, rows, steps):
    """On the meta device, which only counts."""
    loss, batch = gpu.make_parts(size, rows, steps, torch.device("meta"))
    count = gpu.count_gradients(loss, batch)
    assert sum(update_flops(loss, rows, steps)) == pytest.approx(count.flops, rel=0.05)
    assert 500 < count.launches < 4000


def test_seconds_add_up():
    machine = Machine(flop_rate=10.0, attention_rate=5.0, bandwidth=2.0, launch_time=0.5)
    assert machine.seconds(20.0, 5.0, 6.0, 4.0) == 2 + 1 + 3 + 2


def test_the_benchmark_prints_its_tables(capsys):
    text = gpu.main(["--device", "cpu", "--tiny", "--no-compile", "--fp32"])
    assert text in capsys.readouterr().out
    assert text.count("| --- |") >= 3
    assert "d 32, 1 layer | 16 x 16" in text
