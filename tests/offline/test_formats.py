"""Trials of a collector, saved in each format, are read back as they were written."""

from __future__ import annotations

import io
import json
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    LazyTensorStorage,
    TensorDictReplayBuffer,
    Unbounded,
)
from torchrl.envs import (
    ActionScaling,
    Compose,
    ExcludeTransform,
    InitTracker,
    ParallelEnv,
    RewardScaling,
    SerialEnv,
    TransformedEnv,
    check_env_specs,
)

from tests.offline.formats import (
    ENVS,
    collect,
    episodes_of,
    plain_toy,
    save_as_amago,
    split,
)
from tests.toy_env import ACTIONS, Toy
from torchrl_amago import PreviousStepTransform, TrialTransform, make_trial_env
from torchrl_amago.data import make_trial_buffer
from torchrl_amago.offline import (
    RecordedEnv,
    Trajectory,
    TrajectoryError,
    load_trials,
    read_amago,
    read_d4rl,
    read_minari,
    read_torchrl,
)
from torchrl_amago.offline.trajectory import TrajectoryChecker

# Written by collectors and policies, known by no dataset.
PRIVATE = [("collector", "traj_ids")]


@pytest.fixture(scope="module", params=ENVS)
def collected(request):
    return collect(request.param)


def load(collected, trajectories, **options):
    buffer = make_trial_buffer(4000, slice_length=4, batch_size=2, warn_short=False)
    report = load_trials(buffer, trajectories, collected.env, **options)
    return split(buffer[:]), report


def assert_equal_trials(loaded, trials):
    assert len(loaded) == len(trials) >= 1
    for one, other in zip(loaded, trials, strict=True):
        other = other.exclude(*PRIVATE)
        assert set(one.keys(True, True)) == set(other.keys(True, True))
        for key, expected in other.items(True, True):
            actual = one[key]
            assert actual.dtype == expected.dtype, key
            assert actual.shape == expected.shape, key
            # Continuous actions are scaled there and back.
            is_scaled = "action" in str(key) and expected.is_floating_point()
            torch.testing.assert_close(
                actual, expected, rtol=0, atol=1e-6 if is_scaled else 0, msg=str(key)
            )


def test_steps(collected):
    loaded, report = load(collected, collected.trials)
    assert_equal_trials(loaded, collected.trials)
    returns = [float(trial["next", "reward"].sum()) for trial in collected.trials]
    assert report.returns == pytest.approx(returns, abs=1e-4)
    assert report.lengths == [len(trial) for trial in collected.trials]


def test_steps_without_what_transforms_added(collected):
    """Only the task's own entries, and where episodes begin: the rest is worked out."""
    own = ["soft_reset", *collected.own_keys]
    bare = [
        trial.select("action", *own, ("next", "reward"), ("next", "done")).update(
            {"next": trial["next"].select("terminated", "truncated", *own)}
        )
        for trial in collected.trials
    ]
    assert_equal_trials(load(collected, bare)[0], collected.trials)


def test_episodes_as_arrays(collected):
    episodes = [episodes_of(collected, trial) for trial in collected.trials]
    for arrays, trial in [*zip(episodes, collected.trials, strict=True)][:2]:
        loaded, _ = load(collected, arrays, episodes_per_trial=len(arrays))
        assert_equal_trials(loaded, [trial])
    if TrajectoryChecker(collected.env).trial.episodes:  # the environment says how many, by default
        loaded, _ = load(collected, [arrays for trial in episodes for arrays in trial])
        assert_equal_trials(loaded, collected.trials)


def test_amago_files(collected, tmp_path):
    for number, trial in enumerate(collected.trials):
        save_as_amago(collected, trial, tmp_path / f"{number:04d}.npz")
    source = read_amago(tmp_path)
    assert source.num_steps == sum(map(len, collected.trials))
    assert_equal_trials(load(collected, source)[0], collected.trials)


def test_torchrls_datasets(collected):
    steps = torch.cat(collected.trials)
    loaded, _ = load(collected, read_torchrl(steps))
    assert_equal_trials(loaded, collected.trials)
    buffer = make_trial_buffer(len(steps), slice_length=4, batch_size=2, warn_short=False)
    buffer.extend(steps)
    loaded, _ = load(collected, read_torchrl(buffer))
    assert_equal_trials(loaded, collected.trials)


def small_steps(**entries):
    done = torch.tensor([[False], [True]])
    after = {"observation": torch.tensor([[1.0], [2.0]]), "reward": torch.ones(2, 1), "done": done}
    root = {"observation": torch.tensor([[0.0], [1.0]]), "action": torch.zeros(2, 1)}
    return TensorDict({**root, **entries, "next": TensorDict(after, [2])}, [2])


def test_actions_are_in_the_environments_scale_unless_they_are_known_to_be_a_policys():
    bare, remembered = small_steps(), small_steps(prev_action=torch.zeros(2, 1))
    trials = make_trial_buffer(10, slice_length=2, batch_size=1)
    trials.extend(bare)
    others = TensorDictReplayBuffer(storage=LazyTensorStorage(10), batch_size=1)
    others.extend(bare)
    for dataset, form in (
        (bare, "env"),
        (others, "env"),
        (trials, "policy"),
        (remembered, "policy"),
    ):
        assert read_torchrl(dataset)[0].action_form == form
        for chosen in ("env", "policy", "vector"):
            assert read_torchrl(dataset, action_form=chosen)[0].action_form == chosen


def test_a_datasets_action_and_reward_may_have_other_keys():
    steps = small_steps(agent=TensorDict({"action": torch.full((2, 1), 0.5)}, [2]))
    steps["next", "agent", "reward"] = steps["next"].pop("reward")
    source = read_torchrl(
        steps.exclude("action"), action_key=("agent", "action"), reward_key=("agent", "reward")
    )
    assert (source[0].action.tolist(), source[0].reward.tolist()) == ([[0.5]] * 2, [[1.0]] * 2)
    assert list(source[0].observation) == ["observation"]
    with pytest.raises(TrajectoryError, match="must hold .*'action', .* action_key"):
        read_torchrl(steps.exclude("action"))[0]


@pytest.mark.parametrize("name", ["pendulum", "cart pole once"])
@pytest.mark.parametrize("complete", [True, False])
def test_d4rl_arrays(name, complete):
    collected = collect(name)
    episodes = [episodes_of(collected, trial)[0] for trial in collected.trials]
    rows = [next(iter(arrays["observations"].values())) for arrays in episodes]
    arrays = {
        "observations": np.concatenate([row[:-1] for row in rows]),
        "actions": np.concatenate([arrays["actions"] for arrays in episodes]),
        "rewards": np.concatenate([arrays["rewards"] for arrays in episodes]),
        "terminals": np.concatenate([arrays["terminations"] for arrays in episodes]),
        "timeouts": np.concatenate([arrays["truncations"] for arrays in episodes]),
    }
    if complete:
        arrays["next_observations"] = np.concatenate([row[1:] for row in rows])
        assert_equal_trials(load(collected, read_d4rl(arrays))[0], collected.trials)
        return
    loaded, _ = load(collected, read_d4rl(arrays))
    for one, other in zip(loaded, collected.trials, strict=True):
        is_cut = bool(other["next", "truncated"][-1])
        length = len(other) - is_cut
        assert len(one) == length
        for key in ("action", "prev_action", "prev_reward", "time_idx", *collected.own_keys):
            torch.testing.assert_close(one[key], other[key][:length], rtol=0, atol=1e-6)
        assert bool(one["next", "terminated"][-1]) != is_cut
        own = collected.own_keys[0]
        last = other[own][-1]  # of a terminated trial, it stands in for what came after
        assert torch.equal(one["next", own][-1], last)


@pytest.fixture
def minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return pytest.importorskip("minari")


def save_as_minari(minari, collected, env_id):
    from minari.data_collector import EpisodeBuffer

    episodes = []
    for number, trial in enumerate(collected.trials):
        (arrays,) = episodes_of(collected, trial)
        observations = next(iter(arrays.pop("observations").values()))
        episodes.append(EpisodeBuffer(id=number, observations=list(observations), **arrays))
    names = ("algorithm_name", "author", "author_email", "code_permalink", "description")
    return minari.create_dataset_from_buffers(
        "here/test-v0", episodes, env=env_id, eval_env=env_id, **dict.fromkeys(names, "test")
    )


@pytest.mark.parametrize("name", ["pendulum", "cart pole once"])
def test_minari(name, minari):
    collected = collect(name)
    env_id = "Pendulum-v1" if name == "pendulum" else "CartPole-v1"
    dataset = save_as_minari(minari, collected, env_id)
    source = read_minari("here/test-v0")
    assert (len(source), source.num_steps) == (dataset.total_episodes, dataset.total_steps)
    assert_equal_trials(load(collected, read_minari(dataset))[0], collected.trials)
    assert_equal_trials(load(collected, source)[0], collected.trials)


def test_no_code_that_a_minari_dataset_names_is_run(minari, tmp_path):
    """A dataset names the code of its environment, which the reader ignores."""
    collected = collect("pendulum")
    save_as_minari(minari, collected, "Pendulum-v1")
    file = tmp_path / "here/test-v0/data/metadata.json"
    metadata = json.loads(file.read_text())
    for name in ("env_spec", "eval_env_spec"):
        spec = json.loads(metadata[name])
        spec |= {"entry_point": "os:mkdir", "kwargs": {"path": str(tmp_path / "ran")}}
        metadata[name] = json.dumps(spec)
    file.write_text(json.dumps(metadata))
    assert_equal_trials(load(collected, read_minari("here/test-v0"))[0], collected.trials)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(TypeError, match="must inherit from the gymnasium.Env"):
        minari.load_dataset("here/test-v0").recover_environment()
    assert (tmp_path / "ran").exists()  # it could have been


def test_without_minari(monkeypatch):
    monkeypatch.setitem(sys.modules, "minari", None)
    with pytest.raises(ImportError, match=r"read_minari needs .* 'torchrl-amago\[offline\]'"):
        read_minari("a/b-v0")


def test_a_dataset_that_isnt_there(minari):
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_minari("here/nothing-v0")


# -- what environments hide ----------------------------------------------------------------------


def wide_toy():
    return Toy(Bounded(-2.0, 2.0, shape=(1,)), rows=1)


def toy_trials():
    return make_trial_env(wide_toy(), horizon=7, trial_end="truncated")


def trials_of_workers(worker):
    """Trials with the transform around the workers, which are never reset."""
    return make_trial_env(
        SerialEnv(2, worker), horizon=7, trial_end="truncated", repeat=lambda *args: None
    )


def started(env):
    env.reset()
    return env


def seven_steps(env):
    """Store seven actions 0.5 with rewards of 1."""
    buffer = make_trial_buffer(10, slice_length=2, batch_size=1)
    last = [False] * 6 + [True]
    load_trials(buffer, [Trajectory(np.zeros((8, 2)), [0.5] * 7, [1] * 7, last, last)], env)
    return buffer[:]


HIDDEN = {
    "plain workers": lambda: trials_of_workers(wide_toy),
    "scaling in workers": lambda: trials_of_workers(
        lambda: TransformedEnv(wide_toy(), ActionScaling())
    ),
    "trials in workers": lambda: SerialEnv(2, toy_trials),
    "trials in workers that run": lambda: started(SerialEnv(2, toy_trials)),
    "trials in processes": lambda: ParallelEnv(2, toy_trials),
}


@pytest.mark.parametrize("hidden", HIDDEN)
def test_transforms_in_workers_are_seen(hidden):
    env = HIDDEN[hidden]()
    steps = seven_steps(env)
    assert steps["action"].flatten().tolist() == [0.25] * 7  # the environment's are in [-2, 2]
    assert steps["next", "episode_return"].flatten().tolist() == list(range(1, 8))
    assert steps["next", "truncated"].flatten().tolist() == [False] * 6 + [True]
    assert not steps["next", "terminated"].any()
    env.close(raise_if_closed=False)


def test_transforms_in_transforms_are_seen():
    trial = Compose(TrialTransform(horizon=7), PreviousStepTransform(), InitTracker())
    nested = TransformedEnv(Toy(ACTIONS["categorical"]), Compose(RewardScaling(0.0, 1.0), trial))
    checker = TrajectoryChecker(nested)
    assert (checker.given, checker.trial) == (["observation"], trial[0])
    assert checker.transforms == list(trial)


def test_entries_are_those_of_the_environment():
    previous = PreviousStepTransform(prev_action_key="before", time_idx_key="time")
    trial = TrialTransform(horizon=7, episode_return_key=("trial", "return"))
    hiding = ExcludeTransform("prev_reward")
    env = TransformedEnv(wide_toy(), Compose(trial, ActionScaling(), previous, hiding))
    steps = seven_steps(env)
    assert steps["time"].flatten().tolist() == [*range(7)]
    assert steps["trial", "return"].flatten().tolist() == [*range(7)]
    assert steps["before"].flatten().tolist() == [0.0] + [0.25] * 6
    assert "prev_reward" not in {*steps.keys(), *steps["next"].keys()}


def test_what_an_environment_plays_is_up_to_its_rows():
    """By itself it is an environment like others."""
    flags = torch.tensor([False, False, True, False, True]).unsqueeze(-1)
    rows = TensorDict(
        observation=torch.arange(5.0).unsqueeze(-1),
        action=torch.tensor([0, 1, 1, 1, 0]),
        reward=torch.ones(5, 1),
        done=flags,
        terminated=flags.clone(),
        truncated=torch.zeros_like(flags),
        batch_size=[5],
    )
    specs = Composite(observation=Unbounded((1,))), Categorical(2)
    env = RecordedEnv(*specs, rows=rows, first=torch.tensor([0, 3]))
    check_env_specs(env)
    steps = env.rollout(3, env.act, break_when_any_done=False)
    assert steps["next", "observation"].squeeze(-1).tolist() == [[1, 2, 1], [4, 4, 4]]
    assert steps["action"].tolist() == [[0, 1, 0], [1, 1, 1]]
    some = env.reset(TensorDict(_reset=torch.tensor([[True], [False]]), batch_size=[2]))
    assert env.step(env.act(some))["next", "observation"].flatten().tolist() == [1, 4]


# -- D4RL's arrays, cut by hand ------------------------------------------------------------------

pieces = st.lists(
    st.tuples(st.integers(1, 5), st.sampled_from(["terminal", "timeout", "both"])), min_size=1
)


@given(pieces, st.integers(0, 3), st.booleans())
def test_every_d4rl_step_is_read_once(pieces, tail, complete):
    """Against a loop over the steps, whose observations and rewards are their numbers."""
    kinds = [end for length, kind in pieces for end in (*[""] * (length - 1), kind)]
    kinds += [""] * tail
    size = len(kinds)
    number = np.arange(size, dtype=np.float64)
    arrays = {
        "observations": number[:, None],
        "actions": number,
        "rewards": number,
        "terminals": np.array([kind in ("terminal", "both") for kind in kinds]),
        "timeouts": np.array([kind in ("timeout", "both") for kind in kinds]),
    }
    if complete:
        arrays["next_observations"] = number[:, None] + 0.5
    expected, begun = [], []
    for step, kind in enumerate(kinds):
        begun.append(step)
        if kind or step == size - 1:
            is_terminal = kind in ("terminal", "both")
            rows = [*begun, step + 0.5] if complete else begun
            if complete or is_terminal or len(begun) > 1:  # else its step leads nowhere known
                expected.append((rows, begun, kind))
            begun = []
    source = read_d4rl(arrays)
    assert source.num_steps == sum(len(steps) for _, steps, _ in expected)
    for trajectory, (rows, steps, kind) in zip(source, expected, strict=True):
        assert trajectory.observation.reshape(-1).tolist() == rows
        assert trajectory.action.tolist() == trajectory.reward.tolist() == steps
        flags = [False] * (len(steps) - 1)
        assert trajectory.terminated.tolist()[:-1] == trajectory.truncated.tolist()[:-1] == flags
        assert trajectory.terminated[-1] == (kind in ("terminal", "both"))
        assert trajectory.truncated[-1] == (kind in ("timeout", "both"))


def d4rl_arrays(ends, **changes):
    size = len(ends)
    arrays = {
        "observations": np.zeros((size, 3)),
        "actions": np.zeros((size, 1)),
        "rewards": np.ones(size),
        "terminals": np.asarray(ends),
    }
    return arrays | changes


def test_a_lone_last_d4rl_step_is_no_trajectory():
    source = read_d4rl(d4rl_arrays([False, True, False]))
    assert (len(source), source.num_steps) == (1, 2)
    assert ends_of(source) == [(2, True)]
    timeouts = np.array([True, False, False, True, True])  # others may be alone, too
    arrays = d4rl_arrays(np.zeros(5), timeouts=timeouts)
    assert [len(trajectory) for trajectory in read_d4rl(arrays)] == [3]
    assert ends_of(read_d4rl(arrays)) == [(3, True)]
    assert ends_of(read_d4rl(arrays), 1, None, "truncated") == [(2, False)]
    arrays["next_observations"] = np.zeros((5, 3))
    assert [len(trajectory) for trajectory in read_d4rl(arrays)] == [1, 3, 1]


def stored(source, episodes=1, horizon=None, trial_end="terminated", **options):
    """The trials of a source in an environment of such trials."""
    base = RecordedEnv(Composite(observation=Unbounded((3,))), Bounded(-1.0, 1.0, (1,)))
    env = make_trial_env(base, episodes=episodes, horizon=horizon, trial_end=trial_end)
    buffer = make_trial_buffer(50, slice_length=2, batch_size=1)
    load_trials(buffer, source, env, **options)
    return split(buffer[:])


def ends_of(source, *rule, **options):
    """Length of each trial, and whether it is terminated."""
    trials = stored(source, *rule, **options)
    ends = [trial["next"].select("terminated", "truncated")[-1] for trial in trials]
    assert all(end["terminated"] != end["truncated"] for end in ends)
    return list(zip(map(len, trials), [end["terminated"].item() for end in ends], strict=True))


def test_where_d4rl_arrays_cut_an_episode_off_it_is_truncated():
    complete = {"next_observations": np.zeros((5, 3))}
    timeouts = {"timeouts": np.array([0, 0, 1, 0, 0])}
    arrays = d4rl_arrays([0, 0, 1, 0, 0], **complete)
    assert ends_of(read_d4rl(arrays)) == [(3, True), (2, False)]
    arrays = d4rl_arrays(np.zeros(5), **complete, **timeouts)  # the time limit ends the trial
    assert ends_of(read_d4rl(arrays)) == [(3, True), (2, False)]
    arrays = d4rl_arrays(np.zeros(5), **timeouts)  # what the last step led to isn't known
    assert ends_of(read_d4rl(arrays)) == [(3, True), (1, False)]
    assert ends_of(read_d4rl(arrays), 1, None, "episode") == [(2, False), (1, False)]


def test_no_value_bootstraps_from_an_unknown_observation():
    """The step to a terminal that isn't the trial's termination is dropped."""
    arrays = d4rl_arrays([0, 0, 1, 0, 1], observations=np.arange(5.0)[:, None] * np.ones(3))
    source = read_d4rl(arrays)
    for trial_end in ("episode", "terminated"):
        assert ends_of(source, 1, None, trial_end) == [(3, True), (2, True)]
    assert ends_of(source, 1, None, "truncated") == [(2, False), (1, False)]
    assert ends_of(source, 3, episodes_per_trial=2) == [(4, False)]
    assert ends_of(source, None, 5, "episode", episodes_per_trial=2) == [(5, True)]
    assert ends_of(source, None, 5, "truncated", episodes_per_trial=2) == [(4, False)]
    (steps,) = stored([source[0]], 2, episodes_per_trial=1)
    assert steps["next", "observation"][:, 0].tolist() == [1, 2]
    arrays["next_observations"] = arrays["observations"] + 1
    assert ends_of(read_d4rl(arrays), 3, episodes_per_trial=2) == [(5, False)]
    lone = read_d4rl(d4rl_arrays([1]))
    assert ends_of(lone) == [(1, True)]
    with pytest.raises(TrajectoryError, match="the observation after a lone step must be known"):
        ends_of(lone, 1, None, "truncated")


@pytest.mark.parametrize("name", ["terminals", "timeouts"])
def test_d4rl_flags(name):
    """A flag that says nothing: where the next trajectory begins isn't known either."""
    for bad, message in (
        ([0.0, np.nan, 0.0, 1.0], f"{name} must be finite .* the first at step 1"),
        ([0.0, 0.5, 0.0, 1.0], f"{name} must be finite .* the first at step 1: 0.5"),
        ([0, 2, 0, 1], f"{name} must be finite .* the first at step 1: 2"),
    ):
        with pytest.raises(ValueError, match=message):
            read_d4rl(d4rl_arrays([0, 0, 0, 1], **{name: np.array(bad)}))
    source = read_d4rl(d4rl_arrays([0, 0, 0, 1], **{name: np.array([0.0, 1.0, 0.0, 1.0])}))
    assert source.num_trajectories == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"terminals": None}, r"D4RL-style arrays must hold .* without \['terminals'\]"),
        ({"rewards": np.ones(3)}, r"must be of one length, .*'rewards': 3"),
        ({"next_observations": np.zeros((2, 4))}, "dimensions .* must match exactly"),
    ],
)
def test_d4rl_arrays_that_dont_fit(changes, message):
    arrays = d4rl_arrays([0, 1], **changes)
    with pytest.raises(ValueError, match=message):
        read_d4rl({name: array for name, array in arrays.items() if array is not None})[0]


@pytest.mark.parametrize(
    ("flag", "message"),
    [(0.0, "must mark the last step"), (torch.nan, "'done' must be finite .* step 1")],
)
def test_steps_without_ends(flag, message):
    steps = torch.cat(collect("lake").trials)
    steps["next", "done"] = torch.zeros_like(steps["next", "done"], dtype=torch.float32)
    steps["next", "done"][1] = flag
    with pytest.raises(ValueError, match=message):
        read_torchrl(steps)


# -- AMAGO's files -------------------------------------------------------------------------------


def test_amago_fragments(tmp_path):
    """A file that begins in mid-trial keeps its time and what came before."""
    env = plain_toy("categorical")
    time = np.arange(500, 504)[:, None]
    prev_action = np.eye(4, dtype=np.float32)[[2, 0, 1, 3]]
    arrays = {
        "_OBS_KEY_observation": np.ones((4, 2), np.float32),
        "rl2s": np.concatenate([[[0.5], [1.0], [2.0], [3.0]], prev_action], -1),
        "time_idxs": time,
        "rews": np.array([[1.0], [2.0], [3.0]]),
        "dones": np.zeros((3, 1), bool),
        "actions": prev_action[1:],
    }
    np.savez(tmp_path / "fragment.npz", **arrays)
    buffer = make_trial_buffer(10, slice_length=3, batch_size=1)
    load_trials(buffer, read_amago([tmp_path / "fragment.npz"]), env)
    steps = buffer[:]
    assert steps["time_idx"].flatten().tolist() == [500, 501, 502]
    assert not steps["is_init"].any()
    assert steps["prev_reward"].flatten().tolist() == [0.5, 1.0, 2.0]
    assert steps["prev_action"].argmax(-1).tolist() == [2, 0, 1]
    assert steps["action"].tolist() == [0, 1, 3]
    assert steps["next", "truncated"].flatten().tolist() == [False, False, True]
    assert not steps["next", "terminated"].any()
    with pytest.raises(
        TrajectoryError, match=r"trajectory 0: .*a fragment of a trial must hold .*'soft_reset'"
    ):
        load_trials(buffer, read_amago(tmp_path), ENVS["toy categorical"]())


def test_amago_files_that_cant_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trajectories of AMAGO"):
        read_amago(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent.npz isn't there"):
        read_amago([tmp_path / "absent.npz"])
    (tmp_path / "0.npz").write_bytes(b"no archive")
    np.savez(tmp_path / "1.npz", actions=np.zeros((2, 1)))
    np.savez(
        tmp_path / "2.npz",
        **{name: np.zeros((3, 1)) for name in ("rl2s", "time_idxs", "rews", "dones", "actions")},
    )
    np.savez(tmp_path / "3.npz", actions=np.array([{}], dtype=object))
    buffer = make_trial_buffer(10, slice_length=3, batch_size=1)
    report = load_trials(buffer, read_amago(tmp_path), ENVS["toy categorical"](), on_error="skip")
    problems = ["can't be read", "without ['rl2s'", "actions must have the shape", "can't be read"]
    assert sorted(report.skipped) == [*range(4)]
    for number, problem in enumerate(problems):
        assert problem in report.skipped[number]


def amago_arrays(**changes):
    """Two steps of a toy with four categories, one after the other."""
    arrays = {
        "_OBS_KEY_observation": np.ones((3, 2), np.float32),
        "rl2s": np.zeros((3, 5)),
        "time_idxs": np.arange(3)[:, None],
        "rews": np.ones((2, 1)),
        "dones": np.array([[False], [True]]),
        "actions": np.eye(4)[:2],
    }
    return arrays | changes


@pytest.mark.parametrize("is_done", [True, False])
def test_amago_files_that_end_without_done_are_cut_off(is_done, tmp_path):
    np.savez(tmp_path / "0.npz", **amago_arrays(dones=np.array([[False], [is_done]])))
    base = RecordedEnv(Composite(observation=Unbounded((2,))), Categorical(4))
    buffer = make_trial_buffer(10, slice_length=2, batch_size=1)
    load_trials(buffer, read_amago(tmp_path), make_trial_env(base, episodes=1))
    assert buffer[:]["next", "terminated"].flatten().tolist() == [False, is_done]
    assert buffer[:]["next", "truncated"].flatten().tolist() == [False, not is_done]


BAD_FILES = {
    "1-d rl2s": ({"rl2s": np.zeros(3)}, r"rl2s of .* must hold .*, got \(3,\)"),
    "empty rl2s": ({"rl2s": np.zeros((0, 5))}, "'prev_action' must have the shape"),
    "rl2s without action": ({"rl2s": np.zeros((3, 1))}, r"'prev_action' must have the shape"),
    "action before": ({"rl2s": np.full((3, 5), 7.0)}, "'prev_action' must be finite numbers"),
    "negative time": (
        {"time_idxs": np.arange(3) - 7},
        "'time_idx' must be finite numbers .* at step 0: -7",
    ),
    "text as time": ({"time_idxs": np.full(3, "a")}, "'time_idx' must be one array of num"),
    "NaN flag": ({"dones": np.array([0.0, np.nan])}, "dones of .* must be finite numbers"),
    "no flag": ({"dones": np.array([0, 2])}, "dones of .* must be finite numbers .* step 1: 2"),
    "a number as actions": ({"actions": np.array(1.0)}, "actions must have the shape"),
}


@pytest.mark.parametrize("bad", BAD_FILES)
def test_amago_files_with_bad_arrays(bad, tmp_path):
    changes, message = BAD_FILES[bad]
    np.savez(tmp_path / "0.npz", **amago_arrays())
    np.savez(tmp_path / "1.npz", **amago_arrays(**changes))
    buffer = make_trial_buffer(10, slice_length=2, batch_size=1)
    env = plain_toy("categorical")
    with pytest.raises(TrajectoryError, match=f"trajectory 1: .*{message}"):
        load_trials(buffer, read_amago(tmp_path), env)
    report = load_trials(buffer, read_amago(tmp_path), env, on_error="skip")
    assert (report.lengths, [*report.skipped]) == ([2], [1])


def damaged(content: bytes, kind: str) -> bytes:
    """Damage an archive as a disk or a copy can."""
    if kind == "one array":
        file = io.BytesIO()
        np.save(file, np.zeros(3))
        return file.getvalue()
    if kind == "packed bytes":  # behind the name of its first entry
        begin = content.index(b".npy") + 40
        return content[:begin] + b"\xff" * 8 + content[begin + 8 :]
    if kind == "method":  # an unknown way of packing
        return content[:8] + b"\x63\x00" + content[10:].replace(b"\x08\x00", b"\x63\x00")
    return b"" if kind == "nothing left" else content[: len(content) // 2]


@pytest.mark.parametrize("kind", ["packed bytes", "method", "nothing left", "cut", "one array"])
def test_damaged_amago_files(kind, tmp_path):
    np.savez_compressed(tmp_path / "0.npz", **amago_arrays())
    content = (tmp_path / "0.npz").read_bytes()
    (tmp_path / "1.npz").write_bytes(damaged(content, kind))
    buffer = make_trial_buffer(10, slice_length=2, batch_size=1)
    env = plain_toy("categorical")
    with pytest.raises(TrajectoryError, match="trajectory 1: .*1.npz .*can't be read"):
        load_trials(buffer, read_amago(tmp_path), env)
    report = load_trials(buffer, read_amago(tmp_path), env, on_error="skip")
    assert (report.lengths, [*report.skipped]) == ([2], [1])
