"""A policy's file: what it holds, and who may read it."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
from torchrl_amago._files import DamagedError
from torchrl_amago._state_file import save_state
from torchrl_amago.modules import load_policy, save_policy

SMALL = {"seq_model": "gru", "seq_model_options": {"d_model": 8}}


def weights_of(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: x.detach().clone() for name, x in module.state_dict().items()}


def windowed(window):
    """A policy with a setting that no shape shows."""
    policy = nn.Linear(2, 1)
    policy.settings = {"window": window, "discounts": (0.9, 0.99)}
    return policy


@pytest.mark.parametrize(
    ("saved", "other", "message"),
    [
        (windowed(8), windowed(16), "differ in 1 entries: window: 8 there, 16 here"),
        (
            nn.Linear(3, 2),
            nn.Linear(3, 4),
            "2 entries: weights.weight.*bias: 2 float32 there, 4 float32 here",
        ),
        (nn.Linear(3, 2), nn.Linear(3, 2, bias=False), "bias: 2 float32 there, absent here"),
    ],
)
def test_another_policy_is_refused(tmp_path, saved, other, message):
    path = tmp_path / "policy.npz"
    save_policy(path, saved)
    before = weights_of(other)
    with pytest.raises(ValueError, match=message):
        load_policy(path, other)
    assert all(torch.equal(x, before[name]) for name, x in weights_of(other).items())
    load_policy(path, saved)


@pytest.mark.parametrize("damage", ["flip", "cut", "empty", "text", "another state"])
def test_damage_is_refused_and_changes_nothing(tmp_path, damage):
    path, policy = tmp_path / "policy.npz", nn.Linear(8, 8)
    save_policy(path, nn.Linear(8, 8))
    content = bytearray(path.read_bytes())
    if damage == "flip":
        content[len(content) // 2] ^= 4
    elif damage == "another state":
        save_state(path, {"weights": {}})
        content = path.read_bytes()
    new = {"cut": content[:-10], "empty": b"", "text": b"weights\n" * 50}
    path.write_bytes(new.get(damage, content))
    before = weights_of(policy)
    with pytest.raises((DamagedError, ValueError), match=r"policy\.npz must"):
        load_policy(path, policy)
    assert all(torch.equal(x, before[name]) for name, x in weights_of(policy).items())


def test_exploration_is_no_part_of_a_policy_s_weights(tmp_path):
    env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=2)
    make = lambda **options: make_policy(env, context_length=18, **SMALL, **options)  # noqa: E731
    trained, exploring, plain = make(exploration={}), make(exploration={}), make()
    trained.exploration.step(50)
    exploring.exploration.step(7)
    frames = exploring.exploration.frames.clone()
    path = tmp_path / "policy.npz"
    save_policy(path, trained)
    for other in (exploring, plain):
        assert load_policy(path, other) is other
        for a, b in zip(trained.parameters(), other.parameters(), strict=True):
            assert torch.equal(a, b)
    assert torch.equal(exploring.exploration.frames, frames)
