"""Checks of offline data, and trials joined from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded
from torchrl.envs import EnvBase

from tests.data.trials import assert_columns, make_buffer, stock_buffer
from tests.offline import formats
from tests.offline.formats import assert_bad_one_is_named, load, plain_env, shape, trial_env, wrong
from torchrl_amago import MetaFrozenLake, TrialCollector, make_trial_env
from torchrl_amago.offline import RecordedEnv, Trajectory, TrajectoryError, load_trials
from torchrl_amago.offline.trajectory import TrajectoryChecker, as_trajectory


def check(env, observation, action, reward=0.0, **options):
    """The rows of a terminated trajectory, without that of the last observation's action."""
    last = np.arange(len(action)) == len(action) - 1
    one = Trajectory(observation, action, 0 * last + reward, last, 0 * last, **options)
    return TrajectoryChecker(env).check(one).rows_S


def two_entries() -> EnvBase:
    return plain_env(Categorical(3), observation=Unbounded((2,)), cell=Categorical(5, shape=(1,)))


def seen(rows: int, cells: int) -> dict:
    return {"observation": np.ones((rows, 2)), "cell": np.arange(cells) % 5}


def arrays(length: int = 4, **changes) -> dict:
    """A trajectory in order, with some arrays or entries of the observation changed."""
    whole = {
        "observations": seen(length + 1, length + 1),
        "actions": np.arange(length) % 3,
        "rewards": np.ones(length),
        "terminations": np.arange(length) == length - 1,
        "truncations": np.zeros(length, dtype=bool),
    }
    for name, x in changes.items():
        (whole if name in whole else whole["observations"])[name] = x
    return whole


NO_ARRAY = "must be one array of numbers"
ROWS = "must have a row for each of 4 steps, and .* got"


def bad(name: str, x, problem: str) -> tuple[dict, str]:
    """A change of a trajectory, and the message that names it."""
    return {name: x}, f"{name if name in arrays() else repr(name)} {problem}"


BAD = {
    "shape": bad("observation", np.ones((5, 3)), shape([5, 2], [5, 3])),
    "rows of observations": bad("observations", seen(6, 5), ROWS + r" \{5, 6\}"),
    "one final observation of two": bad("observations", seen(4, 5), ROWS + r" \{4, 5\}"),
    "no cell": bad(
        "observations", {"observation": [[1, 1]] * 5}, r"must hold .* without \['cell'\]"
    ),
    "NaN": bad("observation", [[0, 0], [0, 0], [np.nan] * 2, [0, 0], [0, 0]], wrong("1 of 5", 2)),
    "infinite reward": bad("rewards", [0, 0, np.inf, 0], wrong("1 of 4", 2, "inf")),
    "overflow": bad("observation", np.full((5, 2), 1e300), wrong("5 of 5", 0, "[1e+300")),
    "rounding": bad("observation", np.full((5, 2), 2**24 + 1), wrong("5 of 5", 0, "[16777217")),
    "text": bad("observation", np.full((5, 2), "a"), NO_ARRAY),
    "ragged": bad("observation", [[1.0, 2.0], [1.0]], NO_ARRAY),
    "a number": bad("rewards", 1.0, shape([4, 1], [])),
    "actions a number": bad("actions", 1, shape([1], [])),
    "no category": bad("cell", np.full(5, 7), wrong("5 of 5", 0, "7")),
    "half a category": bad("cell", np.full(5, 0.5), wrong("5 of 5", 0, "0.5")),
    "action outside": bad("actions", [0, 1, 3, 0], wrong("1 of 4", 2, "3")),
    "negative action": bad("actions", [0, -1, 0, 0], wrong("1 of 4", 1, "-1")),
    "half an action": bad("actions", [0, 1, 0.5, 0], wrong("1 of 4", 2, "0.5")),
    "NaN action": bad("actions", [0, 1, np.nan, 0], wrong("1 of 4", 2, "nan")),
    "no action": bad("actions", [], shape([0], [0])),
    "rewards too few": bad("rewards", np.ones(3), shape([4, 1], [3])),
    "an end inside": ({"truncations": [0, 1, 0, 0]}, r"no step but the last .* got \[1, 3\] of 4"),
    "no flag": bad("terminations", [0, 0, 0, 2], wrong("1 of 4", 3, "2")),
    "NaN flag": bad("terminations", [0, 0, 0, np.nan], wrong("1 of 4", 3, "nan")),
    "flags too few": bad("truncations", [0], shape([4], [1])),
    # What came before a fragment.
    "NaN previous reward": bad("prev_reward", [np.nan, 0, 0, 0, 0], wrong("1 of 5", 0)),
    "previous reward overflows": bad("prev_reward", np.full(5, 1e300), wrong("5 of 5", 0)),
    "negative time": bad("time_idx", np.arange(5) - 7, wrong("5 of 5", 0, "-7")),
    "half a step": bad("time_idx", np.arange(5) + 0.5, wrong("5 of 5", 0)),
    "half of each": bad("prev_action", np.full((5, 3), 0.5), wrong("1 of 1", 0, "[0.5, 0.5, 0.5]")),
    "no previous action": bad("prev_action", [[2] * 3, *[[0] * 3] * 4], wrong("1 of 1", 0)),
    "previous index": bad("prev_action", np.ones((5, 1)), shape([5, 3], [5, 1])),
}


@pytest.mark.parametrize("kind", BAD)
def test_bad_trajectories(kind):
    changes, message = BAD[kind]
    trajectories = [arrays(3), arrays(**changes), arrays(5)]
    report = assert_bad_one_is_named(trajectories, two_entries(), 1, message)
    assert report.lengths == [3, 5]
    assert report.describe() == "2 trials of 8 steps, mean return 4; 1 skipped"


STILL, ABOVE = [[0.0, 0.0]], [[3.0, 0.0]]
TOO_FAR = "actions " + wrong("1 of 1", 0, "[3.0, 0.0]")
PREVIOUS = {"observation": [1, 2], "prev_action": [[55.0, 0.0]] * 2}


@pytest.mark.parametrize(
    ("dtype", "observation", "action", "message"),
    [
        (torch.uint8, np.array([300, 1], np.uint16), STILL, wrong("1 of 2", 0, "300")),
        (torch.uint8, [0, 0], torch.tensor(ABOVE, dtype=torch.bfloat16), TOO_FAR),
        (torch.uint8, [0, 0], torch.tensor(ABOVE, requires_grad=True), TOO_FAR),
        # A double can't hold it.
        (torch.float64, [2**53 + 1, 1], STILL, wrong("1 of 2", 0, "9007199254740993")),
        (torch.float32, PREVIOUS, STILL, "'prev_action' " + wrong("1 of 1", 0, "[55.0, 0.0]")),
    ],
    ids=["uint16", "bfloat16", "gradient", "long", "previous action"],
)
def test_messages_show_numbers_of_every_kind(dtype, observation, action, message):
    env = plain_env(Bounded(-1.0, 1.0, (2,)), observation=Unbounded((1,), dtype=dtype))
    with pytest.raises(TrajectoryError, match=message):
        check(env, observation, action)


def test_arrays_of_other_byte_orders_read_only_reversed_or_of_large_numbers():
    x = np.arange(3, dtype=">f8")[::-1]
    x.flags.writeable = False
    rows = check(plain_env(Categorical(3)), x, [0, 1])
    assert rows["observation"].flatten().tolist() == [2, 1, 0]
    doubles = plain_env(Categorical(3), observation=Unbounded((1,), dtype=torch.float64))
    assert check(doubles, [2**53, 1], [0])["observation"].tolist() == [[2.0**53], [1.0]]


def test_a_fragment_remembers_what_came_before():
    env = plain_env(Bounded(-1.0, 1.0, (2,)))
    before = {"observation": [1, 2, 3], "prev_reward": [5, 0, 0], "time_idx": [3, 0, 0]}
    before |= {"prev_action": [[0.5, -1.0]] * 3, "is_init": [0, 0, 0]}
    steps, _ = load([Trajectory(before, [[0.25, 0.0]] * 2, [7, 8], [0, 0], [0, 1])], env)
    assert_columns(steps, time_idx=[3, 4], prev_reward=[5, 7], is_init=[False] * 2)
    assert steps["prev_action"].tolist() == [[0.5, -1.0], [0.25, 0.0]]
    assert_columns(steps["next"], time_idx=[4, 5])


# -- steps ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ([1, 2], r"must be a Trajectory, a mapping of arrays or .* steps \[L\], got a list"),
        ({"observations": 1}, r"must hold .* without \['actions', 'rewards'"),
        (TensorDict({}, [2, 3]), "got a TensorDict"),
        (TensorDict({"action": torch.zeros(2)}, [2]), "must hold .*'done'"),
    ],
)
def test_what_is_no_trajectory(item, message):
    with pytest.raises(TrajectoryError, match=message):
        as_trajectory(item, "action", "reward")


@pytest.mark.parametrize(
    ("entry", "after", "problem"),
    [
        ("observation", torch.full((2, 1), 3.0), "under 'next' must equal that of the fol"),
        ("observation", torch.ones(2, 4), "under 'next' .* differs"),
        ("terminated", torch.zeros(2, 3, dtype=torch.bool), shape([2], [2, 3])),
        ("done", torch.tensor([0, 2]), wrong("1 of 2", 1, "2")),
        ("truncated", torch.tensor([0, 2]), wrong("1 of 2", 1, "2")),
    ],
)
def test_steps_that_are_no_trajectory(entry, after, problem):
    trajectories = list(map(formats.two_steps, ({"reward": torch.ones(2)}, {entry: after}, {})))
    assert_bad_one_is_named(trajectories, plain_env(), 1, f"'{entry}' {problem}")


def test_the_last_observation_of_steps_is_that_under_next():
    steps = formats.two_steps({"observation": torch.tensor([[1.0], [7.0]])})
    observation = as_trajectory(steps, "action", "reward").observation["observation"]
    assert observation[:, 0].tolist() == [0, 1, 7]


@pytest.mark.parametrize("flag", [[0.0, 1.0], [0, 1]])
def test_flags_of_steps_may_be_numbers(flag):
    done = torch.tensor(flag)
    for after, truncated in (
        ({"terminated": 0 * done, "truncated": done}, [False, True]),
        ({"terminated": 0 * done}, [False, True]),
        ({"terminated": done}, [False, False]),
    ):
        one = as_trajectory(formats.two_steps({"done": done, **after}), "action", "reward")
        assert one.truncated.tolist() == truncated


# -- actions -------------------------------------------------------------------------------------


def test_continuous_actions_are_scaled_and_may_leave_their_bounds_by_rounding_only():
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])
    env = trial_env(1, action=Bounded(low, high, (2,)))

    def action(values, **options):
        return check(env, [0, 0], [values], **options)["action"][0].tolist()

    assert action([1.0, 10.0]) == [0.5, 1.0]
    assert action([-2.0, 2.5]) == [-1.0, -0.5]
    assert action([0.5, -1.0], action_form="policy") == [0.5, -1.0]
    action([2.0 + 1e-6, 0.0])
    with pytest.raises(TrajectoryError, match=r"at step 0: \[2.1, 0.0\]"):
        action([2.1, 0.0])


@pytest.mark.parametrize("given", ["index", "one-hot"])
def test_one_hot_actions_and_observations(given):
    env = plain_env(OneHot(4), observation=OneHot(3))
    index, cell = np.array([3, 0]), np.array([0, 2, 1])
    if given == "one-hot":
        index, cell = np.eye(4)[index], np.eye(3)[cell]
    rows = check(env, cell, index)
    assert rows["action"][:2].tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert rows["observation"].tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert rows["action"].dtype == OneHot(4).dtype
    for bad, form, message in (
        ([3, 4], "env", "1 of 2 aren't, the first at step 1"),
        ([[0, 0, 1, 1], [1, 0, 0, 0]], "env", "actions must be finite numbers"),
        ([[0, 0, 0.5, 0.5], [1, 0, 0, 0]], "vector", "actions must be finite numbers"),
    ):
        with pytest.raises(TrajectoryError, match=message):
            check(env, cell, bad, action_form=form)


def test_data_are_read_on_the_cpu():
    observation, reward = Composite(observation=OneHot(3)).to("meta"), Unbounded((1,)).to("meta")
    rows = check(RecordedEnv(observation, formats.ANSWER, reward), [0, 2], [0.5], 0.5)
    assert rows["reward"].tolist() == [[0.5], [0.5]]
    assert rows["observation"].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_several_actions_raise():
    base = RecordedEnv(Composite(), Composite(left=Categorical(2), right=Categorical(2)))
    with pytest.raises(ValueError, match="one action and one reward, got .*left.*right"):
        TrajectoryChecker(base)


# -- joining -------------------------------------------------------------------------------------


def episode(first: float, length: int, terminated: bool | None = True) -> Trajectory:
    """Neither terminated nor truncated for None."""
    last = np.arange(length) == length - 1
    return Trajectory(
        first + np.arange(length + 1.0),
        np.full((length, 1), 0.1 * first),
        np.arange(1.0, length + 1),
        last & (terminated is True),
        last & (terminated is False),
    )


def test_a_trial_of_two_episodes_by_hand():
    steps, _ = load([episode(1, 2), episode(5, 3, terminated=False)], trial_env(2, 10))
    root = dict(observation=[1, 2, 5, 6, 7], prev_reward=[0, 1, 2, 1, 2], time_idx=range(5))
    root |= dict(soft_reset=[1, 0, 1, 0, 0], is_init=[1, 0, 0, 0, 0], done=[0] * 5)
    assert_columns(steps, episode_idx=[0, 0, 1, 1, 1], episode_return=[0, 1, 3, 1, 3], **root)
    after = dict(observation=[2, 5, 6, 7, 8], reward=[1, 2, 1, 2, 3], is_init=[0] * 5)
    after |= dict(done=[0, 0, 0, 0, 1], terminated=[0, 0, 0, 0, 1], truncated=[0] * 5)
    after |= dict(episode_idx=[0, 1, 1, 1, 1], episode_return=[1, 3, 1, 3, 6])
    assert_columns(steps["next"], soft_reset=[0, 1, 0, 0, 0], **after)
    values = {
        "trial_progress": [0, 0.1, 0.5, 0.5, 0.5],
        ("next", "trial_progress"): [0.1, 0.5, 0.5, 0.5, 0.5],  # kept where the trial ends
        "prev_action": [0, 0.1, 0.1, 0.5, 0.5],
        "action": [0.1, 0.1, 0.5, 0.5, 0.5],
    }
    for key, expected in values.items():
        x = steps[key].flatten()
        assert torch.equal(x, torch.tensor(expected, dtype=x.dtype)), key


@pytest.mark.parametrize(
    ("rule", "first", "last", "terminated"),
    [
        (dict(episodes=2), True, False, True),
        (dict(episodes=2, trial_end="truncated"), True, True, False),
        (dict(episodes=2, trial_end="episode"), True, True, True),
        (dict(episodes=2, trial_end="episode"), True, False, False),
        (dict(horizon=4), True, False, True),
        (dict(horizon=4), True, None, True),
        (dict(episodes=2), None, True, True),
        # The trial goes on where the data end, so it is worth something there.
        (dict(episodes=3), True, True, False),
        (dict(horizon=5, trial_end="episode"), True, True, False),
        (dict(episodes=2), True, None, False),
    ],
)
def test_how_a_trial_ends(rule, first, last, terminated):
    episodes = [episode(1, 2, first), episode(1, 2, last)]
    steps, _ = load(episodes, trial_env(**rule), episodes_per_trial=2)
    assert steps["next", "terminated"][-1].item() is terminated
    assert steps["next", "truncated"][-1].item() is not terminated
    # No other episode begins with the last observation.
    assert_columns(steps["next"], done=[0, 0, 0, 1], soft_reset=[0, 1, 0, 0])
    assert steps["next", "observation"][-1].item() == 3


def test_trials_that_are_too_long():
    with pytest.raises(TrajectoryError, match=r"\(1 episodes, None steps\), got 2 episodes of 4"):
        load([episode(1, 2)] * 2, trial_env(1), episodes_per_trial=2)
    with pytest.raises(TrajectoryError, match=r"\(None episodes, 3 steps\), got 1 episodes of 4"):
        load([episode(1, 4)], trial_env(None, 3))


def test_a_bad_episode_takes_its_trial_along():
    bad = episode(1, 2, False)
    bad.truncated[:] = True
    episodes = [episode(1, 2), episode(1, 3), bad, episode(1, 4), episode(1, 5), episode(1, 6)]
    _, report = load(episodes, trial_env(2), on_error="skip")
    assert report.lengths == [5, 11]
    assert set(report.skipped) == {2, 3}
    assert "no step but the last may be terminated or truncated, got [0, 1]" in report.skipped[2]
    assert "trajectory 2, of the same trial" in report.skipped[3]
    _, report = load([bad] * 3, trial_env(2), on_error="skip")
    assert (report.lengths, sorted(report.skipped)) == ([], [0, 1, 2])


def test_a_trial_that_isnt_complete():
    episodes, env = [episode(1, 2)] * 5, trial_env(2)
    message = "a trial has 2 trajectories, and the last one only 1"
    assert assert_bad_one_is_named(episodes, env, 4, message).lengths == [4, 4]
    assert load(episodes, env, episodes_per_trial=1)[1].lengths == [2] * 5


def whole_trial(soft_reset, terminated=True, **held) -> Trajectory:
    """A trial that says where episodes begin."""
    first = episode(1, len(soft_reset) - 1, terminated)
    held |= {"observation": first.observation, "soft_reset": soft_reset}
    return Trajectory(held, first.action, first.reward, first.terminated, first.truncated)


def test_whole_trials_arent_joined():
    whole = whole_trial([True, False, False])
    assert load([whole] * 3, trial_env(2))[1].lengths == [2, 2, 2]
    with pytest.raises(TrajectoryError, match="only whole episodes can be joined"):
        load([whole] * 2, trial_env(2), episodes_per_trial=2)
    # Between episodes that are joined, too.
    assert load([episode(1, 2), whole, episode(1, 3)], trial_env(2))[1].lengths == [2, 5]
    with pytest.raises(TrajectoryError, match=r"\(2 episodes, None steps\), got 3 episodes of 3"):
        load([whole_trial([True, True, True, False])], trial_env(2))


@pytest.mark.parametrize(("episodes", "is_over"), [(2, True), (3, False)])
def test_the_ends_of_whole_trials_are_those_of_the_environment(episodes, is_over):
    steps, _ = load([whole_trial([True, False, True, False, False], False)], trial_env(episodes))
    assert_columns(steps["next"], soft_reset=[0, 1, 0, 0], episode_return=[1, 3, 3, 7])
    assert_columns(steps["next"], terminated=[0, 0, 0, is_over], truncated=[0, 0, 0, not is_over])


@pytest.mark.parametrize(("episodes", "is_over"), [(2, True), (3, False)])
@pytest.mark.parametrize("time", [None, 0, 5])
def test_a_piece_in_which_no_episode_begins(time, episodes, is_over):
    held = {"episode_idx": [1] * 3, "episode_return": [4, 5, 6], "trial_progress": [0.5] * 3}
    if time is not None:
        held["time_idx"] = np.arange(time, time + 3)
    steps, _ = load([whole_trial([False] * 3, **held)], trial_env(episodes))
    # Played on from what came before: rewards are 1 and 2.
    assert_columns(steps, episode_return=[4, 5], time_idx=[time or 0, (time or 0) + 1])
    after = {"episode_return": [5, 7], "episode_idx": [1, 1], "terminated": [False, is_over]}
    assert_columns(steps["next"], **after)
    del held["episode_idx"]
    with pytest.raises(TrajectoryError, match=r"fragment of a trial must .* \['episode_idx'\]"):
        load([whole_trial([False] * 3, **held)], trial_env(episodes))


# -- writing -------------------------------------------------------------------------------------


def test_wrong_arguments():
    for options, message in (
        ({"episodes_per_trial": 0}, "episodes_per_trial must be at least 1, got 0"),
        ({"on_error": "ignore"}, "on_error must be one of 'raise', 'skip', got 'ignore'"),
    ):
        with pytest.raises(ValueError, match=message):
            load([], trial_env(1), **options)
    for trajectories in (arrays(), TensorDict(a=torch.zeros(3), batch_size=[3])):
        with pytest.raises(TrajectoryError, match="trajectory 0: it must be a Trajectory"):
            load(trajectories, trial_env(1))


@pytest.mark.parametrize("limit", ["load.MAX_ROWS", "load._MAX_BYTES"])
def test_more_than_is_played_at_once(monkeypatch, limit):
    monkeypatch.setattr(f"torchrl_amago.offline.{limit}", 2)
    steps, report = load((arrays(n) for n in (3, 4, 5, 2)), two_entries())
    assert report.lengths == report.returns == [3, 4, 5, 2]
    assert steps["time_idx"].flatten().tolist() == [t for n in report.lengths for t in range(n)]


@pytest.mark.parametrize("kind", ["trials", "tensor", "memmap"])
def test_any_buffer_with_room_will_do(kind):
    buffer = make_buffer(capacity=20) if kind == "trials" else stock_buffer(kind, capacity=20)
    load_trials(buffer, [arrays(3), arrays(4)], two_entries())
    assert buffer[:]["time_idx"].flatten().tolist() == [0, 1, 2, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="it holds 7 of at most 20 steps, and 14 more"):
        load_trials(buffer, [arrays(7), arrays(7)], two_entries())


def test_a_collector_goes_on_where_data_were_loaded():
    env = make_trial_env(MetaFrozenLake(batch_size=(4,)), episodes=2)
    buffer = make_buffer(capacity=2000, batch_size=2)
    trajectory = Trajectory(np.zeros((3, 2)), [0, 1], [0, 1], [False, True], [False] * 2)
    load_trials(buffer, [trajectory] * 2, env)
    options = dict(replay_buffer=buffer, frames_per_batch=400, total_frames=400)
    list(TrialCollector(env, env.rand_action, **options))
    assert buffer.num_trials > 1
    assert buffer.sample()["next", "reward"].shape == (2, 4, 1)


PAST = {"time_idx": 9, "soft_reset": 0, "prev_reward": 2.5}
PAST |= {"episode_return": 0.3, "episode_idx": 1, "trial_progress": 0.5}
SPLIT = {
    "plain": (lambda: plain_env(Categorical(3)), {}),
    "one episode": (lambda: trial_env(1), {}),
    "horizon": (lambda: trial_env(None, 23, "truncated"), {}),
    "longer horizon": (lambda: trial_env(None, 200, "episode"), {}),
    "fragment": (lambda: trial_env(2, 200), PAST),
}


@pytest.mark.parametrize("kind", SPLIT)
def test_a_long_trial_played_in_pieces_is_the_same(kind, monkeypatch):
    make_env, before = SPLIT[kind]
    env, rng, trajectories = make_env(), np.random.default_rng(0), []
    for length in (23, 3, 23):
        last = np.arange(length) == length - 1
        observation = {key: np.full(length + 1, x) for key, x in before.items()}
        observation |= {"observation": rng.random(length + 1)}
        action = rng.integers(0, 3, length) if kind == "plain" else rng.random(length)
        rest = rng.normal(size=length), last, 0 * last
        trajectories.append(Trajectory(observation, action, *rest))
    stored, steps_played, played, step = [], [], [], RecordedEnv._step
    monkeypatch.setattr(RecordedEnv, "_step", lambda *args: played.append(0) or step(*args))
    for shortest in (100, 4):
        monkeypatch.setattr("torchrl_amago.offline._replay._MIN_PIECE", shortest)
        stored.append(load(trajectories, env)[0])
        steps_played.append(len(played) - sum(steps_played))
    assert steps_played == [23, 4]
    whole, pieces = stored
    for key, expected in whole.items(True, True):
        assert torch.equal(pieces[key], expected), key
