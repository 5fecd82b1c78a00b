"""Every way through TorchRL's collectors and buffers ends in the same batches of slices."""

from __future__ import annotations

import itertools
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from tensordict.nn import TensorDictModule
from torch import nn
from torchrl.collectors import Collector, MultiCollector
from torchrl.data import ReplayBufferEnsemble
from torchrl.objectives import SoftUpdate

from tests.data import trials
from tests.data.trials import LENGTHS, assert_stored_trials_are_whole, found_trials, make_env
from tests.processes import fork_workers
from torchrl_amago import MetaFrozenLake, TrialCollector, amago_loss, make_policy, make_trial_env

SLICE = 8


class Answer(nn.Module):
    """Says the same number always: the weight."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()), requires_grad=False)

    def forward(self, observation):
        return self.weight.expand(observation.shape[:-1]).long()


def make_answer():
    return TensorDictModule(Answer(), ["observation"], ["action"])


def make_buffer(kind, capacity, **options):
    options |= {"capacity": capacity, "slice_length": SLICE, "batch_size": 16}
    make = trials.make_buffer if kind == "trials" else partial(trials.stock_buffer, kind)
    return make(**options)


def flatten(batch):
    return batch.reshape(-1)


COLLECTORS = {
    "stock": partial(Collector, trajs_per_batch=1),
    "stock, steps": partial(Collector, postproc=flatten),
    "trials": TrialCollector,
    "fragments": partial(TrialCollector, fragment_length=4),
}
BUFFERS = ["tensor", "memmap", "trials"]
# A buffer of trials takes whole trials, and fragments count as such.
PAIRS = [*itertools.product(BUFFERS[:2], COLLECTORS), ("trials", "stock"), ("trials", "trials")]


def writing(collector, rb, rounds):
    options = {"frames_per_batch": 12, "total_frames": 12 * rounds, "replay_buffer": rb}
    return collector(make_env(), make_answer(), **options)


def whole_trials(rb) -> list[tuple[int, ...]]:
    """Slots of the trials that are whole, by looking at every step."""
    steps = rb[:]
    found = []
    for trajectory in steps["collector", "traj_ids"].unique().tolist():
        slots = (steps["collector", "traj_ids"] == trajectory).nonzero().squeeze(-1)
        step, order = (steps["next", "reward"][slots].flatten() % 100).sort()
        slots, is_begun = slots[order], step.tolist() == [*range(len(step))]
        if is_begun and steps["next", "done"][slots[-1]]:
            found.append(tuple(slots.tolist()))
    return sorted(found)


def assert_slices_are_of_one_trial(rb, draws=25):
    """Each row is a window of one whole trial, real where the mask says so, nothing left out."""
    seen = set()
    for _ in range(draws):
        batch = rb.sample()
        assert batch.shape == (16, SLICE)
        mask, reward = batch["collector", "mask"], batch["next", "reward"].squeeze(-1)
        length, step = reward // 100, reward % 100
        first = mask.int().argmax(1, keepdim=True)
        first_length = length.gather(1, first)
        place = torch.arange(mask.shape[1]) - first  # in the slice
        assert (length == first_length)[mask].all()
        assert (step == step.gather(1, first) + place)[mask].all()
        assert (batch["time_idx"].squeeze(-1) == step)[mask].all()
        assert (batch["is_init"].squeeze(-1) == (step == 0))[mask].all()
        assert (batch["next", "done"].squeeze(-1) == (step == length - 1))[mask].all()
        if ("collector", "traj_ids") in batch.keys(True):
            numbers = batch["collector", "traj_ids"]
            assert (numbers == numbers.gather(1, first))[mask].all()
        assert torch.equal(mask.sum(1, keepdim=True), first_length.clamp(max=SLICE).long())
        seen |= set(first_length.flatten().int().tolist())
    return seen


@pytest.mark.parametrize("capacity", [31, 1000])
@pytest.mark.parametrize(("kind", "collector"), PAIRS)
def test_slices_of_what_a_collector_wrote(kind, collector, capacity):
    """Batches cut trials into pieces that lie apart, and the ring overwrites first steps."""
    rb, checked = make_buffer(kind, capacity), 0
    for _ in writing(COLLECTORS[collector], rb, rounds=30):
        if not len(rb):
            continue
        if kind == "trials":
            assert_stored_trials_are_whole(rb)
        else:
            assert found_trials(rb) == whole_trials(rb)
        if rb.can_sample() or collector == "trials":
            checked += 1
            seen = assert_slices_are_of_one_trial(rb, draws=2)
    assert checked > 20
    assert rb.write_count > 12 * 30 - 3 * 12
    if capacity == 1000:
        seen |= assert_slices_are_of_one_trial(rb)
        assert seen == set(itertools.chain(*LENGTHS))
        assert len(rb) == rb.write_count
    else:
        assert len(rb) == 31 or (kind == "trials" and 31 - 2 * 12 < len(rb) < 31)


def test_buffer_of_batches_instead_of_steps_raises():
    """A batched environment's collector by itself writes items of [T] steps."""
    rb = make_buffer("tensor", 100)
    list(writing(Collector, rb, rounds=2))
    message = r"must be one step, and is a batch \[4\] of steps.*trajs_per_batch=1"
    with pytest.raises(ValueError, match=message):
        rb.sample()


# --- several processes ---

SYNC, ASYNC = {"sync": True}, {"sync": False, "trajs_per_batch": 1}
OURS = {"collector_class": TrialCollector}
FRAGMENTS = {"collector_class": COLLECTORS["fragments"]}
WORKERS = {
    "trials, sync": (MultiCollector, SYNC | OURS, "trials"),
    "trials, async": (MultiCollector, ASYNC | OURS, "memmap"),
    "fragments, async": (MultiCollector, ASYNC | FRAGMENTS, "memmap"),
    "stock, sync": (MultiCollector, SYNC | {"trajs_per_batch": 1}, "trials"),
    "stock, async": (MultiCollector, ASYNC, "memmap"),
    "backend": (Collector, {"backend": "process", "backend_options": OURS}, "trials"),
}


@pytest.mark.slow
@pytest.mark.parametrize("workers", WORKERS)
def test_workers_write_trials_and_follow_the_weights(workers, monkeypatch):
    fork_workers(monkeypatch)
    make, options, kind = WORKERS[workers]
    policy, rb = make_answer(), make_buffer(kind, 5000)
    options = {"frames_per_batch": 42, "total_frames": -1, "replay_buffer": rb, **options}
    collector = make([make_env] * 2, policy, **options)
    try:
        rounds = iter(collector)
        while len(rb) < 200:
            assert next(rounds) is None
            if kind == "trials":
                assert_stored_trials_are_whole(rb)
        assert_slices_are_of_one_trial(rb)
        assert not rb[:]["action"].any()
        policy.module.weight.fill_(1.0)
        collector.update_policy_weights_()
        deadline = time.monotonic() + 60
        # Trials that were under way hold actions of both.
        while not rb[:]["action"][-20:].all():
            assert time.monotonic() < deadline
            next(rounds)
        assert_slices_are_of_one_trial(rb)
    finally:
        collector.shutdown()


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "sync"), [("tensor", True), ("memmap", False)])
def test_the_ring_of_other_processes(kind, sync, monkeypatch):
    """The sampler sees what they write."""
    fork_workers(monkeypatch)
    rb, seen = make_buffer(kind, 150, is_shared=True), set()
    rb.share()
    collector = MultiCollector(
        [make_env] * 2, make_answer(), frames_per_batch=24, total_frames=24 * 25,
        replay_buffer=rb, sync=sync, use_buffers=False, postproc=flatten,
    )  # fmt: skip
    try:
        for _ in collector:
            if len(rb) and rb.can_sample():
                if sync:
                    assert found_trials(rb) == whole_trials(rb)
                    assert_slices_are_of_one_trial(rb, draws=1)
                seen |= set(rb.sample()["collector", "traj_ids"].unique().tolist())
    finally:
        collector.shutdown()
    assert len(seen) > 20


# --- several buffers ---


@pytest.mark.parametrize("kinds", [("trials", "trials"), ("tensor", "memmap")])
@pytest.mark.parametrize("p", [None, [0.9, 0.1]])
def test_ensemble_of_buffers(kinds, p):
    members = [make_buffer(kind, 1000) for kind in kinds]
    for member in members:
        list(writing(TrialCollector, member, rounds=10))
    batch = ReplayBufferEnsemble(*members, p=p, num_buffer_sampled=4, batch_size=16).sample()
    assert batch.shape[:2] == (4, 4)
    assert_slices_are_of_one_trial(SimpleNamespace(sample=lambda: batch.reshape(16, -1)), draws=1)


# --- into the loss ---


@pytest.mark.parametrize(("kind", "collector"), [pair for pair in PAIRS if "fragments" not in pair])
def test_batches_feed_the_loss(kind, collector):
    env = make_trial_env(MetaFrozenLake(batch_size=(4,), seed=0), episodes=2)
    sizes = {"d_model": 16, "num_layers": 1}
    policy = make_policy(env, context_length=18, seq_model="gru", seq_model_options=sizes)
    loss = amago_loss(policy)
    SoftUpdate(loss, tau=0.1)
    rb = make_buffer(kind, 150)
    options = {"frames_per_batch": 40, "total_frames": 200, "replay_buffer": rb}
    list(COLLECTORS[collector](env, policy, **options))
    total = sum(value for key, value in loss(rb.sample()).items() if key.startswith("loss_"))
    total.backward()
    assert total.isfinite()
    assert all(p.grad.isfinite().all() for p in policy.parameters() if p.grad is not None)
