"""Environment steps per second of the native tasks under random actions, and what they draw.

    OMP_NUM_THREADS=1 pytest tests/benchmarks/test_task_speed.py

The tables' rounds are of 100 batched steps; `extra_info` holds environment steps per second.
"""

from __future__ import annotations

import pytest
import torch

from torchrl_amago.envs.tasks import DarkKeyDoor, MetaFrozenLake, SymbolicAlchemy, TMaze
from torchrl_amago.envs.tasks.frozen_lake import random_lakes

STEPS = 100
TASKS = {
    "lake": lambda rows: MetaFrozenLake(3, batch_size=[rows], seed=0),
    "lake-hard": lambda rows: MetaFrozenLake(3, hard_mode=True, batch_size=[rows], seed=0),
    "maze": lambda rows: TMaze(100, ambiguous_position=True, batch_size=[rows], seed=0),
    "room": lambda rows: DarkKeyDoor(5, max_episode_steps=20, batch_size=[rows], seed=0),
    "room-shuffled": lambda rows: DarkKeyDoor(
        5, max_episode_steps=20, randomize_actions=True, batch_size=[rows], seed=0
    ),
    "alchemy": lambda rows: SymbolicAlchemy(batch_size=[rows], seed=0),
}


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("rows", [64, 512])
def test_step_and_maybe_reset(benchmark, rows, task):
    env = TASKS[task](rows)
    start = env.reset()
    actions = [env.action_spec.rand() for _ in range(STEPS)]

    def run():
        td = start.clone()
        for action in actions:
            _, td = env.step_and_maybe_reset(td.set("action", action))

    benchmark.pedantic(run, rounds=10, warmup_rounds=2)
    benchmark.extra_info["env_steps_per_s"] = round(rows * STEPS / benchmark.stats["min"])


@pytest.mark.parametrize("size", [3, 5, 10])
def test_random_lakes(benchmark, size):
    generator = torch.Generator().manual_seed(0)
    benchmark(random_lakes, 1024, size, generator)
    benchmark.extra_info["lakes_per_s"] = round(1024 / benchmark.stats["min"])
