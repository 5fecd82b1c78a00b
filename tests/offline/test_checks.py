"""Checks of offline data, and trials joined from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import (
    Bounded,
    Categorical,
    Composite,
    LazyMemmapStorage,
    LazyTensorStorage,
    OneHot,
    TensorDictReplayBuffer,
    TensorSpec,
    Unbounded,
)
from torchrl.envs import Compose, EnvBase, InitTracker, TransformedEnv

from torchrl_amago import MetaFrozenLake, PreviousStepTransform, TrialCollector, make_trial_env
from torchrl_amago.data import make_trial_buffer
from torchrl_amago.offline import RecordedEnv, Trajectory, TrajectoryError, load_trials
from torchrl_amago.offline.trajectory import TrajectoryChecker, as_trajectory

NUMBER = Unbounded((1,))


def plain_env(action: TensorSpec | None = None, **observation: TensorSpec) -> EnvBase:
    """An environment of specs alone, whose trials are its episodes."""
    observation = observation or {
        "observation": Unbounded((2,)),
        "cell": Categorical(5, shape=(1,)),
    }
    base = RecordedEnv(Composite(observation), Categorical(3) if action is None else action)
    return TransformedEnv(base, Compose(PreviousStepTransform(), InitTracker()))


def check(env, *arrays, **options):
    """The rows of a trajectory, without that of the last observation's action."""
    return TrajectoryChecker(env).check(Trajectory(*arrays, **options)).rows_S


def arrays(length: int = 4, **changes) -> dict:
    """A trajectory in order, with some arrays changed."""
    whole = {
        "observations": {
            "observation": np.ones((length + 1, 2)),
            "cell": np.arange(length + 1) % 5,
        },
        "actions": np.arange(length) % 3,
        "rewards": np.ones(length),
        "terminations": np.arange(length) == length - 1,
        "truncations": np.zeros(length, dtype=bool),
    }
    return whole | changes


def observations(**changes) -> dict:
    return {"observations": arrays()["observations"] | changes}


def at(step: int, value: float, shape: tuple[int, ...]) -> np.ndarray:
    x = np.zeros(shape)
    x[step] = value
    return x


WRONG = "must be finite numbers in the environment's space, and {} aren't, the first at step {}"


def wrong(name: str, count: str, first: int, value: str = "") -> str:
    return f"{name} {WRONG.format(count, first)}: {value}"


BAD = {
    "shape": (
        observations(observation=np.ones((5, 3))),
        r"observations 'observation' must have the shape \[5, 2\], got \[5, 3\]",
    ),
    "rows of observations": (
        observations(observation=np.ones((6, 2))),
        r"observations must have a row for each of 4 steps, and .* got \{5, 6\}",
    ),
    "one final observation of two": (
        observations(observation=np.ones((4, 2))),
        r"observations must have a row for each of 4 steps, and .* got \{4, 5\}",
    ),
    "missing entry": (
        {"observations": {"observation": np.ones((5, 2))}},
        r"must hold .* without \['cell'\]",
    ),
    "NaN": (observations(observation=at(2, np.nan, (5, 2))), wrong("'observation'", "1 of 5", 2)),
    "infinite reward": ({"rewards": at(2, np.inf, (4,))}, wrong("rewards", "1 of 4", 2, "inf")),
    "overflow": (
        observations(observation=np.full((5, 2), 1e300)),
        wrong("'observation'", "5 of 5", 0, r"\[1e\+300"),
    ),
    "whole numbers that would be rounded": (
        observations(observation=np.full((5, 2), 2**24 + 1)),
        wrong("'observation'", "5 of 5", 0, r"\[16777217"),
    ),
    "text": (
        observations(observation=np.full((5, 2), "a")),
        "'observation' must be one array of numbers",
    ),
    "ragged": (
        observations(observation=[[1.0, 2.0], [1.0]]),
        "'observation' must be one array of numbers",
    ),
    "a number": ({"rewards": 1.0}, r"rewards must have the shape \[4, 1\], got \[\]"),
    "actions a number": ({"actions": 1}, r"actions must have the shape \[1\], got \[\]"),
    "no category": (observations(cell=np.full(5, 7)), wrong("'cell'", "5 of 5", 0, "7")),
    "half a category": (observations(cell=np.full(5, 0.5)), wrong("'cell'", "5 of 5", 0, "0.5")),
    "action outside": ({"actions": [0, 1, 3, 0]}, wrong("actions", "1 of 4", 2, "3")),
    "negative action": ({"actions": [0, -1, 0, 0]}, wrong("actions", "1 of 4", 1, "-1")),
    "half an action": ({"actions": [0, 1, 0.5, 0]}, wrong("actions", "1 of 4", 2, "0.5")),
    "NaN action": ({"actions": [0, 1, np.nan, 0]}, wrong("actions", "1 of 4", 2, "nan")),
    "rewards too few": (
        {"rewards": np.ones(3)},
        r"rewards must have the shape \[4, 1\], got \[3\]",
    ),
    "an end inside": (
        {"truncations": [0, 1, 0, 0]},
        r"no step but the last may be terminated or truncated, got \[1, 3\] of 4",
    ),
    "no flag": ({"terminations": [0, 0, 0, 2]}, wrong("terminations", "1 of 4", 3, "2")),
    "NaN flag": ({"terminations": [0, 0, 0, np.nan]}, wrong("terminations", "1 of 4", 3, "nan")),
    "flags too few": ({"truncations": [0]}, r"truncations must have the shape \[4\], got \[1\]"),
    "empty": (
        {"actions": [], "rewards": [], "terminations": [], "truncations": []},
        r"actions must have the shape \[0\], got \[0\]",
    ),
    # What came before a fragment.
    "NaN previous reward": (
        observations(prev_reward=at(0, np.nan, (5,))),
        wrong("'prev_reward'", "1 of 5", 0),
    ),
    "previous reward overflows": (
        observations(prev_reward=np.full(5, 1e300)),
        wrong("'prev_reward'", "5 of 5", 0),
    ),
    "negative time": (
        observations(time_idx=np.arange(5) - 7),
        wrong("'time_idx'", "5 of 5", 0, "-7"),
    ),
    "half a step": (observations(time_idx=np.arange(5) + 0.5), wrong("'time_idx'", "5 of 5", 0)),
    "two previous actions": (
        observations(prev_action=np.full((5, 3), 0.5)),
        wrong("'prev_action'", "1 of 1", 0, r"\[0.5, 0.5, 0.5\]"),
    ),
    "no previous action": (
        observations(prev_action=at(0, 2, (5, 3))),
        wrong("'prev_action'", "1 of 1", 0),
    ),
    "previous index": (
        observations(prev_action=np.ones((5, 1))),
        r"'prev_action' must have the shape \[5, 3\], got \[5, 1\]",
    ),
}


def assert_bad_one_is_named(trajectories, env, bad, message, **options):
    """The bad one of three is named, or left out."""
    buffer = make_trial_buffer(50, slice_length=2, batch_size=2)
    with pytest.raises(TrajectoryError, match=f"trajectory {bad}: .*{message}"):
        load_trials(buffer, trajectories, env, **options)
    buffer = make_trial_buffer(50, slice_length=2, batch_size=2)
    report = load_trials(buffer, trajectories, env, on_error="skip", **options)
    assert list(report.skipped) == [bad]
    assert len(buffer) == sum(report.lengths)
    return report


@pytest.mark.parametrize("bad", BAD)
def test_bad_trajectories(bad):
    changes, message = BAD[bad]
    trajectories = [arrays(3), arrays(**changes), arrays(5)]
    report = assert_bad_one_is_named(trajectories, plain_env(), 1, message)
    assert report.lengths == [3, 5]
    assert report.describe() == "2 trials of 8 steps, mean return 4; 1 skipped"


def test_numbers_that_a_double_cant_hold():
    env = plain_env(observation=Unbounded((1,), dtype=torch.float64))
    rest = [0], [0.0], [True], [False]
    assert check(env, [2**53, 1], *rest)["observation"].tolist() == [[2.0**53], [1.0]]
    with pytest.raises(
        TrajectoryError, match="1 of 2 aren't, the first at step 0: 9007199254740993"
    ):
        check(env, [2**53 + 1, 1], *rest)


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (
            np.array([300, 1], np.uint16),
            [0.0],
            "1 of 2 aren't, the first at step 0: 300",
        ),
        ([0, 0], torch.tensor([[3.0]], dtype=torch.bfloat16), r"actions must .* step 0: \[3.0\]"),
        ([0, 0], torch.tensor([[3.0]], requires_grad=True), r"actions must .* step 0: \[3.0\]"),
    ],
    ids=["uint16", "bfloat16", "gradient"],
)
def test_messages_show_numbers_of_every_kind(observation, action, message):
    env = plain_env(Bounded(-1.0, 1.0, (1,)), observation=Unbounded((1,), dtype=torch.uint8))
    with pytest.raises(TrajectoryError, match=message):
        check(env, observation, action, [0.0], [True], [False])


def test_arrays_of_other_byte_orders_that_are_read_only_or_reversed():
    env = plain_env(observation=NUMBER)
    x = np.arange(3, dtype=">f8")[::-1]
    x.flags.writeable = False
    assert check(env, x, [0, 1], [0, 0], [0, 1], [0, 0])["observation"].flatten().tolist() == [
        2,
        1,
        0,
    ]


def test_a_fragment_remembers_what_came_before():
    env = plain_env(Bounded(-1.0, 1.0, (2,)), observation=NUMBER)
    before = {"observation": [1, 2, 3], "prev_reward": [5, 0, 0], "time_idx": [3, 0, 0]}
    before |= {"prev_action": [[0.5, -1.0]] * 3, "is_init": [0, 0, 0]}
    buffer = make_trial_buffer(10, slice_length=2, batch_size=1)
    load_trials(buffer, [Trajectory(before, [[0.25, 0.0]] * 2, [7, 8], [0, 0], [0, 1])], env)
    steps = buffer[:]
    assert steps["time_idx"].flatten().tolist() == [3, 4]
    assert steps["prev_reward"].flatten().tolist() == [5, 7]
    assert steps["prev_action"].tolist() == [[0.5, -1.0], [0.25, 0.0]]
    assert not steps["is_init"].any()
    assert steps["next", "time_idx"].flatten().tolist() == [4, 5]


def test_a_previous_continuous_action_is_in_its_bounds():
    env = plain_env(Bounded(-1.0, 1.0, (2,)), observation=NUMBER)
    before = {"observation": [1, 2], "prev_action": [[55.0, 0.0]] * 2}
    with pytest.raises(TrajectoryError, match=r"'prev_action' must be finite .*: \[55.0, 0.0\]"):
        check(env, before, [[0.0, 0.0]], [0.0], [True], [False])


# -- steps ---------------------------------------------------------------------------------------


def test_what_is_no_trajectory():
    for item, message in (
        (
            [1, 2],
            "must be a Trajectory, a mapping of arrays or .* steps \\[L\\], got a list",
        ),
        ({"observations": 1}, r"must hold .* without \['actions', 'rewards'"),
        (TensorDict({}, [2, 3]), "got a TensorDict"),
        (TensorDict({"action": torch.zeros(2)}, [2]), "must hold .*'done'"),
    ):
        with pytest.raises(TrajectoryError, match=message):
            as_trajectory(item, "action", "reward")


def steps_of(**after) -> TensorDict:
    done = torch.tensor([[False], [True]])
    after = {"observation": torch.ones(2, 3), "reward": torch.zeros(2), "done": done} | after
    root = {"observation": torch.ones(2, 3), "action": torch.zeros(2, dtype=torch.int64)}
    return TensorDict({**root, "next": TensorDict(after, [2])}, [2])


@pytest.mark.parametrize(
    ("after", "message"),
    [
        (
            {"observation": torch.full((2, 3), 3.0)},
            "'observation' under 'next' must equal that of the fol",
        ),
        ({"observation": torch.ones(2, 4)}, "'observation' under 'next' .* differs"),
        (
            {"terminated": torch.zeros(2, 3, dtype=torch.bool)},
            r"'terminated' must have the shape \[2\], got \[2, 3\]",
        ),
        ({"done": torch.tensor([0, 2])}, wrong("'done'", "1 of 2", 1, "2")),
        ({"truncated": torch.tensor([0, 2])}, wrong("'truncated'", "1 of 2", 1, "2")),
    ],
)
def test_steps_that_are_no_trajectory(after, message):
    env = plain_env(observation=Unbounded((3,)))
    assert_bad_one_is_named([steps_of(), steps_of(**after), steps_of()], env, 1, message)


def test_the_last_observation_of_steps_is_that_under_next():
    steps = steps_of(observation=torch.tensor([[1.0] * 3, [7.0] * 3]))
    assert as_trajectory(steps, "action", "reward").observation["observation"][:, 0].tolist() == [
        1,
        1,
        7,
    ]


@pytest.mark.parametrize("flag", [[0.0, 1.0], [0, 1]])
def test_flags_of_steps_may_be_numbers(flag):
    done = torch.tensor(flag)
    for after, truncated in (
        ({"terminated": 0 * done, "truncated": done}, [False, True]),
        ({"terminated": 0 * done}, [False, True]),
        ({"terminated": done}, [False, False]),
    ):
        assert (
            as_trajectory(steps_of(done=done, **after), "action", "reward").truncated.tolist()
            == truncated
        )


# -- actions -------------------------------------------------------------------------------------


def test_continuous_actions_are_scaled_and_may_leave_their_bounds_by_rounding_only():
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])
    base = RecordedEnv(Composite(observation=NUMBER), Bounded(low, high, (2,)))
    env = make_trial_env(base, episodes=1)

    def action(values, **options):
        return check(env, [0, 0], [values], [0], [1], [0], **options)["action"][0].tolist()

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
    rest = [0, 0], [0, 1], [0, 0]
    rows = check(env, cell, index, *rest)
    assert rows["action"][:2].tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert rows["observation"].tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert rows["action"].dtype == OneHot(4).dtype
    for bad, form, message in (
        ([3, 4], "env", "1 of 2 aren't, the first at step 1"),
        ([[0, 0, 1, 1], [1, 0, 0, 0]], "env", "actions must be finite numbers"),
        ([[0, 0, 0.5, 0.5], [1, 0, 0, 0]], "vector", "actions must be finite numbers"),
    ):
        with pytest.raises(TrajectoryError, match=message):
            check(env, cell, bad, *rest, action_form=form)


def test_data_are_read_on_the_cpu():
    base = RecordedEnv(
        Composite(observation=OneHot(3)).to("meta"),
        Bounded(-1.0, 1.0, (1,)),
        Unbounded((1,)).to("meta"),
    )
    rows = check(base, [0, 2], [0.5], [0.5], [True], [False])
    assert rows["reward"].tolist() == [[0.5], [0.5]]
    assert rows["observation"].tolist() == [[1, 0, 0], [0, 0, 1]]


def test_several_actions_raise():
    env = plain_env(observation=NUMBER)
    env.base_env.action_spec = Composite(left=Categorical(2), right=Categorical(2))
    with pytest.raises(ValueError, match="one action and one reward, got .*left.*right"):
        TrajectoryChecker(env.base_env)


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


def load(trajectories, rule, **options):
    buffer = make_trial_buffer(100, slice_length=2, batch_size=2)
    base = RecordedEnv(Composite(observation=NUMBER), Bounded(-1.0, 1.0, (1,)))
    report = load_trials(buffer, trajectories, make_trial_env(base, **rule), **options)
    return buffer[:] if len(buffer) else None, report


def joined(rule, *episodes: Trajectory) -> TensorDict:
    return load(episodes, rule, episodes_per_trial=len(episodes))[0]


def rule(episodes=None, horizon=None, trial_end="terminated"):
    return dict(episodes=episodes, horizon=horizon, trial_end=trial_end)


def test_a_trial_of_two_episodes_by_hand():
    steps = joined(rule(2, 10), episode(1, 2), episode(5, 3, terminated=False))
    values = {
        "observation": [1, 2, 5, 6, 7],
        "soft_reset": [True, False, True, False, False],
        "episode_idx": [0, 0, 1, 1, 1],
        "episode_return": [0, 1, 3, 1, 3],
        "prev_reward": [0, 1, 2, 1, 2],
        "time_idx": [0, 1, 2, 3, 4],
        "is_init": [True, False, False, False, False],
        "done": [False] * 5,
        ("next", "observation"): [2, 5, 6, 7, 8],
        ("next", "soft_reset"): [False, True, False, False, False],
        ("next", "episode_idx"): [0, 1, 1, 1, 1],
        ("next", "episode_return"): [1, 3, 1, 3, 6],
        ("next", "is_init"): [False] * 5,
        ("next", "reward"): [1, 2, 1, 2, 3],
        ("next", "done"): [False, False, False, False, True],
        ("next", "terminated"): [False, False, False, False, True],
        ("next", "truncated"): [False] * 5,
    }
    for key, expected in values.items():
        assert steps[key].flatten().tolist() == expected, key
    approximate = {
        "trial_progress": [0, 0.1, 0.5, 0.5, 0.5],
        ("next", "trial_progress"): [0.1, 0.5, 0.5, 0.5, 0.5],  # kept where the trial ends
        "prev_action": [0, 0.1, 0.1, 0.5, 0.5],
        "action": [0.1, 0.1, 0.5, 0.5, 0.5],
    }
    for key, expected in approximate.items():
        assert steps[key].flatten().tolist() == pytest.approx(expected), key


@pytest.mark.parametrize(
    ("rule", "episodes", "terminated"),
    [
        (rule(2), [episode(1, 2), episode(1, 2, False)], True),
        (rule(2, trial_end="truncated"), [episode(1, 2), episode(1, 2, True)], False),
        (rule(2, trial_end="episode"), [episode(1, 2), episode(1, 2, True)], True),
        (rule(2, trial_end="episode"), [episode(1, 2), episode(1, 2, False)], False),
        (rule(None, 4), [episode(1, 2), episode(1, 2, False)], True),
        (rule(None, 4), [episode(1, 2), episode(1, 2, None)], True),
        (rule(2), [episode(1, 2, None), episode(1, 2)], True),
        # The trial goes on where the data end, so it is worth something there.
        (rule(3), [episode(1, 2), episode(1, 2, True)], False),
        (rule(None, 5, "episode"), [episode(1, 2), episode(1, 2, True)], False),
        (rule(2), [episode(1, 2), episode(1, 2, None)], False),
    ],
)
def test_how_a_trials(rule, episodes, terminated):
    steps = joined(rule, *episodes)
    assert steps["next", "done"].flatten().tolist() == [False, False, False, True]
    assert steps["next", "terminated"][-1].item() is terminated
    assert steps["next", "truncated"][-1].item() is not terminated
    # No other episode begins with the last observation.
    assert steps["next", "soft_reset"].flatten().tolist() == [False, True, False, False]
    assert steps["next", "observation"][-1].item() == 3


def test_trials_that_are_too_long():
    with pytest.raises(TrajectoryError, match=r"\(1 episodes, None steps\), got 2 episodes of 4"):
        joined(rule(1), episode(1, 2), episode(1, 2))
    with pytest.raises(TrajectoryError, match=r"\(None episodes, 3 steps\), got 1 episodes of 4"):
        joined(rule(None, 3), episode(1, 4))


def test_a_bad_episode_takes_its_trial_along():
    bad = episode(1, 2, False)
    bad.truncated[:] = True
    episodes = [episode(1, 2), episode(1, 3), bad, episode(1, 4), episode(1, 5), episode(1, 6)]
    _, report = load(episodes, rule(2), on_error="skip")
    assert report.lengths == [5, 11]
    assert set(report.skipped) == {2, 3}
    assert "no step but the last" in report.skipped[2]
    assert "trajectory 2, of the same trial" in report.skipped[3]


def test_a_trial_that_isnt_complete():
    episodes = [episode(1, 2)] * 5
    message = "trajectory 4: a trial has 2 trajectories, and the last one only 1"
    with pytest.raises(TrajectoryError, match=message):
        load(episodes, rule(2))
    _, report = load(episodes, rule(2), on_error="skip")
    assert (report.lengths, list(report.skipped)) == ([4, 4], [4])
    assert load(episodes, rule(2), episodes_per_trial=1)[1].lengths == [2] * 5


def whole_trial(soft_reset, terminated=True, **held) -> Trajectory:
    """A trial that says where episodes begin."""
    first = episode(1, len(soft_reset) - 1, terminated)
    held |= {"observation": first.observation, "soft_reset": soft_reset}
    return Trajectory(held, first.action, first.reward, first.terminated, first.truncated)


def test_whole_trials_arent_joined():
    whole = whole_trial([True, False, False])
    assert load([whole] * 3, rule(2))[1].lengths == [2, 2, 2]
    with pytest.raises(TrajectoryError, match="only whole episodes can be joined"):
        load([whole] * 2, rule(2), episodes_per_trial=2)
    # Between episodes that are joined, too.
    assert load([episode(1, 2), whole, episode(1, 3)], rule(2))[1].lengths == [2, 5]
    with pytest.raises(TrajectoryError, match=r"\(2 episodes, None steps\), got 3 episodes of 3"):
        load([whole_trial([True, True, True, False])], rule(2))


@pytest.mark.parametrize(("episodes", "is_over"), [(2, True), (3, False)])
def test_the_ends_of_whole_trials_are_those_of_the_environment(episodes, is_over):
    steps, _ = load([whole_trial([True, False, True, False, False], False)], rule(episodes))
    assert steps["next", "soft_reset"].flatten().tolist() == [False, True, False, False]
    assert steps["next", "episode_return"].flatten().tolist() == [1, 3, 3, 7]
    assert steps["next", "terminated"].flatten().tolist() == [False, False, False, is_over]
    assert steps["next", "truncated"].flatten().tolist() == [False, False, False, not is_over]


@pytest.mark.parametrize("time", [0, 5])
def test_a_piece_in_which_no_episode_begins(time):
    held = {
        "episode_idx": np.ones(3, dtype=int),
        "episode_return": np.arange(4.0, 7.0),
        "trial_progress": np.full(3, 0.5),
        "time_idx": np.arange(time, time + 3),
    }

    def steps(*missing: str) -> TensorDict:
        kept = {key: x for key, x in held.items() if key not in missing}
        return load([whole_trial([False] * 3, **kept)], rule(3))[0]

    # Played on from what came before: rewards are 1 and 2.
    assert steps()["episode_return"].flatten().tolist() == [4, 5]
    assert steps()["next", "episode_return"].flatten().tolist() == [5, 7]
    assert steps()["next", "episode_idx"].flatten().tolist() == [1, 1]
    assert steps()["time_idx"].flatten().tolist() == [time, time + 1]
    with pytest.raises(TrajectoryError, match=r"fragment of a trial must .* \['episode_idx'\]"):
        steps("episode_idx")


def test_a_piece_that_ends_its_trial():
    held = {"episode_idx": [1] * 3, "episode_return": [4] * 3, "trial_progress": [0.5] * 3}
    steps, _ = load([whole_trial([False] * 3, **held)], rule(2))
    assert steps["next", "terminated"].flatten().tolist() == [False, True]


# -- writing -------------------------------------------------------------------------------------


def test_a_buffer_that_is_too_small():
    buffer = make_trial_buffer(7, slice_length=2, batch_size=2)
    with pytest.raises(ValueError, match="it holds 0 of at most 7 steps, and 8 more"):
        load_trials(buffer, [arrays(4), arrays(4)], plain_env())


def test_wrong_arguments():
    for options, message in (
        ({"episodes_per_trial": 0}, "episodes_per_trial must be at least 1, got 0"),
        ({"on_error": "ignore"}, "on_error must be one of 'raise', 'skip', got 'ignore'"),
    ):
        with pytest.raises(ValueError, match=message):
            load([], rule(1), **options)
    for trajectories in (arrays(), TensorDict({"a": torch.zeros(3)}, [3])):
        with pytest.raises(TrajectoryError, match="trajectory 0: it must be a Trajectory"):
            load(trajectories, rule(1))


@pytest.mark.parametrize("limit", ["load.MAX_ROWS", "load._MAX_BYTES"])
def test_more_than_is_played_at_once(monkeypatch, limit):
    monkeypatch.setattr(f"torchrl_amago.offline.{limit}", 2)
    buffer = make_trial_buffer(100, slice_length=2, batch_size=2)
    report = load_trials(buffer, (arrays(n) for n in (3, 4, 5, 2)), plain_env())
    assert report.lengths == [3, 4, 5, 2]
    assert report.returns == [3, 4, 5, 2]
    assert buffer[:]["time_idx"].flatten().tolist() == [
        step for length in report.lengths for step in range(length)
    ]


def test_an_environment_without_rows_cant_be_played():
    with pytest.raises(RuntimeError, match="has specs only"):
        plain_env().reset()


@pytest.mark.parametrize("storage", [LazyTensorStorage, LazyMemmapStorage])
def test_any_buffer_will_do(storage):
    buffer = TensorDictReplayBuffer(storage=storage(20), batch_size=4)
    load_trials(buffer, [arrays(3), arrays(4)], plain_env())
    assert buffer[:]["time_idx"].flatten().tolist() == [0, 1, 2, 0, 1, 2, 3]
    with pytest.raises(ValueError, match="it holds 7 of at most 20 steps, and 15 more"):
        load_trials(buffer, [arrays(15)], plain_env())


def test_a_collector_goes_on_where_data_were_loaded():
    env = make_trial_env(MetaFrozenLake(batch_size=(4,)), episodes=2)
    buffer = make_trial_buffer(2000, slice_length=4, batch_size=2, warn_short=False)
    last = [False, True]
    trajectory = Trajectory(np.zeros((3, 2)), [0, 1], [0, 1], last, [False] * 2)
    load_trials(buffer, [trajectory] * 2, env)
    frames = dict(frames_per_batch=400, total_frames=400)
    for _ in TrialCollector(env, env.rand_action, replay_buffer=buffer, **frames):
        pass
    assert buffer.num_trials > 1
    assert buffer.sample()["next", "reward"].shape == (2, 4, 1)


SPLIT = {
    "plain": (lambda: plain_env(observation=NUMBER), {}),
    "one episode": (lambda: trial_env(rule(1)), {}),
    "horizon": (lambda: trial_env(rule(None, 23, "truncated")), {}),
    "longer horizon": (lambda: trial_env(rule(None, 200, "episode")), {}),
    "fragment": (
        lambda: trial_env(rule(2, 200)),
        {
            "time_idx": 9,
            "soft_reset": 0,
            "episode_return": 0.3,
            "episode_idx": 1,
            "trial_progress": 0.5,
            "prev_reward": 2.5,
        },
    ),
}


def trial_env(rule):
    base = RecordedEnv(Composite(observation=NUMBER), Bounded(-1.0, 1.0, (1,)))
    return make_trial_env(base, **rule)


@pytest.mark.parametrize("kind", SPLIT)
def test_a_long_trial_played_in_pieces_is_the_same(kind, monkeypatch):
    make_env, before = SPLIT[kind]
    env, rng, trajectories = make_env(), np.random.default_rng(0), []
    for length in (23, 3, 23):
        last = np.arange(length) == length - 1
        observation = {key: np.full(length + 1, x) for key, x in before.items()}
        observation |= {"observation": rng.random(length + 1)}
        is_discrete = kind == "plain"
        action = rng.integers(0, 3, length) if is_discrete else rng.random(length)
        trajectories.append(
            Trajectory(observation, action, rng.normal(size=length), last, 0 * last)
        )
    stored, steps_played, played, step = [], [], [], RecordedEnv._step
    monkeypatch.setattr(RecordedEnv, "_step", lambda *args: played.append(0) or step(*args))
    for shortest in (100, 4):
        monkeypatch.setattr("torchrl_amago.offline._replay._MIN_PIECE", shortest)
        buffer = make_trial_buffer(100, slice_length=2, batch_size=1)
        load_trials(buffer, trajectories, env)
        stored.append(buffer[:])
        steps_played.append(len(played) - sum(steps_played))
    assert steps_played == [23, 4]
    whole, pieces = stored
    for key, expected in whole.items(True, True):
        assert torch.equal(pieces[key], expected), key
