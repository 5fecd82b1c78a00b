"""Milliseconds of one policy step with a full context, and of the whole collection loop.

python -m pytest tests/benchmarks/test_step_speed.py
"""

from __future__ import annotations

import pytest
import torch

from torchrl_amago import (
    MetaFrozenLake,
    TrialCollector,
    make_policy,
    make_trial_buffer,
    make_trial_env,
)

SMALL = {
    "seq_model_options": {"d_model": 64, "num_layers": 2, "num_heads": 4},
    "timestep_options": {"hidden_size": 64, "output_size": 64},
    "actor_options": {"hidden_size": 64},
}


@pytest.mark.parametrize("rows", [12, 64, 512])
@pytest.mark.parametrize("size", ["small", "default"])
def test_policy_step_with_a_full_context(benchmark, rows, size):
    context = 250
    env = make_trial_env(MetaFrozenLake(batch_size=(rows,), seed=0), episodes=10**6)
    policy = make_policy(
        env, context_length=context, preset="paper", **(SMALL if size == "small" else {})
    )
    td = env.reset()
    with torch.no_grad():
        for _ in range(context + 5):  # fill the ring, and roll over
            policy(td)
            td["is_init"].zero_()
            td["time_idx"] += 1
        benchmark.pedantic(policy, args=(td,), rounds=30, warmup_rounds=3)
    benchmark.extra_info["steps_per_second"] = round(rows / benchmark.stats.stats.median)


@pytest.mark.parametrize("rows", [64, 512])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_collection_loop(benchmark, rows, compiled, tmp_path):
    """Policy, exploration, transforms, lake, trial assembly and writing to the replay buffer."""
    env = make_trial_env(MetaFrozenLake(batch_size=(rows,), seed=0), episodes=5)
    policy = make_policy(env, context_length=45, exploration={}, preset="paper", **SMALL)
    if compiled:
        policy.compile(options={"cpp_wrapper": True})
    buffer = make_trial_buffer(
        rows * 45 * 8, slice_length=45, batch_size=32, path=tmp_path / "replay"
    )
    collector = TrialCollector(env, policy, frames_per_batch=rows * 45, replay_buffer=buffer)
    batches = iter(collector)
    benchmark.pedantic(lambda: next(batches), rounds=8, warmup_rounds=3)
    benchmark.extra_info["env_steps_per_second"] = round(rows * 45 / benchmark.stats.stats.median)
    collector.shutdown()
