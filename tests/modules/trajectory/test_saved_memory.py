"""Memory saved in mid-trial and loaded elsewhere continues exactly."""

from __future__ import annotations

import copy
import io

import pytest
import torch

from tests.modules.trajectory.helpers import random_trials, sequence_states, take_steps
from tests.modules.trajectory.test_contract import build, every_encoder
from torchrl_amago.modules.trajectory import GRUEncoder, TransformerEncoder


def through_a_file(state):
    """Save and load with weights only: nothing but tensors and plain values pass."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@every_encoder
@pytest.mark.parametrize("steps", [1, 70])
@torch.no_grad()
def test_continues_exactly(name, steps):
    encoder = build(name).eval()
    trials = random_trials(3, steps + 20)
    past, future = ([z[:, :steps] for z in trials], [z[:, steps:] for z in trials])
    _, stream = take_steps(encoder, *past)
    state = through_a_file(encoder.memory_state_dict())
    expected, _ = take_steps(encoder, *future, stream)
    other = copy.deepcopy(encoder)
    other.load_memory_state_dict(state)
    states, again = take_steps(other, *future, stream)
    assert torch.equal(states, expected)
    # Encoders without memory take no stream.
    assert (again is stream is None) or torch.equal(again, stream)
    # The saved tensors aren't shared with either of them.
    other.load_memory_state_dict(state)
    assert torch.equal(take_steps(other, *future, stream)[0], expected)


@torch.no_grad()
def test_every_rollout_is_saved_and_the_oldest_leave_first():
    encoder, other = (GRUEncoder(4, d_model=8, max_streams=n) for n in (8, 2))
    other.load_state_dict(encoder.state_dict())
    rollouts = [random_trials(n, 6, reset_fraction=0.0) for n in (1, 2, 3)]
    streams = [take_steps(encoder, *(z[:, :3] for z in trials))[1] for trials in rollouts]
    # The first is used again, so that the second is now the oldest.
    encoder._streams.find(int(streams[0][0]))
    state = encoder.memory_state_dict()
    assert state["streams"].tolist() == [int(streams[i][0]) for i in (1, 2, 0)]
    other.load_memory_state_dict(state)
    for i in (0, 2):
        rest = [z[:, 3:] for z in rollouts[i]]
        expected, _ = take_steps(encoder, *rest, streams[i])
        assert torch.equal(take_steps(other, *rest, streams[i])[0], expected)
    with pytest.warns(UserWarning, match="raise max_streams, now 2"):
        take_steps(other, *(z[:, 3:4] for z in rollouts[1]), streams[1])


@pytest.mark.parametrize("changed", [False, True])
@torch.no_grad()
def test_memory_that_restarts_with_new_weights_does_so_after_loading(changed):
    encoder = GRUEncoder(4, d_model=8, on_weight_update="restart")
    x, time_idx, is_init = random_trials(2, 8, reset_fraction=0.0)
    _, stream = take_steps(encoder, x[:, :4], time_idx[:, :4], is_init[:, :4])
    if changed:
        for p in encoder.parameters():
            p.mul_(1.1)
    other = copy.deepcopy(encoder)
    other.load_memory_state_dict(through_a_file(encoder.memory_state_dict()))
    rest = (x[:, 4:], time_idx[:, 4:], is_init[:, 4:])
    states, _ = take_steps(other, *rest, stream)
    assert torch.equal(states, take_steps(encoder, *rest, stream)[0])
    fresh = sequence_states(encoder, *rest)
    assert torch.allclose(states, fresh, rtol=1e-5, atol=1e-5) == changed


@torch.no_grad()
def test_bfloat16_memory_keeps_its_dtype():
    encoder = TransformerEncoder(4, context_length=9, d_model=8, num_heads=2, num_layers=1)
    trials = random_trials(2, 8)
    with torch.autocast("cpu", torch.bfloat16):
        _, stream = take_steps(encoder, *(z[:, :5] for z in trials))
        state = encoder.memory_state_dict()
        other = copy.deepcopy(encoder)
        other.load_memory_state_dict(through_a_file(state))
        rest = [z[:, 5:] for z in trials]
        states, _ = take_steps(other, *rest, stream)
        assert torch.equal(states, take_steps(encoder, *rest, stream)[0])
    assert state["memories"]["0"]["memory"]["keys.0"].dtype == torch.bfloat16


def test_memory_of_another_size_raises_and_nothing_changes():
    def make(d_model):
        return TransformerEncoder(4, context_length=9, d_model=d_model, num_heads=2, num_layers=1)

    encoder, other = make(8), make(16)
    take_steps(encoder, *random_trials(2, 3))
    _, mine = take_steps(other, *random_trials(2, 3))
    with pytest.raises(ValueError, match=r"keys.0.*\[4, 8, 64\].*got.*\[4, 4, 64\]"):
        other.load_memory_state_dict(encoder.memory_state_dict())
    assert other.memory_state_dict()["streams"].tolist() == [int(mine[0])]


def test_without_rollouts_there_is_nothing_to_save():
    encoder = GRUEncoder(4, d_model=8)
    state = encoder.memory_state_dict()
    assert state["streams"].shape == (0,)
    take_steps(encoder, *random_trials(2, 3))
    encoder.load_memory_state_dict(state)
    assert len(encoder.memory_state_dict()["streams"]) == 0
