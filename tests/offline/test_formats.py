"""Trials of a collector, saved in each format, are read back as they were written."""

from __future__ import annotations

import io
import json
import sys
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, LazyTensorStorage, TensorDictReplayBuffer, Unbounded
from torchrl.envs import Compose, ParallelEnv, SerialEnv, TransformedEnv, check_env_specs
from torchrl.envs.transforms import ActionScaling, ExcludeTransform, InitTracker, RewardScaling

from tests.data.trials import assert_columns
from tests.offline import formats
from tests.offline.formats import ENVS, load, plain_env, recorded, split, trial_env, wrong
from tests.toy_env import ACTIONS, Toy
from torchrl_amago import PreviousStepTransform, TrialTransform, make_trial_buffer, make_trial_env
from torchrl_amago.offline import RecordedEnv
from torchrl_amago.offline.readers import read_amago, read_d4rl, read_minari, read_torchrl
from torchrl_amago.offline.trajectory import Trajectory, TrajectoryChecker, TrajectoryError


@pytest.fixture(scope="module", params=ENVS)
def collected(request):
    return formats.collect(request.param)


IDS = {"pendulum": "Pendulum-v1", "cart pole once": "CartPole-v1"}
trials_of_one_episode = pytest.mark.parametrize("collected", IDS, indirect=True)


def assert_read_back(collected, trajectories, trials=None, **options):
    """The trials that were written, by default all, are those of the collector."""
    steps, report = load(trajectories, collected.env, **options)
    for one, other in zip(split(steps), trials or collected.trials, strict=True):
        other = other.exclude(("collector", "traj_ids"))  # known by no dataset
        assert set(one.keys(True, True)) == set(other.keys(True, True))
        for key, expected in other.items(True, True):
            # Continuous actions are scaled there and back.
            atol = 1e-6 if "action" in str(key) and expected.is_floating_point() else 0
            torch.testing.assert_close(one[key], expected, rtol=0, atol=atol, msg=str(key))
    return report


def test_steps(collected):
    report = assert_read_back(collected, collected.trials)
    returns = [float(trial["next", "reward"].sum()) for trial in collected.trials]
    assert report.returns == pytest.approx(returns, abs=1e-4)
    assert report.lengths == [len(trial) for trial in collected.trials]


def test_steps_without_what_transforms_added(collected):
    """Only the task's own entries, and where episodes begin: the rest is worked out."""
    own = ["soft_reset", *collected.own_keys]
    after = ("reward", "done", "terminated", "truncated", *own)
    kept = ["action", *own, *(("next", key) for key in after)]
    assert_read_back(collected, [trial.select(*kept) for trial in collected.trials])


def test_episodes_as_arrays(collected):
    episodes = [[*formats.episodes_of(collected, trial)] for trial in collected.trials]
    for arrays, trial in [*zip(episodes, collected.trials, strict=True)][:2]:
        assert_read_back(collected, arrays, [trial], episodes_per_trial=len(arrays))
    if TrajectoryChecker(collected.env).trial.episodes:  # the environment says how many, by default
        assert_read_back(collected, [arrays for trial in episodes for arrays in trial])


def test_amago_files(collected, tmp_path):
    for number, trial in enumerate(collected.trials):
        formats.save_as_amago(collected, trial, tmp_path / f"{number:04d}.npz")
    source = read_amago(tmp_path)
    assert source.num_steps == sum(map(len, collected.trials))
    assert_read_back(collected, source)


def test_torchrls_datasets(collected):
    steps = torch.cat(collected.trials)
    assert_read_back(collected, read_torchrl(steps))
    buffer = make_trial_buffer(len(steps), slice_length=4, batch_size=2, warn_short=False)
    buffer.extend(steps)
    assert_read_back(collected, read_torchrl(buffer))


def test_actions_are_in_the_environments_scale_unless_they_are_known_to_be_a_policys():
    bare, past = formats.two_steps(), formats.two_steps(prev_action=torch.zeros(2, 1))
    trials = make_trial_buffer(10, slice_length=2, batch_size=1)
    others = TensorDictReplayBuffer(storage=LazyTensorStorage(10), batch_size=1)
    for buffer in (trials, others):
        buffer.extend(bare)
    for dataset, form in ((bare, "env"), (others, "env"), (trials, "policy"), (past, "policy")):
        assert read_torchrl(dataset)[0].action_form == form
        for chosen in ("env", "policy", "vector"):
            assert read_torchrl(dataset, action_form=chosen)[0].action_form == chosen


def test_a_datasets_action_and_reward_may_have_other_keys():
    steps = formats.two_steps(agent=TensorDict({"action": torch.full((2, 1), 0.5)}, [2]))
    steps["next", "agent", "reward"] = steps["next"].pop("reward")
    names = dict(action_key=("agent", "action"), reward_key=("agent", "reward"))
    source = read_torchrl(steps.exclude("action"), **names)
    assert (source[0].action.tolist(), source[0].reward.tolist()) == ([[0.5]] * 2, [[1.0]] * 2)
    assert list(source[0].observation) == ["observation"]
    with pytest.raises(TrajectoryError, match="must hold .*'action', .* action_key"):
        read_torchrl(steps.exclude("action"))[0]


@pytest.mark.parametrize(
    ("flag", "message"),
    [(0.0, "must mark the last step"), (torch.nan, "'done' must be finite .* step 1")],
)
def test_steps_without_ends(flag, message):
    with pytest.raises(ValueError, match=message):
        read_torchrl(formats.two_steps({"done": torch.tensor([[0.0], [flag]])}))


@trials_of_one_episode
def test_d4rl_arrays(collected):
    episodes = [next(formats.episodes_of(collected, trial)) for trial in collected.trials]
    (own,) = collected.own_keys
    rows = [arrays["observations"][own] for arrays in episodes]
    columns = {"terminals": "terminations", "timeouts": "truncations"}
    columns |= {"actions": "actions", "rewards": "rewards"}
    arrays = {to: np.concatenate([x[name] for x in episodes]) for to, name in columns.items()}
    arrays["observations"] = np.concatenate([x[:-1] for x in rows])
    loaded, _ = load(read_d4rl(arrays), collected.env)
    for one, other in zip(split(loaded), collected.trials, strict=True):
        is_cut = bool(other["next", "truncated"][-1])
        length = len(other) - is_cut
        assert len(one) == length
        for key in ("action", "prev_action", "prev_reward", "time_idx", own):
            torch.testing.assert_close(one[key], other[key][:length], rtol=0, atol=1e-6)
        assert bool(one["next", "terminated"][-1]) != is_cut
        # The last observation of a terminated trial stands in for what came after.
        assert torch.equal(one["next", own][-1], other[own][-1])
    arrays["next_observations"] = np.concatenate([x[1:] for x in rows])
    assert_read_back(collected, read_d4rl(arrays))


@pytest.fixture
def minari(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    return pytest.importorskip("minari")


def save_as_minari(minari, collected):
    from minari.data_collector import EpisodeBuffer

    episodes = []
    for number, trial in enumerate(collected.trials):
        (arrays,) = formats.episodes_of(collected, trial)
        observations = next(iter(arrays.pop("observations").values()))
        episodes.append(EpisodeBuffer(id=number, observations=list(observations), **arrays))
    names = ("algorithm_name", "author", "author_email", "code_permalink", "description")
    options = dict.fromkeys(names, "test") | dict.fromkeys(("env", "eval_env"), IDS[collected.name])
    return minari.create_dataset_from_buffers("here/test-v0", episodes, **options)


@trials_of_one_episode
def test_minari_runs_no_code_that_a_dataset_names(collected, minari, tmp_path):
    """A dataset names the code of its environment, which the reader ignores."""
    dataset = save_as_minari(minari, collected)
    source = read_minari("here/test-v0")
    assert (len(source), source.num_steps) == (dataset.total_episodes, dataset.total_steps)
    assert_read_back(collected, read_minari(dataset))
    assert_read_back(collected, source)
    file = tmp_path / "here/test-v0/data/metadata.json"
    metadata = json.loads(file.read_text())
    for name in ("env_spec", "eval_env_spec"):
        spec = json.loads(metadata[name])
        spec |= {"entry_point": "os:mkdir", "kwargs": {"path": str(tmp_path / "ran")}}
        metadata[name] = json.dumps(spec)
    file.write_text(json.dumps(metadata))
    assert_read_back(collected, read_minari("here/test-v0"))
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


WIDE = Bounded(-2.0, 2.0, shape=(1,))
wide_toy = partial(Toy, WIDE, rows=1)
toy_trials = partial(formats.toy_env, WIDE, rows=1)


def trials_of_workers(worker):
    """Trials with the transform around the workers, which are never reset."""
    options = dict(horizon=7, trial_end="truncated", repeat=lambda *args: None)
    return make_trial_env(SerialEnv(2, worker), **options)


def running(env):
    env.reset()
    return env


def seven_steps(env):
    """Store seven actions 0.5 with rewards of 1."""
    last = [False] * 6 + [True]
    return load([Trajectory(np.zeros((8, 2)), [0.5] * 7, [1] * 7, last, last)], env)[0]


HIDDEN = {
    "plain workers": lambda: trials_of_workers(wide_toy),
    "scaling in workers": lambda: trials_of_workers(
        lambda: TransformedEnv(wide_toy(), ActionScaling())
    ),
    "trials in workers": lambda: SerialEnv(2, toy_trials),
    "trials in workers that run": lambda: running(SerialEnv(2, toy_trials)),
    "trials in processes": lambda: ParallelEnv(2, toy_trials),
}


@pytest.mark.parametrize("hidden", HIDDEN)
def test_transforms_in_workers_are_seen(hidden):
    env = HIDDEN[hidden]()
    steps = seven_steps(env)
    assert_columns(steps, action=[0.25] * 7)  # the environment's are in [-2, 2]
    ends = {"truncated": [False] * 6 + [True], "terminated": [False] * 7}
    assert_columns(steps["next"], episode_return=range(1, 8), **ends)
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
    assert_columns(steps, time=range(7), before=[0.0] + [0.25] * 6)
    assert_columns(steps["trial"], **{"return": range(7)})
    assert "prev_reward" not in {*steps.keys(), *steps["next"].keys()}


def test_what_an_environment_plays_is_up_to_its_rows():
    """By itself it is an environment like others."""
    observation, action = torch.arange(5.0).unsqueeze(-1), torch.tensor([0, 1, 1, 1, 0])
    steps = {"observation": observation, "action": action, "reward": torch.ones(5, 1)}
    last = torch.tensor([False, False, True, False, True]).unsqueeze(-1)
    ends = {"done": last, "terminated": last.clone(), "truncated": torch.zeros_like(last)}
    specs = recorded().observation_spec, Categorical(2)
    with pytest.raises(RuntimeError, match="has specs only"):
        RecordedEnv(*specs).reset()
    env = RecordedEnv(*specs, rows=TensorDict(steps | ends, [5]), first=torch.tensor([0, 3]))
    check_env_specs(env)
    steps = env.rollout(3, env.act, break_when_any_done=False)
    assert steps["next", "observation"].squeeze(-1).tolist() == [[1, 2, 1], [4, 4, 4]]
    assert steps["action"].tolist() == [[0, 1, 0], [1, 1, 1]]
    some = env.reset(TensorDict(_reset=torch.tensor([[True], [False]]), batch_size=[2]))
    assert env.step(env.act(some))["next", "observation"].flatten().tolist() == [1, 4]


# -- D4RL's arrays, cut by hand ------------------------------------------------------------------


def d4rl_arrays(ends: str, **changes) -> dict:
    """Steps of which "x" is terminal, "t" at a time limit and "b" both, with some arrays changed."""
    arrays = {
        "observations": np.zeros((len(ends), 1)),
        "actions": np.zeros((len(ends), 1)),
        "rewards": np.ones(len(ends)),
        "terminals": np.array([end in "xb" for end in ends]),
        "timeouts": np.array([end in "tb" for end in ends]) if {*ends} & {*"tb"} else None,
    }
    return {name: array for name, array in (arrays | changes).items() if array is not None}


@given(st.from_regex(r"(-{0,4}[xtb])+-{0,3}", fullmatch=True), st.booleans())
@example("-x-", False)
@example("t--tt", False)
@example("t--tt", True)
def test_every_d4rl_step_is_read_once(ends, complete):
    """Against a loop over the steps, whose observations and rewards are their numbers."""
    number = np.arange(len(ends), dtype=np.float64)
    arrays = d4rl_arrays(ends, observations=number[:, None], actions=number, rewards=number)
    if complete:
        arrays["next_observations"] = number[:, None] + 0.5
    expected, begun = [], []
    for step, end in enumerate(ends):
        begun.append(step)
        if end != "-" or step == len(ends) - 1:
            rows = [*begun, step + 0.5] if complete else begun
            if complete or end in "xb" or len(begun) > 1:  # else its step leads nowhere known
                expected.append((rows, begun, end))
            begun = []
    source = read_d4rl(arrays)
    assert len(source) == len(expected)
    assert source.num_steps == sum(len(steps) for _, steps, _ in expected)
    for trajectory, (rows, steps, end) in zip(source, expected, strict=True):
        assert len(trajectory) == len(steps)
        assert trajectory.observation.reshape(-1).tolist() == rows
        assert trajectory.action.tolist() == trajectory.reward.tolist() == steps
        flags = [False] * (len(steps) - 1)
        assert trajectory.terminated.tolist() == [*flags, end in "xb"]
        assert trajectory.truncated.tolist() == [*flags, end in "tb"]


@pytest.mark.parametrize(
    ("ends", "is_complete", "rule", "per_trial", "expected"),
    [
        ("-x-", False, dict(episodes=1), None, [(2, True)]),
        ("t--tt", False, dict(episodes=1), None, [(3, True)]),
        ("t--tt", False, dict(episodes=1, trial_end="truncated"), None, [(2, False)]),
        # Where the arrays cut an episode off, it is truncated; a time limit ends the trial.
        ("--x--", True, dict(episodes=1), None, [(3, True), (2, False)]),
        ("--t--", True, dict(episodes=1), None, [(3, True), (2, False)]),
        # What the last step led to isn't known.
        ("--t--", False, dict(episodes=1), None, [(3, True), (1, False)]),
        ("--t--", False, dict(episodes=1, trial_end="episode"), None, [(2, False), (1, False)]),
        # The step to a terminal that isn't the trial's termination is dropped: no value bootstraps
        # from an unknown observation.
        ("--x-x", False, dict(episodes=1), None, [(3, True), (2, True)]),
        ("--x-x", False, dict(episodes=1, trial_end="episode"), None, [(3, True), (2, True)]),
        ("--x-x", False, dict(episodes=1, trial_end="truncated"), None, [(2, False), (1, False)]),
        ("--x-x", False, dict(episodes=3), 2, [(4, False)]),
        ("--x-x", False, dict(horizon=5, trial_end="episode"), 2, [(5, True)]),
        ("--x-x", False, dict(horizon=5, trial_end="truncated"), 2, [(4, False)]),
        ("--x-x", True, dict(episodes=3), 2, [(5, False)]),
        ("x", False, dict(episodes=1), None, [(1, True)]),
    ],
)
def test_how_trials_of_d4rl_arrays_end(ends, is_complete, rule, per_trial, expected):
    """By their lengths, and whether they are terminated."""
    after = np.zeros((len(ends), 1)) if is_complete else None
    source = read_d4rl(d4rl_arrays(ends, next_observations=after))
    steps, _ = load(source, trial_env(**rule), episodes_per_trial=per_trial)
    assert [(len(x), x["next", "terminated"][-1].item()) for x in split(steps)] == expected
    after = steps["next"]
    assert torch.equal(after["terminated"] != after["truncated"], after["done"])


def test_a_step_to_an_unknown_observation_is_dropped():
    source = read_d4rl(d4rl_arrays("--x", observations=np.arange(3.0)[:, None]))
    steps, _ = load(source, trial_env(2), episodes_per_trial=1)
    assert steps["next", "observation"].flatten().tolist() == [1, 2]
    with pytest.raises(TrajectoryError, match="the observation after a lone step must be known"):
        load(read_d4rl(d4rl_arrays("x")), trial_env(1, trial_end="truncated"))


@pytest.mark.parametrize("name", ["terminals", "timeouts"])
def test_d4rl_flags(name):
    """A flag that says nothing: where the next trajectory begins isn't known either."""
    for bad in (np.nan, 0.5, 2):
        arrays = d4rl_arrays("---x", **{name: np.array([0, bad, 0, 1])})
        with pytest.raises(ValueError, match=f"{name} must be finite .* first at step 1: {bad}"):
            read_d4rl(arrays)
    arrays = d4rl_arrays("---x", **{name: np.array([0.0, 1.0, 0.0, 1.0])})
    assert read_d4rl(arrays).num_trajectories == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"terminals": None}, r"D4RL-style arrays must hold .* without \['terminals'\]"),
        ({"rewards": np.ones(3)}, r"must be of one length, .*'rewards': 3"),
        ({"next_observations": np.zeros((2, 4))}, "dimensions .* must match exactly"),
    ],
)
def test_d4rl_arrays_that_dont_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        read_d4rl(d4rl_arrays("-x", **changes))[0]


# -- AMAGO's files -------------------------------------------------------------------------------


def four_actions():
    return trial_env(1, action=Categorical(4), observation=Unbounded((2,)))


def save_amago(file, **changes):
    """Two steps, one after the other, with some arrays changed or, for None, left out."""
    arrays = {
        "_OBS_KEY_observation": np.ones((3, 2), np.float32),
        "rl2s": np.zeros((3, 5)),
        "time_idxs": np.arange(3)[:, None],
        "rews": np.ones((2, 1)),
        "dones": np.array([[False], [True]]),
        "actions": np.eye(4)[:2],
    }
    arrays = {name: x for name, x in (arrays | changes).items() if x is not None}
    np.savez_compressed(file, **arrays)


def test_amago_fragments(tmp_path):
    """A file that begins in mid-trial keeps its time and what came before."""
    past = np.eye(4, dtype=np.float32)[[2, 0, 1]]
    save_amago(
        tmp_path / "fragment.npz",
        rl2s=np.concatenate([[[0.5], [1.0], [2.0]], past], -1),
        time_idxs=np.arange(500, 503)[:, None],
        dones=np.zeros((2, 1), bool),
        actions=past[1:],
    )
    env = plain_env(Categorical(4), observation=Unbounded((2,)))
    steps, _ = load(read_amago([tmp_path / "fragment.npz"]), env)
    shown = {"time_idx": [500, 501], "is_init": [False] * 2, "prev_reward": [0.5, 1.0]}
    assert_columns(steps, action=[0, 1], **shown)
    assert steps["prev_action"].argmax(-1).tolist() == [2, 0]
    assert_columns(steps["next"], truncated=[False, True], terminated=[False] * 2)
    message = "trajectory 0: .*a fragment of a trial must hold .*'soft_reset'"
    with pytest.raises(TrajectoryError, match=message):
        load(read_amago(tmp_path), four_actions())


def test_amago_files_that_arent_there(tmp_path):
    with pytest.raises(FileNotFoundError, match="no trajectories of AMAGO"):
        read_amago(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent.npz isn't there"):
        read_amago([tmp_path / "absent.npz"])


BAD_FILES = {
    "1-d rl2s": ({"rl2s": np.zeros(3)}, r"rl2s of .* must hold .*, got \(3,\)"),
    "empty rl2s": ({"rl2s": np.zeros((0, 5))}, "'prev_action' must have the shape"),
    "rl2s without action": ({"rl2s": np.zeros((3, 1))}, r"'prev_action' must have the shape"),
    "no rl2s": ({"rl2s": None}, r"without \['rl2s'\]"),
    "action before": ({"rl2s": np.full((3, 5), 7.0)}, "'prev_action' must be finite numbers"),
    "negative time": ({"time_idxs": np.arange(3) - 7}, "'time_idx' " + wrong("3 of 3", 0, "-7")),
    "text as time": ({"time_idxs": np.full(3, "a")}, "'time_idx' must be one array of num"),
    "NaN flag": ({"dones": np.array([0.0, np.nan])}, "dones of .* must be finite numbers"),
    "no flag": ({"dones": np.array([0, 2])}, "dones of .* must be finite numbers .* step 1: 2"),
    "a number as actions": ({"actions": np.array(1.0)}, "actions must have the shape"),
    "narrow actions": ({"actions": np.zeros((2, 1))}, "actions must have the shape"),
    "pickle": ({"actions": np.array([{}], dtype=object)}, "1.npz .*can't be read"),
}


def one_array(content: bytes) -> bytes:
    np.save(file := io.BytesIO(), np.zeros(3))
    return file.getvalue()


def packed_bytes(content: bytes) -> bytes:
    begin = content.index(b".npy") + 40  # behind the name of the first entry
    return content[:begin] + b"\xff" * 8 + content[begin + 8 :]


# As a disk or a copy can damage an archive.
DAMAGES = {
    "no archive": lambda x: b"no archive",
    "nothing left": lambda x: b"",
    "cut": lambda x: x[: len(x) // 2],
    "one array": one_array,
    "packed bytes": packed_bytes,
    "way of packing": lambda x: x[:8] + b"\x63\x00" + x[10:].replace(b"\x08\x00", b"\x63\x00"),
}


@pytest.mark.parametrize("kind", [*BAD_FILES, *DAMAGES])
def test_bad_amago_files(kind, tmp_path):
    changes, message = BAD_FILES.get(kind, ({}, "1.npz .*can't be read"))
    for number, arrays in enumerate(({}, changes, {})):
        save_amago(tmp_path / f"{number}.npz", **arrays)
    if kind in DAMAGES:
        file = tmp_path / "1.npz"
        file.write_bytes(DAMAGES[kind](file.read_bytes()))
    report = formats.assert_bad_one_is_named(read_amago(tmp_path), four_actions(), 1, message)
    assert report.lengths == [2, 2]
