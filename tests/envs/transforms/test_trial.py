from __future__ import annotations

import copy
import pickle
from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import NonTensorStack, TensorDict
from torchrl.collectors import Collector
from torchrl.data import Categorical, Composite, NonTensor, Unbounded
from torchrl.envs import (
    Compose,
    FrameSkipTransform,
    InitTracker,
    MultiAction,
    ParallelEnv,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    check_env_specs,
)

from tests.envs.transforms.helpers import (
    NUM_ACTIONS,
    CountingEnv,
    TensordictOnlyEnv,
    assert_continuous,
    assert_row_equals,
    drive,
    simulate_row,
)
from tests.envs.workers import forked
from torchrl_amago.envs.tasks import MetaFrozenLake
from torchrl_amago.envs.transforms import PreviousStepTransform, TrialTransform, make_trial_env


def single_trial_env(first_task: int = 0, **kwargs) -> TransformedEnv:
    return make_trial_env(CountingEnv(first_task=first_task), **kwargs)


def batched_env(kind: str, rows: int, **kwargs) -> TransformedEnv | SerialEnv | ParallelEnv:
    """Make trials over rows, each starting at task 100 * row, in one of several ways."""
    inside = [partial(single_trial_env, 100 * row, **kwargs) for row in range(rows)]
    outside = [partial(CountingEnv, (), 100 * row) for row in range(rows)]
    if kind == "native":
        return make_trial_env(CountingEnv([rows]), **kwargs)
    if kind == "tensordict entry":
        return make_trial_env(TensordictOnlyEnv([rows]), **kwargs)
    if kind == "serial inside":
        return SerialEnv(rows, inside)
    if kind == "serial outside":
        return make_trial_env(SerialEnv(rows, outside), **kwargs)
    if kind == "parallel inside":
        return forked(rows, inside)
    return make_trial_env(forked(rows, outside), **kwargs)


IN_PROCESS = ["native", "tensordict entry", "serial inside", "serial outside"]
ACTIONS = torch.tensor(
    [
        # Episodes of 2, 1 and 3 steps end the first trial; the second trial goes on.
        [0, 1, 2, 0, 0, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 2, 1],
        [0, 0, 0, 0, 0, 0, 0, 0, 0, 0],
    ]
)


# --------------------------------------------------------------------- by hand


def test_trial_of_three_episodes_by_hand():
    env = TransformedEnv(CountingEnv(), TrialTransform(episodes=3))
    steps = drive(env, ACTIONS[0, :8])

    def flat(key):
        return steps[key].reshape(8, -1).squeeze(-1).tolist()

    # Task 0 for one trial of 2 + 1 + 3 steps, then task 1.
    assert flat("observation") == [[0, 0], [0, 1], [0, 0], [0, 0], [0, 1], [0, 2], [1, 0], [1, 1]]
    assert flat("episode_idx") == [0, 0, 1, 2, 2, 2, 0, 0]
    assert flat("soft_reset") == [1, 0, 1, 1, 0, 0, 1, 0]
    assert flat("episode_return") == [0, 0, 1, 0, 0, 1, 0, 10]
    assert flat("trial_progress") == pytest.approx([0, 0, 1 / 3, 2 / 3, 2 / 3, 2 / 3, 0, 0])
    # The step that ends the trial resets nothing and begins no episode.
    assert flat(("next", "observation"))[5] == [0, 3]
    assert flat(("next", "episode_idx")) == [0, 1, 2, 2, 2, 2, 0, 0]
    assert flat(("next", "soft_reset")) == [0, 1, 1, 0, 0, 0, 0, 0]
    assert flat(("next", "reward")) == [0, 1, 0, 0, 1, 2, 10, 11]
    assert flat(("next", "episode_return")) == [0, 1, 0, 0, 1, 3, 10, 21]
    assert flat(("next", "done")) == [0, 0, 0, 0, 0, 1, 0, 0]
    assert flat(("next", "terminated")) == [0, 0, 0, 0, 0, 1, 0, 0]
    assert not any(flat(("next", "truncated")))
    assert flat("time_idx") == [0, 1, 2, 3, 4, 5, 0, 1]


def test_horizon_cuts_the_episode_short_by_hand():
    env = TransformedEnv(CountingEnv(), TrialTransform(horizon=4, trial_end="truncated"))
    steps = drive(env, torch.tensor([0, 1, 0, 0, 2, 1, 0, 1, 0]))
    assert steps["observation"].tolist() == [
        [0, 0], [0, 1], [0, 0], [0, 1], [1, 0], [1, 0], [1, 0], [1, 1], [2, 0],
    ]  # fmt: skip
    assert steps["time_idx"].flatten().tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0]
    assert steps["trial_progress"].flatten().tolist() == [0, 0.25, 0.5, 0.75, 0, 0.25, 0.5, 0.75, 0]
    # Progress stays below 1; an episode that ends with the horizon begins no other one.
    assert steps["next", "trial_progress"].max() == 0.75
    assert steps["next", "episode_idx"].flatten().tolist() == [0, 1, 1, 1, 1, 2, 2, 2, 0]
    assert steps["next", "truncated"].flatten().tolist() == [0, 0, 0, 1, 0, 0, 0, 1, 0]
    assert torch.equal(steps["next", "done"], steps["next", "truncated"])
    assert not steps["next", "terminated"].any()


def test_a_trial_may_end_as_its_last_episode_did():
    env = TransformedEnv(CountingEnv(), TrialTransform(2, horizon=4, trial_end="episode"))
    # Ended by: the second episode's end (terminated, truncated), the horizon, both at once.
    actions = [1, 0, 1, 2, 2, 1, 0, 0, 0, 2, 0, 0, 1]
    steps = drive(env, torch.tensor(actions))["next"]
    assert steps["terminated"].flatten().nonzero().flatten().tolist() == [2, 12]
    assert steps["truncated"].flatten().nonzero().flatten().tolist() == [4, 8]
    assert torch.equal(steps["done"], steps["terminated"] | steps["truncated"])


def test_episodes_and_horizon_end_whichever_comes_first():
    env = TransformedEnv(CountingEnv([2]), TrialTransform(episodes=2, horizon=5))
    steps = drive(env, torch.tensor([[1, 0, 2, 0], [0, 0, 0, 0]]).repeat(1, 2)[:, :6])
    assert steps["next", "done"][..., 0].long().tolist() == [[0, 0, 1, 0, 0, 0], [0, 0, 0, 0, 1, 0]]
    progress = steps["trial_progress"][..., 0]
    torch.testing.assert_close(progress[0, :3], torch.tensor([0.0, 0.5, 0.5]))
    torch.testing.assert_close(progress[1, :5], torch.arange(5) / 5)


def test_truncation_of_an_inner_episode_is_swallowed():
    env = TransformedEnv(CountingEnv(), TrialTransform(episodes=2))
    steps = drive(env, torch.tensor([2, 2, 0]))
    assert steps["next", "truncated"].flatten().tolist() == [False, False, False]
    assert steps["next", "terminated"].flatten().tolist() == [False, True, False]


def test_hidden_progress_is_absent():
    env = make_trial_env(CountingEnv([2]), episodes=2, show_progress=False)
    check_env_specs(env)
    assert "trial_progress" not in env.reset()


# ------------------------------------------------------- against the reference


@given(data=st.data())
def test_equals_reference_simulation(data):
    rows = data.draw(st.integers(1, 4))
    num_steps = data.draw(st.integers(2, 30))
    episodes = data.draw(st.one_of(st.none(), st.integers(1, 4)))
    horizon = data.draw(st.integers(1, 9) if episodes is None else st.none() | st.integers(1, 9))
    # A first step that goes on, so that there is something to compare between steps.
    action = st.lists(st.sampled_from([0, 0, 0, 1, 2]), min_size=num_steps, max_size=num_steps)
    actions = torch.tensor([data.draw(action) for _ in range(rows)])
    env = make_trial_env(CountingEnv([rows]), episodes=episodes, horizon=horizon)
    tensordict = env.reset()
    steps = []
    for column in actions.unbind(-1):
        step, tensordict = env.step_and_maybe_reset(tensordict.set("action", column))
        steps.append(step.clone())
    steps = torch.stack(steps, -1)
    for row in range(rows):
        expected = simulate_row(actions[row].tolist(), 100 * row, episodes, horizon)
        assert_row_equals(steps[row], expected)


@pytest.mark.parametrize("kind", IN_PROCESS)
@pytest.mark.parametrize("limits", [{"episodes": 3}, {"horizon": 4}, {"episodes": 2, "horizon": 7}])
def test_rows_end_at_different_steps(kind, limits):
    env = batched_env(kind, 3, **limits)
    steps = drive(env, ACTIONS)
    for row in range(3):
        assert_row_equals(steps[row], simulate_row(ACTIONS[row].tolist(), 100 * row, **limits))


@pytest.mark.parametrize("kind", ["parallel inside", "parallel outside"])
def test_parallel_workers(kind):
    env = batched_env(kind, 2, episodes=3)
    try:
        check_env_specs(env)
        env.set_seed(0)
        steps = drive(env, ACTIONS[:2])
    finally:
        env.close()
    for row in range(2):
        expected = simulate_row(ACTIONS[row].tolist(), 100 * row, episodes=3)
        assert_row_equals(steps[row], expected)


@pytest.mark.parametrize("batch_size", [(), (1,), (2, 3)])
def test_any_batch_shape(batch_size):
    env = make_trial_env(CountingEnv(batch_size), episodes=2, horizon=6)
    check_env_specs(env)
    env.set_seed(0)
    rows = CountingEnv(batch_size).numel()
    actions = torch.randint(NUM_ACTIONS, (rows, 20))
    steps = drive(env, actions.view(*batch_size, 20)).reshape(rows, 20)
    for row in range(rows):
        expected = simulate_row(actions[row].tolist(), 100 * row, 2, 6)
        assert_row_equals(steps[row], expected)


@pytest.mark.parametrize("kind", IN_PROCESS)
def test_specs(kind):
    env = batched_env(kind, 2, episodes=2, horizon=5)
    check_env_specs(env)
    keys = {"episode_idx", "soft_reset", "episode_return", "trial_progress", "time_idx"}
    assert keys <= set(env.full_state_spec.keys())


def test_rollout_and_collector_are_continuous():
    env = make_trial_env(CountingEnv([3]), episodes=2)
    assert_continuous(env.rollout(30, break_when_any_done=False))
    collector = Collector(env, frames_per_batch=60, total_frames=180)
    batches = list(collector)
    collector.shutdown()
    steps = torch.cat(batches, 1)
    assert_continuous(steps)
    for row in range(3):
        tasks = steps["observation"][row, :, 0]
        is_init = steps["is_init"][row, :, 0]
        # Collection goes on across batches: a new task exactly where a trial begins.
        assert torch.equal(tasks[1:] - tasks[:-1], is_init[1:].float())


def test_partial_reset_leaves_other_rows_alone():
    env = make_trial_env(CountingEnv([2]), episodes=3)
    steps = env.rollout(4, break_when_any_done=False)
    tensordict = TensorDict({}, batch_size=[2]).update(steps["next"][:, -1])
    before = tensordict.clone()
    tensordict["_reset"] = torch.tensor([[True], [False]])
    after = env.reset(tensordict)
    for key in ("episode_idx", "episode_return", "time_idx", "prev_action", "observation"):
        assert torch.equal(after[key][1], before[key][1]), key
    assert after["time_idx"].tolist() == [[0], [4]]
    assert after["soft_reset"][0]
    assert not after["prev_action"][0].any()


@pytest.mark.parametrize("kind", ["native", "serial outside"])
def test_rows_that_finished_wait_for_the_others(kind):
    # break_when_all_done steps only the rows whose trial goes on (`_step`). The environment below
    # must respect that itself, which CountingEnv doesn't, but Serial and MetaFrozenLake do.
    base = MetaFrozenLake(batch_size=[3], seed=0)
    if kind == "serial outside":
        base = SerialEnv(3, [partial(MetaFrozenLake, seed=seed) for seed in range(3)])
    env = make_trial_env(base, episodes=2)
    steps = env.rollout(100, break_when_all_done=True)
    ends = steps["next", "done"][..., 0].long().argmax(-1)
    assert len(set(ends.tolist())) > 1
    for row, end in enumerate(ends.tolist()):
        last = steps["next"][row, end]
        assert (steps["next", "time_idx"][row, end:] == last["time_idx"]).all()
        assert torch.equal(steps["time_idx"][row, : end + 1, 0], torch.arange(end + 1))


def test_rows_that_skip_a_step_stay_as_they_were():
    env = make_trial_env(MetaFrozenLake(batch_size=[2], seed=0), episodes=3, horizon=6)
    tensordict = env.reset()
    # Staying twice, then a move that both rows survive.
    for action in (0, 0, 1):
        action = torch.full((2,), action)
        _, tensordict = env.step_and_maybe_reset(tensordict.set("action", action))
    assert tensordict["observation"][1].any()
    tensordict["_step"] = torch.tensor([[True], [False]])
    # Also when the skipped row looks done, as the rows of a finished trial do.
    tensordict["done"] = torch.tensor([[False], [True]])
    before = tensordict.clone()
    after = env.step(tensordict.set("action", torch.tensor([2, 2])))["next"]
    previous = ["prev_action", "prev_reward", "time_idx"]
    kept = ["observation", "done", *env.transform[0].out_keys, *previous]
    for key in kept:
        assert torch.equal(after[key][1], before[key][1]), key
    assert after["time_idx"].flatten().tolist() == [4, 3]
    assert after["prev_action"][0].tolist() == [0, 0, 1, 0, 0]


# ---------------------------------------------------------------- other pieces


def test_inner_step_counter_restarts_with_each_episode():
    base = TransformedEnv(CountingEnv([2]), StepCounter(max_steps=3))
    env = make_trial_env(base, episodes=2)
    check_env_specs(env)
    steps = drive(env, torch.tensor([[0, 0, 0, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0, 0]]))
    assert steps["step_count"][..., 0].tolist() == [[0, 1, 2, 0, 1, 2, 0], [0, 0, 1, 2, 0, 1, 2]]
    assert steps["time_idx"][..., 0].tolist() == [[0, 1, 2, 3, 4, 5, 0], [0, 1, 2, 3, 0, 1, 2]]
    assert not steps["next", "truncated"].any()


def test_nested_compose_finds_the_transforms_before_it():
    env = TransformedEnv(
        CountingEnv(), Compose(StepCounter(2), Compose(TrialTransform(episodes=2)), InitTracker())
    )
    steps = drive(env, torch.zeros(6, dtype=torch.int64))
    assert steps["step_count"].flatten().tolist() == [0, 1, 0, 1, 0, 1]


def test_tensors_given_out_are_not_written_to_later():
    env = make_trial_env(CountingEnv([2]), episodes=2)
    tensordict = env.reset()
    steps, copies = [], []
    for action in ACTIONS[:2].unbind(-1):
        step, tensordict = env.step_and_maybe_reset(tensordict.set("action", action))
        steps.append(step)
        copies.append(step.clone())
    for step, expected in zip(steps, copies, strict=True):
        assert (step == expected).all()


def _through_pickle(env):
    return pickle.loads(pickle.dumps(env))  # noqa: S301 - our own bytes


@pytest.mark.parametrize("copy_env", [copy.deepcopy, _through_pickle])
def test_copies_are_independent(copy_env):
    env = make_trial_env(CountingEnv([3]), episodes=3)
    drive(env, ACTIONS[:, :4])
    twin = copy_env(env)
    env.set_seed(0)
    drive(env, ACTIONS)
    twin.set_seed(0)
    steps = drive(twin, ACTIONS)
    for row in range(3):
        assert_row_equals(steps[row], simulate_row(ACTIONS[row].tolist(), 100 * row, episodes=3))


def test_meta_frozen_lake_repeats_its_lake():
    base = MetaFrozenLake(size=3, batch_size=[16], seed=0)
    env = make_trial_env(base, episodes=4)
    check_env_specs(env)
    tensordict = env.reset()
    lakes, is_new = [], []
    for _ in range(80):
        lakes.append(base.holes)
        is_new.append(tensordict["is_init"][:, 0])
        _, tensordict = env.step_and_maybe_reset(env.rand_action(tensordict))
    changed = torch.stack(
        [(a != b).flatten(1).any(1) for a, b in zip(lakes[1:], lakes[:-1], strict=True)]
    )
    is_new = torch.stack(is_new[1:])
    assert not changed[~is_new].any()
    assert changed[is_new].float().mean() > 0.5


# ---------------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({}, "a trial needs an end"),
        ({"episodes": 0}, "episodes must be at least 1, got 0"),
        ({"horizon": 2.5}, "horizon must be an integer of at least 1, got 2.5"),
        (
            {"episodes": 1, "trial_end": "done"},
            "trial_end must be one of .*'episode'.*, got 'done'",
        ),
        ({"episodes": 1, "repeat": "again"}, "repeat must be one of None, 'env', .* got 'again'"),
        (
            {"episodes": 1, "repeat": "options"},
            "belong together, got repeat='options', options=None",
        ),
        ({"episodes": 1, "options": {}}, "belong together, got repeat=None"),
    ],
)
def test_arguments_out_of_range(kwargs, match):
    with pytest.raises(ValueError, match=match):
        TrialTransform(**kwargs)


def test_an_environment_with_its_own_entry():
    base = TransformedEnv(CountingEnv(), TrialTransform(episodes=2))
    with pytest.raises(ValueError, match="writes 'episode_idx', but the environment already has"):
        make_trial_env(base, episodes=2)


@pytest.mark.parametrize("transform", [PreviousStepTransform, InitTracker])
def test_transforms_that_would_restart_with_every_episode(transform):
    env = TransformedEnv(CountingEnv(), Compose(transform(), TrialTransform(episodes=2)))
    with pytest.raises(ValueError, match="must come after the trial transform.*below it"):
        env.reset()


@pytest.mark.parametrize("transform", [FrameSkipTransform(2), MultiAction()])
def test_transforms_above_that_step_by_themselves(transform):
    env = make_trial_env(CountingEnv(), episodes=2).append_transform(transform)
    with pytest.raises(
        ValueError, match=rf"must come before .* got \['{type(transform).__name__}'\]"
    ):
        env.reset()


def test_frames_are_skipped_below():
    env = make_trial_env(TransformedEnv(CountingEnv(), FrameSkipTransform(2)), episodes=2)
    steps = drive(env, torch.tensor([0, 1, 0, 1]))
    assert steps["next", "reward"].flatten().tolist() == [1, 5, 1, 5]
    assert steps["next", "episode_return"].flatten().tolist() == [1, 6, 1, 6]


@pytest.mark.parametrize("flags", [["done"], ["done", "terminated"]])
def test_flags_that_the_environment_lacks(flags):
    class FewerFlags(CountingEnv):
        def __init__(self):
            super().__init__()
            self.done_spec = Composite({flag: self.done_spec[flag] for flag in flags})

        def _step(self, tensordict):
            out = super()._step(tensordict)
            return out.exclude(*{"terminated", "truncated"}.difference(flags))

    env = make_trial_env(FewerFlags(), episodes=2)
    check_env_specs(env)
    steps = drive(env, torch.tensor([0, 1, 0, 1, 0]))
    assert steps["episode_idx"].flatten().tolist() == [0, 0, 1, 1, 0]
    assert steps["next", "done"].flatten().tolist() == [False, False, False, True, False]


class TaggedEnv(CountingEnv):
    """Also observes something that is no tensor, and something nested."""

    def __init__(self, batch_size=()) -> None:
        super().__init__(batch_size)
        self.observation_spec["tag"] = NonTensor(shape=self.batch_size, example_data="0")
        nested = Composite(value=Unbounded((*self.batch_size, 1)), shape=self.batch_size)
        self.observation_spec["nested"] = nested

    def _tag(self, tensordict):
        text = [str(number) for number in self.time.flatten().tolist()]
        tensordict["tag"] = NonTensorStack(*text) if self.batch_size else text[0]
        tensordict["nested", "value"] = self.time.float()
        return tensordict

    def _reset(self, tensordict=None, **kwargs):
        return self._tag(super()._reset(tensordict, **kwargs))

    def _step(self, tensordict):
        return self._tag(super()._step(tensordict))


def test_soft_reset_reaches_entries_that_are_nested_or_no_tensors():
    env = make_trial_env(TaggedEnv([2]), episodes=3)
    tensordict = env.reset()
    step = env.step(tensordict.set("action", torch.tensor([0, 1])))
    assert step["next", "tag"] == ["1", "0"]
    assert step["next", "nested", "value"].flatten().tolist() == [1, 0]


def test_several_done_flags():
    base = CountingEnv([2])
    flags = Categorical(2, shape=(2, 3), dtype=torch.bool)
    base.done_spec = Composite(done=flags, terminated=flags.clone(), shape=(2,))
    with pytest.raises(
        ValueError, match=r"one reward and flags.* got .*'done': \(2, 3\).*Reduce those"
    ):
        make_trial_env(base, episodes=2)


def test_several_rewards():
    base = CountingEnv([2])
    base.reward_spec = Unbounded((2, 3))
    with pytest.raises(
        ValueError, match=r"one reward and .* of shape \(2, 1\), got .*'reward': \(2, 3\)"
    ):
        make_trial_env(base, episodes=2)


def test_step_without_reset_names_the_missing_entry():
    env = TransformedEnv(CountingEnv(), TrialTransform(episodes=2))
    env.reset()
    with pytest.raises(KeyError, match="needs the entry 'episode_idx'"):
        env.step(TensorDict({"action": torch.tensor(0)}))


def test_an_episode_that_begins_done():
    def repeat(env, reset_mask, tensordict):
        return tensordict

    env = TransformedEnv(CountingEnv(), TrialTransform(episodes=2, repeat=repeat))
    tensordict = env.reset().set("action", torch.tensor(1))
    step = env.step(tensordict)
    assert not step["next", "done"].any()

    def still_done(env, reset_mask, tensordict):
        return tensordict.set("done", reset_mask)

    env = TransformedEnv(CountingEnv(), TrialTransform(episodes=2, repeat=still_done))
    with pytest.raises(RuntimeError, match="must not be done when it begins"):
        env.step(env.reset().set("action", torch.tensor(1)))


def test_order_of_transforms_is_the_documented_one():
    env = make_trial_env(CountingEnv(), episodes=2)
    kinds = [type(transform) for transform in env.transform]
    assert kinds == [TrialTransform, PreviousStepTransform, InitTracker]
