"""Speed at which critics learn that the state decides which action is good."""

from __future__ import annotations

import pytest
import torch

from torchrl_amago.modules.critic import ActionCritic
from torchrl_amago.modules.value_codec import HLGauss, PopArt, TwoHot, ValueCodec

STATE, BATCH, SLOPE = 64, 128, 50.0
RANGE = dict(min_return=-400.0, max_return=0.0, symlog=False)


def learned_fraction(codec: ValueCodec, updates: int, **options) -> float:
    """Return the learned fraction of the action's effect in `Q(s, a) = -200 + 50 a s[0]`."""
    torch.manual_seed(0)
    outputs = codec.event_shape.numel() if codec.event_shape else None
    critic = ActionCritic(STATE, 1, [0.9], num_outputs=outputs, hidden_size=64, **options)
    critic.set_output(slope=codec.initial_slope())
    optimizer = torch.optim.AdamW(critic.parameters(), 1e-3)
    everything = torch.ones(BATCH, 1, dtype=torch.bool)
    for _ in range(updates):
        state, action = torch.randn(BATCH, STATE).clamp(-4, 4), 2.0 * torch.rand(BATCH, 1, 1) - 1.0
        target = -200.0 + SLOPE * action[..., 0] * state[:, :1]
        codec.update(target, everything)
        optimizer.zero_grad()
        codec.loss(critic(state, action), target).mean().backward()
        optimizer.step()
    state, ends = torch.randn(BATCH, STATE), torch.tensor([-0.9, 0.9]).view(2, 1, 1, 1)
    with torch.no_grad():
        low, high = codec.decode(critic(state, ends.expand(2, BATCH, 1, 1))).mean((-2, -1))
    truth = 1.8 * SLOPE * state[:, 0]
    return float((high - low) @ truth / truth.square().sum())


def test_classification_overlooks_actions_at_first():
    assert learned_fraction(TwoHot(1, **RANGE), 250) < 0.02


@pytest.mark.parametrize("make", [TwoHot, HLGauss])
def test_ordered_weights_and_a_gain_show_them(make):
    codec = make(1, init_slope=10.0, **RANGE)
    assert learned_fraction(codec, 250, action_gain=8.0) > 0.5


def test_a_gain_helps_regression_too():
    fractions = [
        learned_fraction(PopArt(1, beta=0.01), 250, action_gain=action_gain)
        for action_gain in (1.0, 8.0)
    ]
    assert fractions[1] > 2 * fractions[0]
