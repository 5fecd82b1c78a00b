"""The trial collector writes what TorchRL's own does, step for step."""

from __future__ import annotations

import pytest
import torch
from tensordict import assert_close
from torchrl.collectors import Collector

from torchrl_amago import MetaFrozenLake, make_policy, make_trial_buffer, make_trial_env
from torchrl_amago.data import TrialCollector


def collect(kind, rounds, frames, reset_at=(), **options):
    torch.manual_seed(0)
    env = make_trial_env(MetaFrozenLake(batch_size=(5,), seed=0), episodes=2)
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 1}
    policy = make_policy(env, context_length=18, seq_model_options=sizes, exploration={})
    buffer = make_trial_buffer(2000, slice_len=18, batch_size=4, warn_short=False)
    collector = kind(env, policy, frames_per_batch=frames, replay_buffer=buffer, **options)
    batches = iter(collector)
    sizes = []
    for i in range(rounds):
        assert next(batches) is None
        sizes.append(len(buffer))
        if i in reset_at:
            collector.reset(reset_at[i])
    collector.shutdown()
    return sizes, buffer[:].exclude("_stream", ("collector", "traj_ids"))


@pytest.mark.parametrize("frames", [5, 35, 90])
@pytest.mark.parametrize("reset_at", [{}, {2: None, 4: None}, {1: [0, 3], 4: [2]}])
def test_writes_what_torchrls_does(frames, reset_at):
    rounds = 6 + 250 // frames
    ours = collect(TrialCollector, rounds, frames, reset_at)
    theirs = collect(Collector, rounds, frames, reset_at, trajs_per_batch=1)
    assert ours[0] == theirs[0]
    assert ours[0][-1] > 20
    assert_close(ours[1], theirs[1], rtol=0, atol=0)


def test_may_start_anew_in_each_batch():
    ours = collect(TrialCollector, 6, 60, reset_at_each_iter=True)
    theirs = collect(Collector, 6, 60, reset_at_each_iter=True, trajs_per_batch=1)
    assert_close(ours[1], theirs[1], rtol=0, atol=0)
