"""A trial collector stopped in mid-trial goes on elsewhere as if it had never stopped."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict, assert_close
from torchrl.collectors import Collector
from torchrl.envs import GymEnv, RewardSum, SerialEnv

from tests.evaluation.scripted import act
from tests.modules.trajectory.test_saved_memory import through_a_file
from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
from torchrl_amago.data import TrialCollector
from torchrl_amago.envs.tasks import DarkKeyDoor, MazeRunner, TMaze

ENCODERS = {
    "transformer": {"d_model": 16, "num_heads": 2, "num_layers": 1},
    "gru": {"d_model": 16, "num_layers": 1},
    "lstm": {"d_model": 16, "num_layers": 2},
    "mamba": {"d_model": 16, "num_layers": 1},
    "linear_attention": {"d_model": 16, "num_layers": 1, "num_heads": 2},
    "feedforward": {"d_model": 16, "num_layers": 1},
}
TASKS = {
    "lake": lambda seed: make_trial_env(MetaFrozenLake(batch_size=(5,), seed=seed), episodes=3),
    "door": lambda seed: make_trial_env(DarkKeyDoor(batch_size=(4,), seed=seed), episodes=2),
    "maze": lambda seed: make_trial_env(MazeRunner(batch_size=(3,), seed=seed), horizon=70),
    "tmaze": lambda seed: make_trial_env(TMaze(8, batch_size=(6,), seed=seed), episodes=2),
    "two dimensions": lambda seed: make_trial_env(
        MetaFrozenLake(batch_size=(2, 3), seed=seed), episodes=2
    ).append_transform(RewardSum()),
}  # fmt: skip


class Recorder(list):
    """In place of a buffer: keeps what is written."""

    def extend(self, trials, lengths=None):
        self.append((trials.clone(), lengths))


def make_collector(task="lake", encoder="gru", seed=0, rounds=0, **options):
    """A collector that has collected so many batches."""
    torch.manual_seed(seed)
    env = TASKS[task](seed)
    model = {"seq_model": encoder, "seq_model_options": ENCODERS[encoder]}
    policy = make_policy(env, context_length=40, exploration={"horizon": 40}, **model)
    options |= {"replay_buffer": Recorder(), "frames_per_batch": 7 * env.batch_size.numel()}
    collector = TrialCollector(env, policy, **options)
    collect(collector, rounds)
    return collector


def collect(collector, batches):
    written = collector.replay_buffer
    begin, rounds = len(written), iter(collector)
    for _ in range(batches):
        next(rounds)
    return written[begin:]


def assert_same(found, expected):
    assert len(found) == len(expected) > 0
    for (trials, lengths), (expected_trials, expected_lengths) in zip(found, expected, strict=True):
        assert lengths == expected_lengths
        assert_close(trials, expected_trials, rtol=0, atol=0, equal_nan=False)


@pytest.mark.parametrize(
    ("task", "encoder", "options"),
    [
        *(("lake", encoder, {}) for encoder in ENCODERS),
        *((task, "gru", {}) for task in TASKS if task != "lake"),
        *((task, "gru", {"fragment_length": 6}) for task in ("lake", "maze", "two dimensions")),
    ],
)
def test_goes_on_as_if_it_had_never_stopped(task, encoder, options):
    collector = make_collector(task, encoder, seed=0, rounds=5, **options)
    state, rng = through_a_file(collector.state_dict()), torch.get_rng_state()
    expected = collect(collector, 10)
    other = make_collector(task, encoder, seed=1, rounds=2, **options)
    other.load_state_dict(state)
    torch.set_rng_state(rng)
    assert_same(collect(other, 10), expected)
    remembers, in_progress = encoder != "feedforward", state["in_progress"]
    assert (len(in_progress["memories"]["0"]["streams"]) > 0) == remembers
    assert len(in_progress["pending"]["action"]) > 0
    assert (len(in_progress["begun"]) > 0) == bool(options)


def test_state_is_not_shared_with_the_collector():
    collector = make_collector(rounds=5)
    state = collector.state_dict()["in_progress"]
    before = through_a_file(state)
    collect(collector, 3)
    for key in ("carrier", "pending", "memories"):
        assert_close(TensorDict(state[key]), TensorDict(before[key]), rtol=0, atol=0)
    assert torch.equal(before["env"]["_num_steps"], state["env"]["_num_steps"])


@pytest.mark.parametrize("rows", [[1], [0, 3]])
def test_rows_reset_right_after_loading(rows):
    collector = make_collector(rounds=5)
    state = through_a_file(collector.state_dict())
    other = make_collector(seed=1)
    other.load_state_dict(state)
    found = []
    for each in (collector, other):
        torch.manual_seed(2)
        each.reset(rows)
        found.append(collect(each, 12))
    assert_same(*found)


def test_without_state_of_the_environment_trials_begin_anew():
    lakes = SerialEnv(2, lambda: MetaFrozenLake(batch_size=(2,), seed=0))
    for env in (lakes, GymEnv("CartPole-v1")):
        options = {"replay_buffer": Recorder(), "frames_per_batch": 20, "total_frames": -1}
        collector = TrialCollector(env, env.rand_action, **options)
        collect(collector, 2)
        state = collector.state_dict()
        assert "in_progress" not in state
        collector.load_state_dict(state, strict=False)
        collector.reset()
        for trials, _ in collect(collector, 15):
            ids = trials["collector", "traj_ids"]
            # Each trial is whole: as many ends as there are trials.
            assert trials["next", "done"].sum() == len(ids.unique())
        collector.shutdown()


def test_loading_drops_the_steps_that_wait():
    collector = make_collector(rounds=4)
    state = collector.state_dict()
    del state["in_progress"]
    collector.load_state_dict(state)
    collector.reset()
    ids = [trials["collector", "traj_ids"] for trials, _ in collect(collector, 14)]
    assert int(torch.cat(ids).min()) >= int(state["traj_pool"]["traj_id"])


def test_another_environment_raises():
    collector, other = (make_collector(task) for task in ("lake", "door"))
    before = through_a_file(other.state_dict()["traj_pool"])
    with pytest.raises(ValueError, match=r"batch size \[5\], got DarkKeyDoor with \[4\]"):
        other.load_state_dict(collector.state_dict())
    assert other.state_dict()["traj_pool"] == before
    options = {"replay_buffer": Recorder(), "frames_per_batch": 4}
    third = TrialCollector(GymEnv("CartPole-v1"), act, **options)
    with pytest.raises(ValueError, match="only in an environment that can load its state"):
        third.load_state_dict(collector.state_dict())


def test_torchrls_collector_loads_the_rest():
    collector = make_collector(rounds=5)
    state = collector.state_dict()
    policy = make_collector(seed=1).policy
    other = Collector(TASKS["lake"](1), policy, frames_per_batch=5)
    other.load_state_dict(state)
    assert other.state_dict()["frames"] == state["frames"]
    for name, value in policy.state_dict().items():
        assert torch.equal(value, state["policy_state_dict"][name])
