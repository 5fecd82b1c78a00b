"""Trials over Ray: collectors as actors, the buffer as an actor."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.data import RayReplayBuffer

from tests.data.test_torchrl_interplay import SLICE, assert_slices_are_of_one_trial, make_answer
from tests.data.trials import make_env
from torchrl_amago.data import TrialCollector, TrialReplayBuffer, TrialSliceSampler
from torchrl_amago.data.replay._storage import TrialStorage

ray = pytest.importorskip("ray")
pytestmark = [
    pytest.mark.slow,
    # Warnings of Ray itself, and of TorchRL about weights that a policy starts with anyway.
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:RayCollector iteration started before weight:UserWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
RESOURCES = {"num_cpus": 0.5}


@pytest.fixture(scope="module", autouse=True)
def cluster():
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def buffer():
    rb = RayReplayBuffer(
        replay_buffer_cls=TrialReplayBuffer, storage=partial(TrialStorage, 5000),
        sampler=partial(TrialSliceSampler, SLICE, warn_short=False), batch_size=16,
        remote_config=RESOURCES, transport="ray",
    )  # fmt: skip
    yield rb
    rb.shutdown()


# TorchRL's loop over Ray's collectors ends at once with the default total_frames=-1.
MANY = 10**9
WORKERS = {  # sync, options of the backend
    "async": (False, {}),
    "sync": (True, {}),
    "trajs_per_batch": (False, {"trajs_per_batch": 1}),
    "fragments": (False, {"collector_kwargs": {"fragment_length": SLICE}}),
}


@pytest.mark.parametrize("workers", WORKERS)
def test_actors_write_trials_and_follow_the_weights(buffer, workers):
    policy, (sync, options) = make_answer(), WORKERS[workers]
    collector = Collector(
        [make_env] * 2, policy, backend="ray", frames_per_batch=42, total_frames=MANY,
        replay_buffer=buffer, sync=sync,
        backend_options={"collector_class": TrialCollector, "remote_configs": RESOURCES, **options},
    )  # fmt: skip
    try:
        rounds = iter(collector)
        while buffer.write_count < 200:
            assert next(rounds) is None
        policy.module.weight.fill_(1.0)
        collector.update_policy_weights_()
        for _ in range(12):
            next(rounds)
        client = buffer.client()
        assert client.can_sample()
        assert buffer.sample().shape == (16, SLICE)
        if workers == "fragments":
            lengths = torch.cat([buffer.sample()["collector", "mask"].sum(1) for _ in range(9)])
            assert lengths.max() <= SLICE
        else:
            assert_slices_are_of_one_trial(buffer, draws=5)
        actions = client[:]["action"]
        assert not actions[:100].any()
        assert actions[-10:].all()
    finally:
        collector.shutdown(shutdown_ray=False)
