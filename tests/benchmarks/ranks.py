"""Cost of the sums over ranks in an update: the network of example 00, paired in one process.

    torchrun --nproc-per-node 2 tests/benchmarks/ranks.py

Blocks of updates take turns: the ranks together, then each rank alone with the same rows.
"""

from __future__ import annotations

import time
from types import SimpleNamespace

import numpy as np
import torch

from torchrl_amago import MetaFrozenLake, amago_loss, make_optimizer, make_policy, make_trial_env
from torchrl_amago.modules import RunningScale
from torchrl_amago.scaling import Ranks
from torchrl_amago.trainers import FiniteOptimizationStepper

ROWS, BLOCKS, UPDATES = 16, 12, 5


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(1)
    env = make_trial_env(MetaFrozenLake(3, batch_size=(ROWS,)), episodes=5)
    policy = make_policy(
        env,
        context_length=45,
        seq_model_options=dict(d_model=64, num_layers=2, num_heads=4),
        timestep_options=dict(hidden_size=256, output_size=64),
        actor_options=dict(hidden_size=256),
    )
    codec = RunningScale(len(policy.discounts))
    loss = amago_loss(policy, value_codec=codec, critic_options=dict(hidden_size=256))
    with torch.no_grad():
        batch = env.rollout(45, policy, break_when_any_done=False)
    ranks, stepper = Ranks.from_environment(), FiniteOptimizationStepper()
    parts = dict(loss_module=loss, optimizer=make_optimizer(loss), replay_buffer=None)
    seconds = {ranks.size: [], 1: []}
    for _ in range(BLOCKS):
        for group in (ranks, Ranks()):
            group.attach(loss)
            for _ in range(UPDATES):
                start = time.perf_counter()
                stepper.step(SimpleNamespace(**parts, ranks=group), batch.clone())
                seconds[group.size].append(time.perf_counter() - start)
            ranks.gather(None)
    together, alone = (np.median(seconds[size][UPDATES:]) * 1e3 for size in (ranks.size, 1))
    if ranks.is_first:
        size = sum(p.numel() for p in loss.parameters() if p.requires_grad)
        print(  # noqa: T201
            f"{ranks.size} ranks, {size} parameters: an update of {ROWS} rows each takes "
            f"{together:.1f} ms together, {alone:.1f} ms alone, ratio {together / alone:.2f}"
        )


if __name__ == "__main__":
    main()
