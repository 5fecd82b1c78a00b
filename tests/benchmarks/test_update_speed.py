"""Milliseconds of one whole update: loss, backward, clipping, optimiser, targets.

    python -m pytest tests/benchmarks/test_update_speed.py

`small` is the first example's network, `default` the published one (d 256, 3 layers, heads of 256).
"""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from torchrl_amago import (
    AMAGOLoss,
    MetaFrozenLake,
    make_critic,
    make_optimizer,
    make_policy,
    make_trial_env,
)

SIZES = {
    "small": {
        "seq_model_options": {"d_model": 64, "num_layers": 2, "num_heads": 4},
        "timestep_options": {"hidden_size": 64, "output_size": 64},
        "hidden_size": 64,
    },
    "default": {"seq_model_options": {}, "timestep_options": {}, "hidden_size": 256},
}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("steps", [64, 250])
def test_update(benchmark, size, steps):
    rows, options = 24, dict(SIZES[size])
    hidden_size = options.pop("hidden_size")
    lake = MetaFrozenLake(batch_size=(rows,), max_episode_steps=9, seed=0)
    env = make_trial_env(lake, episodes=10**6)  # a trial that doesn't end
    policy = make_policy(
        env, context_length=steps, actor_options={"hidden_size": hidden_size}, **options
    )
    loss = AMAGOLoss(
        policy.encoder, policy.actor, make_critic(policy, env, hidden_size=hidden_size)
    )
    target_update = SoftUpdate(loss, tau=0.003)
    optimizer = make_optimizer(loss)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    batch = env.rollout(steps, break_when_any_done=False)
    batch["collector"] = TensorDict(
        mask=torch.ones(rows, steps, dtype=torch.bool), batch_size=[rows, steps]
    )

    def update():
        out = loss(batch)
        (out["loss_actor"] + out["loss_qvalue"]).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        target_update.step()

    benchmark.pedantic(update, rounds=10, warmup_rounds=2)
    seconds = benchmark.stats.stats.median
    benchmark.extra_info["steps_per_second"] = round(rows * steps / seconds)
