"""Milliseconds of one whole update: loss, backward, clipping, optimiser, targets.

    python -m pytest tests/benchmarks/test_update_speed.py

`small` is the first example's network, `medium` has d 128 and 3 layers of 8 heads, `default` is the published
one (d 256). Heads have two layers of 256 but for `small`.
"""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.objectives import SoftUpdate

from tests.toy_env import ACTIONS, Toy
from torchrl_amago import make_optimizer, make_policy, make_trial_env
from torchrl_amago.modules import DISCOUNTS
from torchrl_amago.objectives import LOSSES

SIZES = {
    "small": {
        "seq_model_options": {"d_model": 64, "num_layers": 2, "num_heads": 4},
        "timestep_options": {"hidden_size": 64, "output_size": 64},
        "actor_options": {"hidden_size": 64},
    },
    "medium": {"seq_model_options": {"d_model": 128}},
    "default": {},
}


@pytest.mark.parametrize("size", ["small", "default"])
@pytest.mark.parametrize("steps", [64, 250])
def test_update(benchmark, size, steps):
    time_update(benchmark, make_update(torch.ones(24, steps, dtype=torch.bool), size), 24 * steps)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("actions", ["categorical", "continuous"])
@pytest.mark.parametrize("steps", [64, 250])
def test_update_of_every_kind(benchmark, actions, loss, steps):
    update = make_update(torch.ones(24, steps, dtype=torch.bool), actions=actions, loss=loss)
    time_update(benchmark, update, 24 * steps)


@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize(
    ("discounts", "critics", "steps"),
    [(1, 4, 64), (3, 4, 64), (7, 2, 64), (7, 4, 64), (7, 8, 64), (7, 4, 32), (7, 4, 128)],
)
def test_growth(benchmark, loss, discounts, critics, steps):
    """With discounts, critics and steps, of continuous actions."""
    update = make_update(
        torch.ones(24, steps, dtype=torch.bool),
        actions="continuous",
        loss=loss,
        discounts=DISCOUNTS[-discounts:],
        num_critics=critics,
    )
    time_update(benchmark, update, 24 * steps)


@pytest.mark.parametrize("half", [False, True])
@pytest.mark.parametrize("steps", [100, 250])
def test_update_in_half_precision(benchmark, steps, half):
    """Under bfloat16 autocast, or not."""
    update = make_update(torch.ones(24, steps, dtype=torch.bool), half=half)
    time_update(benchmark, update, 24 * steps)


@pytest.mark.parametrize("compact", [False, True])
def test_update_with_padding(benchmark, compact):
    """Trials of 16 to 64 steps: what it saves to run heads and equations on real steps alone."""
    lengths = torch.linspace(16, 64, 24).long()
    mask = torch.arange(64) < lengths[:, None]
    time_update(benchmark, make_update(mask, compact=compact), int(mask.sum()))


@pytest.mark.parametrize("preset", ["paper", "robust"])
def test_update_of_a_preset(benchmark, preset):
    """Normalised states, layer norm in critics and the scale of values, or what is published."""
    update = make_update(torch.ones(32, 45, dtype=torch.bool), size="small", preset=preset)
    time_update(benchmark, update, 32 * 45)


def time_update(benchmark, update, steps: int) -> None:
    benchmark.pedantic(update, rounds=8, warmup_rounds=2)
    benchmark.extra_info["steps_per_second"] = round(steps / benchmark.stats.stats.median)


def make_update(
    mask_BT: torch.Tensor,
    size: str = "medium",
    actions: str = "categorical",
    loss: str = "amago",
    discounts: tuple[float, ...] = DISCOUNTS,
    num_critics: int = 4,
    half: bool = False,
    preset: str = "paper",
    **loss_options,
):
    rows, steps = mask_BT.shape
    env = make_trial_env(Toy(ACTIONS[actions], rows), horizon=10**6)  # a trial that doesn't end
    policy = make_policy(
        env, context_length=steps, discounts=discounts, preset=preset, **SIZES[size]
    )
    critic_options = {"num_critics": num_critics, **SIZES[size].get("actor_options", {})}
    options = dict(preset=preset, critic_options=critic_options, **loss_options)
    loss = LOSSES[loss](policy, **options)
    target_update = SoftUpdate(loss, tau=0.003)
    optimizer = make_optimizer(loss)
    params = [p for group in optimizer.param_groups for p in group["params"]]
    batch = env.rollout(steps, break_when_any_done=False)
    batch["collector"] = TensorDict(mask=mask_BT, batch_size=[rows, steps])

    def update():
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            out = loss(batch)
        (out["loss_actor"] + out["loss_qvalue"]).backward()
        torch.nn.utils.clip_grad_norm_(params, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        target_update.step()

    return update
