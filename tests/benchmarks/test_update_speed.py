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
    MetaFrozenLake,
    amago_loss,
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
    update = make_update(size, torch.ones(24, steps, dtype=torch.bool))
    benchmark.pedantic(update, rounds=10, warmup_rounds=2)
    benchmark.extra_info["steps_per_second"] = round(24 * steps / benchmark.stats.stats.median)


@pytest.mark.parametrize("compact", [False, True])
def test_update_with_padding(benchmark, compact):
    """Trials of 16 to 64 steps: what it saves to run heads and equations on real steps alone."""
    lengths = torch.linspace(16, 64, 24).long()
    update = make_update("small", torch.arange(64) < lengths[:, None], hidden=256, compact=compact)
    benchmark.pedantic(update, rounds=10, warmup_rounds=2)


def make_update(size: str, mask_BT: torch.Tensor, hidden: int | None = None, **loss_options):
    (rows, steps), options = mask_BT.shape, dict(SIZES[size])
    hidden_size = options.pop("hidden_size") if hidden is None else hidden
    options.pop("hidden_size", None)
    lake = MetaFrozenLake(batch_size=(rows,), max_episode_steps=9, seed=0)
    env = make_trial_env(lake, episodes=10**6)  # a trial that doesn't end
    policy = make_policy(
        env, context_length=steps, actor_options={"hidden_size": hidden_size}, **options
    )
    loss = amago_loss(policy, critic_options={"hidden_size": hidden_size}, **loss_options)
    target_update = SoftUpdate(loss, tau=0.003)
    optimizer = make_optimizer(loss)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    batch = env.rollout(steps, break_when_any_done=False)
    batch["collector"] = TensorDict(mask=mask_BT, batch_size=[rows, steps])

    def update():
        out = loss(batch)
        (out["loss_actor"] + out["loss_qvalue"]).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        target_update.step()

    return update
