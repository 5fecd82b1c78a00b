"""The trial collector writes what TorchRL's own does, step for step."""

from __future__ import annotations

import pytest
import torch
from torchrl.collectors import Collector
from torchrl.data import LazyTensorStorage, ReplayBuffer
from torchrl.envs import GymEnv, RenameTransform, TransformedEnv

from tests.data.trials import assert_columns, assert_same, make_buffer, make_env, stored_trials
from tests.evaluation.scripted import act
from tests.processes import wait_for
from torchrl_amago import MetaFrozenLake, make_policy, make_trial_buffer, make_trial_env
from torchrl_amago.data import TrialCollector

ENDLESS = [1000]  # lengths of trials


def collect(kind, rounds, frames, reset_at=(), **options):
    torch.manual_seed(0)
    env = make_trial_env(MetaFrozenLake(batch_size=(5,), seed=0), episodes=2)
    sizes = {"d_model": 16, "num_heads": 2, "num_layers": 1}
    policy = make_policy(env, context_length=18, seq_model_options=sizes, exploration={})
    buffer = make_trial_buffer(2000, slice_length=18, batch_size=4, warn_short=False)
    collector = kind(env, policy, frames_per_batch=frames, replay_buffer=buffer, **options)
    batches = iter(collector)
    sizes = []
    for i in range(rounds):
        assert next(batches) is None
        sizes.append(len(buffer))
        if i in reset_at:
            collector.reset(reset_at[i])
    collector.shutdown()
    return sizes, buffer[:]


@pytest.mark.parametrize("frames", [5, 35, 60])
@pytest.mark.parametrize("reset_at", [{}, {2: None, 4: None}, {1: [0, 3], 4: [2]}])
def test_writes_what_torchrls_does(frames, reset_at):
    rounds = 6 + 100 // frames
    ours = collect(TrialCollector, rounds, frames, reset_at)
    theirs = collect(Collector, rounds, frames, reset_at, trajs_per_batch=1)
    assert ours[0] == theirs[0]
    assert ours[0][-1] > 20
    assert_same(ours[1], theirs[1])


def test_may_start_anew_in_each_batch():
    ours = collect(TrialCollector, 6, 60, reset_at_each_iter=True)
    theirs = collect(Collector, 6, 60, reset_at_each_iter=True, trajs_per_batch=1)
    assert_same(ours[1], theirs[1])


def scripted(lengths, rows, frames, total_frames, **options):
    """A collector of these trials in every row, and its buffer."""
    buffer = make_buffer(capacity=5000)
    options |= {"frames_per_batch": frames, "total_frames": total_frames}
    return TrialCollector(make_env([lengths] * rows), act, replay_buffer=buffer, **options), buffer


@pytest.mark.parametrize("frames", [4, 20, 100])
@pytest.mark.parametrize("stagger", [False, True])
def test_endless_trials_are_written_in_fragments_with_their_true_time(frames, stagger):
    collector, buffer = scripted(ENDLESS, 4, frames, 400, fragment_length=10, stagger=stagger)
    counts = [buffer.num_trials for _ in collector]
    if frames == 4:  # staggered fragments come one after another
        assert torch.tensor(counts).diff().max() == (1 if stagger else 4)
    firsts = []
    for fragment in stored_trials(buffer):
        first, length = int(fragment["time_idx"][0]), len(fragment)
        time = range(first, first + length)
        assert_columns(fragment, time_idx=time, is_init=[t == 0 for t in time])
        reward = [100.0 * ENDLESS[0] + t for t in time]
        assert_columns(fragment["next"], reward=reward, done=[False] * length)
        if first == 0:
            firsts.append(length)
        else:
            assert length == 10
    assert sorted(firsts) == ([3, 5, 8, 10] if stagger else [10] * 4)
    # 100 steps of each row, of which less than a fragment waits in the collector.
    assert 4 * 90 < len(buffer) <= 400


@pytest.mark.parametrize("stagger", [False, True])
def test_fragments_of_trials_that_end_join_to_those_trials(stagger):
    collector, buffer = scripted([9, 3, 4, 1, 13], 2, 28, 840, fragment_length=4, stagger=stagger)
    list(collector)
    whole = []
    # Fragments of the two rows' trials alternate: tell them apart by their time.
    open_trials: list[list[float]] = []
    for fragment in stored_trials(buffer):
        assert 1 <= len(fragment) <= 4
        assert not fragment["next", "done"][:-1].any()
        steps = (fragment["next", "reward"].squeeze(-1) % 100).tolist()
        if steps[0] == 0:
            open_trials.append([])
        trial = next(t for t in open_trials if len(t) == steps[0])
        trial += steps
        if fragment["next", "done"][-1]:
            whole.append(trial)
            open_trials = [t for t in open_trials if t is not trial]
    assert {len(trial) for trial in whole} == {9, 3, 4, 1, 13}
    assert all(trial == [*range(len(trial))] for trial in whole)
    assert len(buffer) == sum(map(len, whole + open_trials))


def test_names_the_flags_that_are_missing():
    flags = ["done", "terminated", "truncated"]
    nested = RenameTransform(flags, [("agent", flag) for flag in flags])
    env = TransformedEnv(GymEnv("CartPole-v1"), nested)
    buffer = ReplayBuffer(storage=LazyTensorStorage(10))
    options = {"replay_buffer": buffer, "frames_per_batch": 5, "total_frames": 5}
    collector = TrialCollector(env, env.rand_action, **options)
    with pytest.raises(ValueError, match="with a flag 'done', 'terminated' or .* got steps"):
        list(collector)


@pytest.mark.parametrize(
    ("option", "value", "problem"),
    [
        ("split_trajs", True, "must be .* got True. .*without padding"),
        ("set_truncated", True, "must be .* got True. .*It would end each trial with the batch"),
        ("track_traj_ids", False, "must be .* got False. .*identified by their number"),
        ("extend_buffer", False, "must be .* got False.*Steps wait until their trial is complete"),
        ("trajs_per_write", 3, "must be .* got 3. .*are written together"),
        ("fragment_length", 0, "must be at least 1, got 0"),
        ("fragment_length", 5, "needs .* TrialSliceSampler, got ReplayBuffer"),
    ],
)
def test_options_that_contradict_whole_trials_raise(option, value, problem):
    buffer = ReplayBuffer(storage=LazyTensorStorage(10))
    with pytest.raises(ValueError, match=f"{option} {problem}"):
        TrialCollector(None, act, replay_buffer=buffer, frames_per_batch=1, **{option: value})


def test_a_missing_buffer_raises():
    with pytest.raises(TypeError, match="needs a replay_buffer; see make_trial_buffer"):
        TrialCollector(None, act, frames_per_batch=1)


@pytest.mark.parametrize("fragment_length", [None, 3])
def test_postproc_sees_trials_as_padded_rows_and_may_shorten_them(fragment_length):
    lengths, seen = [6, 2, 5], []

    def cut_to_four(rows):
        mask = rows["collector", "mask"]
        assert (mask.long().diff(dim=1) <= 0).all()
        seen.extend(rows["time_idx"][row, mask[row], 0].tolist() for row in range(len(rows)))
        left = mask & (torch.arange(mask.shape[1]) < 4)
        if fragment_length is None:
            rows["next", "done"] = rows["next", "done"] | (rows["time_idx"] == 3)
        return rows.set(("collector", "mask"), left)

    options = {"fragment_length": fragment_length, "stagger": False, "postproc": cut_to_four}
    collector, buffer = scripted(lengths, 3, 30, 120, **options)
    list(collector)
    if fragment_length is None:
        assert {tuple(time) for time in seen} == {tuple(range(m)) for m in lengths}
        assert {len(trial) for trial in stored_trials(buffer)} == {4, 2}
    else:
        assert {tuple(time) for time in seen} == {(0, 1, 2), (3, 4, 5), (0, 1), (3, 4)}
    for trial in stored_trials(buffer):
        assert ("collector", "mask") not in trial.keys(True)


def test_dropping_trials_at_each_batch_drops_fragments_begun():
    options = {"fragment_length": 4, "stagger": False, "reset_at_each_iter": True}
    collector, buffer = scripted(ENDLESS, 2, 20, 100, **options)
    list(collector)
    # 10 steps of each row in each batch: two fragments, and two steps that are dropped.
    times = [trial["time_idx"].flatten().tolist() for trial in stored_trials(buffer)]
    assert sorted(times) == [[0, 1, 2, 3]] * 10 + [[4, 5, 6, 7]] * 10


@pytest.mark.parametrize("prepared", ["next", "start"])
def test_may_be_driven_step_by_step_or_from_a_thread(prepared):
    collector, buffer = scripted(ENDLESS, 2, 20, 100, fragment_length=5, stagger=False)
    if prepared == "next":
        for _ in range(5):
            assert collector.next() is None
    else:
        collector.start()
        wait_for(lambda: not collector.is_running(), 60, pause=0.01)
    assert len(buffer) == 100
    assert collector.stats()["frames"] == 100
    collector.shutdown()
