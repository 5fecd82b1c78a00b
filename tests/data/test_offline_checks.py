"""Data are checked on their way in: a bad trajectory is refused with its number, or left out and counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Bounded, Categorical, Composite, OneHot, Unbounded

from torchrl_amago.data import make_trial_buffer
from torchrl_amago.data.offline import (
    Trajectory,
    TrajectoryError,
    TrialRule,
    TrialSchema,
    as_trajectory,
    load_trials,
)
from torchrl_amago.data.offline.joining import join_attempts

SPECS = Composite(
    observation=Unbounded((2,)),
    cell=Categorical(5, shape=(1,)),
    prev_action=Unbounded((3,)),
    time_idx=Unbounded((1,), dtype=torch.int64),
)


def schema(**options) -> TrialSchema:
    return TrialSchema(SPECS, Categorical(3), **options)


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


def nan_at(step: int, shape: tuple[int, ...]) -> np.ndarray:
    x = np.zeros(shape)
    x[step] = np.nan
    return x


BAD = {
    "shape": (
        observations(observation=np.ones((5, 3))),
        r"observations 'observation' must have the shape \[5, 2\], got \[5, 3\]",
    ),
    "no last observation": (
        observations(observation=np.ones((4, 2))),
        r"must have the shape \[5, 2\], got \[4, 2\]. .*what the last step led to",
    ),
    "missing entry": (
        {"observations": {"observation": np.ones((5, 2))}},
        r"must hold .* without \['cell'\]",
    ),
    "NaN observation": (
        observations(observation=nan_at(2, (5, 2))),
        r"'observation' must be finite, got NaN or infinity at 1 of 5 steps, the first at step 2",
    ),
    "infinite reward": (
        {"rewards": [0.0, 0.0, np.inf, 0.0]},
        "rewards must be finite, .* at step 2",
    ),
    "overflow": (
        observations(observation=np.full((5, 2), 1e300)),
        r"'observation' must fit into torch.float32, got numbers between 1e\+300",
    ),
    "whole numbers that would be rounded": (
        observations(observation=np.full((5, 2), 2**24 + 1)),
        "'observation' must be whole numbers that torch.float32 can hold, got torch.int64 between "
        "16777217 and 16777217",
    ),
    "text": (
        observations(observation=np.full((5, 2), "a")),
        "'observation' must be one array of numbers",
    ),
    "ragged": (
        observations(observation=[[1.0, 2.0], [1.0]]),
        "'observation' must be one array of numbers",
    ),
    "a number": ({"rewards": 1.0}, "rewards must have a row per step"),
    "actions a number": ({"actions": 1}, "actions must have a row per step"),
    "no category": (
        observations(cell=np.full(5, 7)),
        "'cell' must be of the environment's Categorical, got other values, between 7 and 7",
    ),
    "half a category": (
        observations(cell=np.full(5, 0.5)),
        "'cell' must be whole numbers",
    ),
    "action outside": (
        {"actions": [0, 1, 3, 0]},
        "actions must be in the environment's space, and 1 of 4 aren't, the first at step 2: 3",
    ),
    "negative action": ({"actions": [0, -1, 0, 0]}, "aren't, the first at step 1: -1"),
    "half an action": ({"actions": [0, 1, 0.5, 0]}, "actions must be whole numbers"),
    "NaN action": ({"actions": [0, 1, np.nan, 0]}, "actions must be finite"),
    "rewards too few": (
        {"rewards": np.ones(3)},
        r"rewards must have the shape \[4, 1\], got \[3\]",
    ),
    "an end inside": (
        {"truncations": [0, 1, 0, 0]},
        "only its last step may be terminated or truncated, got step 1 of 4",
    ),
    "no end": ({"terminations": np.zeros(4)}, "must be terminated or truncated, got neither in 4"),
    "no flag": ({"terminations": [0, 0, 0, 2]}, "terminations must be whole numbers"),
    "NaN flag": ({"terminations": [0, 0, 0, np.nan]}, "terminations must be finite, .* at step 3"),
    "empty": (
        {"actions": [], "rewards": [], "terminations": [], "truncations": []},
        "must have at least one step",
    ),
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_trajectories(bad):
    changes, message = BAD[bad]
    trajectories = [arrays(3), arrays(**changes), arrays(5)]
    buffer = make_trial_buffer(50, slice_length=2, batch_size=2)
    with pytest.raises(TrajectoryError, match=f"trajectory 1: .*{message}"):
        load_trials(buffer, trajectories, schema())
    buffer = make_trial_buffer(50, slice_length=2, batch_size=2)
    report = load_trials(buffer, trajectories, schema(), on_error="skip")
    assert report.lengths == [3, 5]
    assert list(report.skipped) == [1]
    assert report.describe() == "2 trials of 8 steps, mean return 4; 1 skipped"
    assert len(buffer) == 8


def test_numbers_that_a_double_cant_hold():
    trials = TrialSchema(
        Composite(observation=Unbounded((1,), dtype=torch.float64)), Categorical(3)
    )
    whole = Trajectory([2**53, 1], [0], [0.0], [True], [False])
    assert trials.check(whole).observation_S["observation"].tolist() == [[2.0**53], [1.0]]
    with pytest.raises(TrajectoryError, match="must be whole numbers that torch.float64 can hold"):
        trials.check(Trajectory([2**53 + 1, 1], [0], [0.0], [True], [False]))


@pytest.mark.parametrize(
    ("observation", "action", "message"),
    [
        (
            np.array([300, 1], np.uint16),
            [0.0],
            "whole numbers that torch.uint8 can hold, got torch.uint16 between 1 and 300",
        ),
        ([0, 0], torch.tensor([[3.0]], dtype=torch.bfloat16), r"actions must .* step 0: \[3.0\]"),
        ([0, 0], torch.tensor([[3.0]], requires_grad=True), r"actions must .* step 0: \[3.0\]"),
    ],
    ids=["uint16", "bfloat16", "gradient"],
)
def test_messages_show_numbers_of_every_kind(observation, action, message):
    trials = TrialSchema(
        Composite(observation=Unbounded((1,), dtype=torch.uint8)), Bounded(-1.0, 1.0, (1,))
    )
    with pytest.raises(TrajectoryError, match=message):
        trials.check(Trajectory(observation, action, [0.0], [True], [False]))


BAD_BEFORE = {
    "NaN reward": ({"first_prev_reward": np.nan}, "first_prev_reward must be finite, got NaN"),
    "infinite reward": ({"first_prev_reward": -np.inf}, "first_prev_reward must be finite"),
    "overflow": ({"first_prev_reward": 1e300}, "first_prev_reward must fit into torch.float32"),
    "no reward": ({"first_prev_reward": None}, "first_prev_reward must be one array of numbers"),
    "negative time": ({"first_time": -7}, "first_time must be at least 0, got -7"),
    "half a step": ({"first_time": 0.5}, "first_time must be whole numbers"),
    "NaN time": ({"first_time": np.nan}, "first_time must be finite"),
    "two categories": (
        {"first_prev_action": [0, 0.5, 0.5]},
        r"first_prev_action must be in the environment's space, and 1 of 1 .*: \[0.0, 0.5, 0.5\]",
    ),
    "no category": ({"first_prev_action": [0, 2, 0]}, "first_prev_action must be in the envir"),
    "NaN action": ({"first_prev_action": [0, np.nan, 1]}, "first_prev_action must be finite"),
    "index": (
        {"first_prev_action": [2]},
        r"first_prev_action must have the shape \[3\], got \[1\]",
    ),
}


@pytest.mark.parametrize("bad", BAD_BEFORE)
def test_what_came_before_is_checked(bad):
    changes, message = BAD_BEFORE[bad]
    good = Trajectory(*arrays(3).values())
    trajectories = [good, Trajectory(*arrays(4).values(), **changes)]
    buffer = make_trial_buffer(50, slice_length=2, batch_size=2)
    with pytest.raises(TrajectoryError, match=f"trajectory 1: {message}"):
        load_trials(buffer, trajectories, schema())
    report = load_trials(buffer, trajectories, schema(), on_error="skip")
    assert (report.lengths, list(report.skipped)) == ([3], [1])


def test_a_previous_action_is_one_or_nothing():
    numbers = TrialSchema(
        Composite(observation=Unbounded((1,)), prev_action=Unbounded((2,))),
        Bounded(-1.0, 1.0, (2,)),
    )

    def first(before):
        trajectory = Trajectory(
            [[0.0], [0.0]], [[0.0, 0.0]], [0.0], [True], [False], first_prev_action=before
        )
        return numbers.check(trajectory).first_prev_action_A.tolist()

    assert first([0.5, -1.0]) == [0.5, -1.0]
    with pytest.raises(TrajectoryError, match=r"first_prev_action must be in .*: \[55.0, 0.0\]"):
        first([55.0, 0.0])
    trajectory = Trajectory(*arrays().values(), first_prev_action=[0, 0, 0])
    assert schema().check(trajectory).first_prev_action_A.tolist() == [0, 0, 0]
    trajectory = Trajectory(*arrays().values(), first_time=3, first_prev_action=[0, 0, 1])
    attempt = schema().check(trajectory)
    assert (attempt.first_time, attempt.first_prev_action_A.tolist()) == (3, [0, 0, 1])


def test_what_is_no_trajectory():
    for item, message in (
        ([1, 2], "must be a Trajectory, a mapping of arrays or a tensordict of steps, got a list"),
        ({"observations": 1}, "without actions, rewards"),
        (TensorDict({}, [2, 3]), "must have one dimension"),
        (TensorDict({"action": torch.zeros(2)}, [2]), "must hold .*'done'"),
    ):
        with pytest.raises(TrajectoryError, match=message):
            as_trajectory(item)


def test_steps_that_dont_follow_one_another():
    after = {
        "observation": torch.tensor([1.0, 7.0]),
        "reward": torch.zeros(2),
        "done": torch.tensor([False, True]),
    }
    steps = TensorDict({"observation": torch.tensor([0.0, 1.0]), "action": torch.zeros(2)}, [2])
    assert as_trajectory(steps.set("next", after)).observation["observation"].tolist() == [0, 1, 7]
    steps["next", "observation"][0] = 3.0
    with pytest.raises(TrajectoryError, match="'observation' under 'next' must be what the fol"):
        as_trajectory(steps)


@pytest.mark.parametrize("flag", [[0.0, 1.0], [0, 1]])
def test_flags_of_steps_may_be_numbers(flag):
    done = torch.tensor(flag)
    after = {"observation": torch.ones(2), "reward": torch.zeros(2), "done": done}
    steps = TensorDict({"observation": torch.ones(2), "action": torch.zeros(2)}, [2])
    steps.set("next", after | {"terminated": 0 * done, "truncated": done})
    assert as_trajectory(steps).truncated.tolist() == [0, 1]
    steps.set("next", after | {"terminated": 0 * done})
    assert as_trajectory(steps).truncated.tolist() == [0, 1]
    steps.set("next", after | {"terminated": done})
    assert as_trajectory(steps).truncated.tolist() == [0, 0]
    steps.set("next", after | {"done": 2 * done, "terminated": 0 * done})
    trials = TrialSchema(Composite(observation=Unbounded((1,))), Bounded(-1.0, 1.0, (1,)))
    with pytest.raises(TrajectoryError, match="truncations must be whole numbers that torch.bool"):
        trials.check(steps)


def test_steps_whose_next_is_of_another_shape():
    def steps(**after):
        done = torch.tensor([[False], [True]])
        after = {"observation": torch.ones(2, 3), "reward": torch.zeros(2), "done": done} | after
        root = {"observation": torch.ones(2, 3), "action": torch.zeros(2, dtype=torch.int64)}
        return TensorDict({**root, "next": TensorDict(after, [2])}, [2])

    trials = TrialSchema(Composite(observation=Unbounded((3,))), Categorical(3))
    for bad, message in (
        (
            steps(observation=torch.ones(2, 4)),
            r"'observation' under 'next' must have the shape \[2, 3\] .*, got \[2, 4\]",
        ),
        (
            steps(terminated=torch.zeros(2, 3, dtype=torch.bool), done=torch.ones(2, 2)),
            r"'terminated' under 'next' must have the shape \[2, 2\] of 'done', got \[2, 3\]",
        ),
    ):
        buffer = make_trial_buffer(50, slice_length=2, batch_size=2)
        with pytest.raises(TrajectoryError, match=f"trajectory 1: {message}"):
            load_trials(buffer, [steps(), bad], trials)
        report = load_trials(buffer, [bad, steps()], trials, on_error="skip")
        assert (report.lengths, list(report.skipped)) == ([2], [0])


def test_continuous_actions_are_scaled_and_may_leave_their_bounds_by_rounding_only():
    low, high = torch.tensor([-2.0, 0.0]), torch.tensor([2.0, 10.0])
    pendulum = TrialSchema(
        Composite(observation=Unbounded((1,)), prev_action=Unbounded((2,))),
        Bounded(-1.0, 1.0, (2,)),
        env_action_spec=Bounded(low, high, (2,)),
    )

    def one(action, **options):
        return Trajectory([[0.0], [0.0]], [action], [0.0], [True], [False], **options)

    assert pendulum.check(one([1.0, 10.0])).action_L.tolist() == [[0.5, 1.0]]
    assert pendulum.check(one([-2.0, 2.5])).action_L.tolist() == [[-1.0, -0.5]]
    assert pendulum.check(one([0.5, -1.0], action_form="policy")).action_L.tolist() == [[0.5, -1.0]]
    pendulum.check(one([2.0 + 1e-6, 0.0]))
    with pytest.raises(TrajectoryError, match=r"at step 0: \[2.1, 0.0\]"):
        pendulum.check(one([2.1, 0.0]))


@pytest.mark.parametrize("given", ["index", "one-hot"])
def test_one_hot_actions_and_observations(given):
    one_hot = TrialSchema(Composite(observation=OneHot(3)), OneHot(4))
    index, cell = np.array([3, 0]), np.array([0, 2, 1])
    if given == "one-hot":
        index, cell = np.eye(4)[index], np.eye(3)[cell]
    attempt = one_hot.check(Trajectory(cell, index, [0, 0], [0, 1], [0, 0]))
    assert attempt.action_L.tolist() == [[0, 0, 0, 1], [1, 0, 0, 0]]
    assert attempt.observation_S["observation"].tolist() == [[1, 0, 0], [0, 0, 1], [0, 1, 0]]
    assert attempt.action_L.dtype == OneHot(4).dtype
    with pytest.raises(TrajectoryError, match="1 of 2 aren't, the first at step 1"):
        one_hot.check(Trajectory(cell, [3, 4], [0, 0], [0, 1], [0, 0]))
    with pytest.raises(TrajectoryError, match="actions must be in the environment's space"):
        one_hot.check(Trajectory(cell, [[0, 0, 1, 1], [1, 0, 0, 0]], [0, 0], [0, 1], [0, 0]))
    vector = [[0, 0, 0.5, 0.5], [1, 0, 0, 0]]
    with pytest.raises(TrajectoryError, match="actions must be in the environment's space"):
        one_hot.check(Trajectory(cell, vector, [0, 0], [0, 1], [0, 0], action_form="vector"))


def test_specs_may_be_on_another_device(monkeypatch):
    bounds = Bounded(-2.0, 2.0, (1,))
    elsewhere = bounds.to("meta")
    # From a GPU numbers can be copied, from the meta device they can't.
    monkeypatch.setattr(elsewhere, "to", bounds.to)
    trials = TrialSchema(
        Composite(observation=OneHot(3)).to("meta"),
        Bounded(-1.0, 1.0, (1,)),
        env_action_spec=elsewhere,
        reward_spec=Unbounded((1,)).to("meta"),
    )
    attempt = trials.check(Trajectory([0, 2], [1.0], [0.5], [True], [False]))
    assert attempt.action_L.tolist() == [[0.5]]
    assert trials.reward_spec.device == torch.device("cpu")


# -- joining -------------------------------------------------------------------------------------

TRIAL_SPECS = Composite(
    observation=Unbounded((1,)),
    soft_reset=Categorical(2, shape=(1,), dtype=torch.bool),
    episode_idx=Unbounded((1,), dtype=torch.int64),
    attempt_return=Unbounded((1,)),
    trial_progress=Unbounded((1,)),
    trial_step=Unbounded((1,), dtype=torch.int64),
    prev_action=Unbounded((1,)),
    prev_reward=Unbounded((1,)),
    time_idx=Unbounded((1,), dtype=torch.int64),
    is_init=Categorical(2, shape=(1,), dtype=torch.bool),
)


def attempt(first: float, length: int, terminated: bool = True, **options) -> Trajectory:
    last = np.arange(length) == length - 1
    return Trajectory(
        first + np.arange(length + 1.0),
        np.full((length, 1), 0.1 * first),
        np.arange(1.0, length + 1),
        last & terminated,
        last & (not terminated),
        **options,
    )


def joined(rule: TrialRule, *attempts: Trajectory) -> TensorDict:
    trials = TrialSchema(TRIAL_SPECS, Bounded(-1.0, 1.0, (1,)), rule=rule)
    return join_attempts(trials, [trials.check(item) for item in attempts])


def test_a_trial_of_two_attempts_by_hand():
    rule = TrialRule(episodes=2, horizon=10, trial_end="terminated")
    steps = joined(rule, attempt(1, 2), attempt(5, 3, terminated=False))
    values = {
        "observation": [1, 2, 5, 6, 7],
        "soft_reset": [True, False, True, False, False],
        "episode_idx": [0, 0, 1, 1, 1],
        "attempt_return": [0, 1, 3, 1, 3],
        "trial_step": [0, 1, 2, 3, 4],
        "prev_reward": [0, 1, 2, 1, 2],
        "time_idx": [0, 1, 2, 3, 4],
        "is_init": [True, False, False, False, False],
        "done": [False] * 5,
        ("next", "observation"): [2, 5, 6, 7, 8],
        ("next", "soft_reset"): [False, True, False, False, False],
        ("next", "episode_idx"): [0, 1, 1, 1, 1],
        ("next", "attempt_return"): [1, 3, 1, 3, 6],
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
    ("rule", "attempts", "terminated"),
    [
        (TrialRule(2, None, "terminated"), [attempt(1, 2), attempt(1, 2, False)], True),
        (TrialRule(2, None, "truncated"), [attempt(1, 2), attempt(1, 2, True)], False),
        (TrialRule(2, None, "attempt"), [attempt(1, 2), attempt(1, 2, True)], True),
        (TrialRule(2, None, "attempt"), [attempt(1, 2), attempt(1, 2, False)], False),
        (TrialRule(None, 4, "terminated"), [attempt(1, 2), attempt(1, 2, False)], True),
        (
            TrialRule(None, 4, "terminated"),
            [attempt(1, 2), attempt(1, 2, False, is_cut=True)],
            True,
        ),
        (TrialRule(2, None, "terminated"), [attempt(1, 2, is_cut=True), attempt(1, 2)], True),
        # The trial goes on where the data end, so it is worth something there.
        (TrialRule(3, None, "terminated"), [attempt(1, 2), attempt(1, 2, True)], False),
        (TrialRule(None, 5, "attempt"), [attempt(1, 2), attempt(1, 2, True)], False),
        (
            TrialRule(2, None, "terminated"),
            [attempt(1, 2), attempt(1, 2, False, is_cut=True)],
            False,
        ),
    ],
)
def test_how_a_trial_ends(rule, attempts, terminated):
    steps = joined(rule, *attempts)
    assert steps["next", "done"].flatten().tolist() == [False, False, False, True]
    assert steps["next", "terminated"][-1].item() is terminated
    assert steps["next", "truncated"][-1].item() is not terminated


def test_trials_that_are_too_long():
    with pytest.raises(TrajectoryError, match=r"\(1 attempts, None steps\), got 2 attempts of 4"):
        joined(TrialRule(1), attempt(1, 2), attempt(1, 2))
    with pytest.raises(TrajectoryError, match=r"\(None attempts, 3 steps\), got 1 attempts of 4"):
        joined(TrialRule(None, 3), attempt(1, 4))


def load(trajectories, rule, **options):
    buffer = make_trial_buffer(100, slice_length=2, batch_size=2)
    trials = TrialSchema(TRIAL_SPECS, Bounded(-1.0, 1.0, (1,)), rule=rule)
    return load_trials(buffer, trajectories, trials, **options)


def test_a_bad_attempt_takes_its_trial_along():
    bad = attempt(1, 2, False)
    bad.truncated[:] = False
    attempts = [attempt(1, 2), attempt(1, 3), bad, attempt(1, 4), attempt(1, 5), attempt(1, 6)]
    report = load(attempts, TrialRule(2), on_error="skip")
    assert report.lengths == [5, 11]
    assert set(report.skipped) == {2, 3}
    assert "neither" in report.skipped[2]
    assert "trajectory 2, of the same trial" in report.skipped[3]


def test_a_trial_that_isnt_complete():
    attempts = [attempt(1, 2)] * 5
    with pytest.raises(
        TrajectoryError, match="trajectory 4: a trial is made of 2 trajectories, an"
    ):
        load(attempts, TrialRule(2))
    report = load(attempts, TrialRule(2), on_error="skip")
    assert (report.lengths, list(report.skipped)) == ([4, 4], [4])
    assert load(attempts, TrialRule(2), episodes_per_trial=1).lengths == [2] * 5


def test_whole_trials_arent_joined():
    first = attempt(1, 2)
    whole = Trajectory(
        {"observation": first.observation["observation"], "soft_reset": [True, False, False]},
        first.action,
        first.reward,
        first.terminated,
        first.truncated,
    )
    assert load([whole] * 3, TrialRule(2)).lengths == [2, 2, 2]
    with pytest.raises(TrajectoryError, match="only whole attempts can be joined"):
        load([whole] * 2, TrialRule(2), episodes_per_trial=2)


@pytest.mark.parametrize("first_time", [0, 5])
def test_a_piece_in_which_no_attempt_begins(first_time):
    held = {
        "observation": np.arange(3.0),
        "soft_reset": np.zeros(3, dtype=bool),
        "episode_idx": np.ones(3, dtype=int),
        "attempt_return": np.arange(4.0, 7.0),
        "trial_progress": np.full(3, 0.5),
        "trial_step": np.arange(5, 8),
    }
    whole = attempt(1, 2)

    def piece(*missing: str) -> Trajectory:
        kept = {key: x for key, x in held.items() if key not in missing}
        rest = (whole.action, whole.reward, whole.terminated, whole.truncated)
        return Trajectory(kept, *rest, first_time=first_time)

    steps = joined(TrialRule(2), piece())
    assert steps["attempt_return"].flatten().tolist() == [4, 5]
    assert steps["next", "attempt_return"].flatten().tolist() == [5, 6]
    where = "at step 5 of its trial" if first_time else "without soft_reset"
    with pytest.raises(TrajectoryError, match=rf"begins {where} has no \['episode_idx'\]"):
        joined(TrialRule(2), piece("episode_idx"))


def test_a_buffer_that_is_too_small():
    buffer = make_trial_buffer(7, slice_length=2, batch_size=2)
    with pytest.raises(ValueError, match="it holds 0 of at most 7 steps, and 8 more"):
        load_trials(buffer, [arrays(4), arrays(4)], schema())


def test_wrong_arguments():
    for options, message in (
        ({"episodes_per_trial": 0}, "episodes_per_trial must be at least 1 or None, got 0"),
        ({"on_error": "ignore"}, "on_error must be one of 'raise', 'skip', got 'ignore'"),
    ):
        with pytest.raises(ValueError, match=message):
            load([], TrialRule(), **options)
    for trajectories in (arrays(), TensorDict({}, [3]), make_trial_buffer(5, 2, 1)):
        with pytest.raises(TypeError, match="takes trajectories one by one"):
            load(trajectories, TrialRule())


def test_more_steps_than_are_written_at_once(monkeypatch):
    monkeypatch.setattr("torchrl_amago.data.offline.load._WRITE_STEPS", 6)
    buffer = make_trial_buffer(100, slice_length=2, batch_size=2)
    report = load_trials(buffer, (arrays(n) for n in (3, 4, 5, 2)), schema())
    assert report.lengths == [3, 4, 5, 2]
    assert len(buffer) == 14
    assert buffer[:]["time_idx"].flatten().tolist() == [
        step for length in report.lengths for step in range(length)
    ]
