from __future__ import annotations

from functools import partial

import gymnasium as gym
import pytest
import torch
from tensordict import assert_close
from torchrl.envs import (
    Compose,
    GymWrapper,
    ObservationNorm,
    SerialEnv,
    StepCounter,
    TransformedEnv,
    check_env_specs,
)

from tests.envs.transforms.helpers import (
    NUM_ACTIONS,
    CountingEnv,
    ForgetfulEnv,
    SeededGoal,
    SilentGoal,
    TensordictOnlyEnv,
    assert_row_equals,
    drive,
    make_seeded_goal,
    make_vector_goal,
    number_tasks,
    simulate_row,
)
from tests.envs.workers import forked
from torchrl_amago.envs.transforms import TrialTransform, make_trial_env

ACTIONS = torch.tensor(
    [
        [0, 1, 2, 0, 0, 1, 0, 0, 0, 0, 2, 1, 1, 0, 0],
        [1, 1, 1, 0, 0, 0, 0, 0, 2, 1, 0, 0, 1, 0, 1],
        [0, 0, 0, 0, 0, 0, 0, 1, 0, 2, 0, 1, 0, 0, 0],
    ]
)


def make_seeded_trials() -> TransformedEnv:
    return make_trial_env(make_seeded_goal(), episodes=3)


def goal_env(kind: str, rows: int = 3):
    """k-shot environments over `SeededGoal`, put together in one of several ways."""
    if kind == "vector":
        return make_trial_env(make_vector_goal(rows), episodes=3)
    if kind == "serial inside":
        return SerialEnv(rows, make_seeded_trials)
    if kind == "serial outside":
        return make_trial_env(SerialEnv(rows, make_seeded_goal), episodes=3)
    raise ValueError(kind)


def assert_goal_trials(steps, actions, episodes=3):
    """The trials of SeededGoal have the reference's structure, and one goal each."""
    for row in range(len(actions)):
        expected = simulate_row(actions[row].tolist(), episodes=episodes)
        tasks = number_tasks(steps["observation"][row])
        assert tasks.tolist() == [step["root"]["observation"][0] for step in expected]
        for part, got in (("root", steps[row]), ("next", steps["next"][row])):
            for key in ("episode_idx", "soft_reset", "time_idx", "is_init"):
                wanted = [step[part][key] for step in expected]
                assert got[key].flatten().tolist() == wanted, (part, key)
            times = [step[part]["observation"][1] for step in expected]
            assert got["observation"][:, 1].tolist() == times


# ------------------------------------------------------------------------ seed


def test_one_line_makes_a_k_shot_task_of_a_seeded_gymnasium_environment():
    env = make_trial_env(SeededGoal(), episodes=3)
    check_env_specs(env)
    steps = drive(env, ACTIONS[0])
    assert_goal_trials(steps[None], ACTIONS[:1])


def test_the_seed_passed_again_is_the_one_of_the_trial():
    base = SeededGoal()
    env = TransformedEnv(make_seeded_goal(base), TrialTransform(episodes=2))
    base.received.clear()
    drive(env, torch.tensor([0, 1, 0, 1, 0, 2]))
    seeds = [seed for seed, _ in base.received if seed is not None]
    # Two episodes of the first trial, two of the second.
    assert len(seeds) == 4
    assert seeds[0] == seeds[1] != seeds[2] == seeds[3]


@pytest.mark.parametrize("kind", ["vector", "serial inside", "serial outside", "serial of vectors"])
def test_seeds_reach_every_row(kind):
    if kind == "serial of vectors":
        env = make_trial_env(SerialEnv(3, partial(_wrap_vector, 1)), episodes=3)
        check_env_specs(env)
        env.set_seed(0)
        steps = drive(env, ACTIONS.view(3, 1, -1)).squeeze(1)
    else:
        env = goal_env(kind)
        check_env_specs(env)
        env.set_seed(0)
        steps = drive(env, ACTIONS)
    assert_goal_trials(steps, ACTIONS)
    # No two rows share a task.
    goals = [set(row) for row in steps["observation"][..., 0].tolist()]
    assert len(set.union(*goals)) == sum(map(len, goals))


def _wrap_vector(rows: int) -> GymWrapper:
    return GymWrapper(make_vector_goal(rows), categorical_action_encoding=True)


@pytest.mark.parametrize("kind", ["vector", "serial inside", "serial outside"])
def test_set_seed_decides_the_tasks(kind):
    env = goal_env(kind)

    def goals(seed):
        env.set_seed(seed)
        return drive(env, ACTIONS)["observation"][..., 0]

    first = goals(7)
    assert torch.equal(goals(7), first)
    # Neither shifted by a row, although Gymnasium seeds the rows of a vector with seed + row.
    assert not torch.isin(goals(8), first).any()
    twin = goal_env(kind)
    twin.set_seed(7)
    assert torch.equal(drive(twin, ACTIONS)["observation"][..., 0], first)


def test_tasks_of_a_row_depend_neither_on_other_rows_nor_on_trial_lengths():
    env = goal_env("vector")

    def tasks(actions):
        env.set_seed(3)
        rows = drive(env, actions)["observation"][..., 0].tolist()
        return [list(dict.fromkeys(row)) for row in rows]

    for slow, fast in zip(tasks(ACTIONS), tasks(torch.ones_like(ACTIONS)), strict=True):
        assert len(fast) == 5
        assert slow == fast[: len(slow)]


def test_without_set_seed_every_environment_has_its_own_tasks():
    goals = [drive(goal_env("vector"), ACTIONS)["observation"][..., 0] for _ in range(2)]
    assert not torch.isin(*goals).any()


def test_warns_of_an_environment_that_hides_its_seed():
    base = make_seeded_goal(SilentGoal())
    env = TransformedEnv(base, TrialTransform(episodes=2))
    with pytest.warns(UserWarning, match="whose seed is unknown"):
        env.reset()
    # It warns once, and the trials are right nevertheless.
    steps = drive(env, torch.tensor([0, 1, 0, 1, 0]))
    assert number_tasks(steps["observation"]).tolist() == [0, 0, 0, 0, 1]


def test_the_global_generator_seeds_an_environment_that_hides_its_seed():
    def goals(seed):
        torch.manual_seed(seed)
        env = TransformedEnv(make_seeded_goal(SilentGoal()), TrialTransform(episodes=2))
        with pytest.warns(UserWarning, match="whose seed is unknown"):
            env.reset()
        return drive(env, torch.tensor([0, 1, 0, 1, 0]))["observation"]

    assert torch.equal(goals(5), goals(5))
    assert not (goals(5) == goals(6))[:, 0].any()


def test_parallel_workers_with_seeds_and_options():
    base = forked(2, make_seeded_goal)
    try:
        env = make_trial_env(base, episodes=3)
        env.set_seed(4)
        steps = drive(env, ACTIONS[:2])
        assert_goal_trials(steps, ACTIONS[:2])
        env.set_seed(4)
        again = drive(env, ACTIONS[:2])
        assert torch.equal(again["observation"], steps["observation"])
        # The same workers, now repeating by options of their own.
        env = make_trial_env(base, episodes=2, repeat="options", options=_goal_of_row)
        steps = drive(env, torch.ones(2, 4, dtype=torch.int64))
        assert steps["observation"][:, 1::2, 0].tolist() == [[5, 5], [6, 6]]
    finally:
        base.close()


def _goal_of_row(row: int) -> dict[str, float]:
    return {"goal": 5.0 + row}


# --------------------------------------------------------------------- options


@pytest.mark.parametrize("kind", ["single", "vector", "serial"])
def test_options_keep_the_task(kind):
    options = {"keep": True}
    base = {
        "single": make_seeded_goal,
        "vector": lambda: make_vector_goal(3),
        "serial": lambda: SerialEnv(3, make_seeded_goal),
    }[kind]()
    env = make_trial_env(base, episodes=3, repeat="options", options=options)
    check_env_specs(env)
    actions = ACTIONS[0] if kind == "single" else ACTIONS
    steps = drive(env, actions).reshape(-1, ACTIONS.shape[1])
    assert_goal_trials(steps, actions.reshape(-1, ACTIONS.shape[1]))
    assert options == {"keep": True}


class OptionEater(SeededGoal):
    """Uses its options up."""

    def reset(self, *, seed=None, options=None):
        out = super().reset(seed=seed, options=options)
        if options:
            options.clear()
        return out


def test_options_survive_an_environment_that_changes_them():
    base = make_seeded_goal(OptionEater())
    env = make_trial_env(base, episodes=3, repeat="options", options={"keep": True})
    assert_goal_trials(drive(env, ACTIONS[0])[None], ACTIONS[:1])


@pytest.mark.parametrize("kind", ["vector", "serial"])
def test_options_of_each_row(kind):
    base = make_vector_goal(2) if kind == "vector" else SerialEnv(2, make_seeded_goal)
    env = make_trial_env(base, episodes=3, repeat="options", options=_goal_of_row)
    steps = drive(env, torch.tensor([[0, 1, 0, 1, 0], [1, 0, 0, 1, 0]]))
    goals = steps["observation"][..., 0]
    assert goals[0, 2:].tolist() == [5, 5, 5]
    assert goals[1, 1:].tolist() == [6, 6, 6, 6]
    assert not torch.isin(goals[:, 0], torch.tensor([5.0, 6.0])).any()
    assert steps["observation"][..., 1].tolist() == [[0, 1, 0, 1, 0], [0, 0, 1, 2, 0]]


# -------------------------------------------------------------------- function


def test_function_repeats_the_task():
    calls = []

    def repeat(env, reset_mask, tensordict):
        calls.append(reset_mask.flatten().tolist())
        tensordict.set_("observation", torch.full_like(tensordict["observation"], -1.0))
        return env.reset(tensordict.empty().set("_reset", reset_mask), repeat_task=True)

    env = make_trial_env(CountingEnv([3]), episodes=3, repeat=repeat)
    steps = drive(env, ACTIONS)
    for row in range(3):
        assert_row_equals(steps[row], simulate_row(ACTIONS[row].tolist(), 100 * row, episodes=3))
    assert calls[:3] == [[False, True, False], [True, True, False], [True, False, False]]


def test_function_resets_the_transforms_below():
    def repeat(env, reset_mask, tensordict):
        return env.reset(tensordict.empty().set("_reset", reset_mask), repeat_task=True)

    def steps(repeat):
        shift = ObservationNorm(loc=100.0, scale=1.0, in_keys=["observation"])
        base = TransformedEnv(CountingEnv([2]), Compose(shift, StepCounter(3)))
        return drive(make_trial_env(base, episodes=3, repeat=repeat), ACTIONS[:2])

    assert_close(steps(repeat), steps("env"), rtol=0, atol=0)


@pytest.mark.parametrize(("result", "got"), [(None, "NoneType"), ("wrong size", r"\(1,\)")])
def test_function_must_return_all_rows(result, got):
    def repeat(env, reset_mask, tensordict):
        return tensordict[:1] if result else None

    env = make_trial_env(CountingEnv([2]), episodes=2, repeat=repeat)
    with pytest.raises(ValueError, match=rf"must return a tensordict of .* \(2,\), got {got}"):
        env.step(env.reset().set("action", torch.ones(2, dtype=torch.int64)))


# ---------------------------------------------------------------------- errors


def test_chooses_by_what_the_environment_can():
    trials = {
        "EnvRepeater": make_trial_env(CountingEnv(), episodes=2),
        "SeedRepeater": make_trial_env(make_seeded_goal(), episodes=2),
    }
    for name, env in trials.items():
        assert type(env.transform[0]._get_repeater()).__name__ == name


@pytest.mark.parametrize(
    ("make", "kwargs", "match"),
    [
        (
            ForgetfulEnv,
            {},
            "needs an environment that can repeat a task.*got ForgetfulEnv.*repeat=f",
        ),
        (
            lambda: SerialEnv(2, ForgetfulEnv),
            {},
            "needs an environment that can repeat a task.*got ForgetfulEnv",
        ),
        (ForgetfulEnv, {"repeat": "env"}, "got ForgetfulEnv for repeat='env'.*repeats_task = True"),
        (SeededGoal, {"repeat": "env"}, "got GymnasiumEnv for repeat='env'"),
        (CountingEnv, {"repeat": "seed"}, "got CountingEnv for repeat='seed'.*a Gymnasium env"),
        (
            CountingEnv,
            {"repeat": "options", "options": {}},
            "got CountingEnv for repeat='options'",
        ),
        (
            lambda: SerialEnv(2, TensordictOnlyEnv),
            {},
            "_reset takes the keyword repeat_task.*Add the keyword",
        ),
        (
            lambda: make_vector_goal(2, autoreset_mode=gym.vector.AutoresetMode.SAME_STEP),
            {},
            "autoreset_mode=AutoresetMode.DISABLED, got .*SAME_STEP",
        ),
    ],
)
def test_environments_that_cannot_repeat_a_task(make, kwargs, match):
    with pytest.raises(ValueError, match=match):
        make_trial_env(make(), episodes=2, **kwargs)


def test_the_first_reset_raises_without_make_trial_env():
    env = TransformedEnv(ForgetfulEnv(), TrialTransform(episodes=2))
    with pytest.raises(ValueError, match="can repeat a task"):
        env.reset()


def test_a_task_seed_that_was_lost_raises():
    env = TransformedEnv(make_seeded_goal(), TrialTransform(episodes=3))
    tensordict = env.reset().set("step_count", torch.zeros(1, dtype=torch.int64))
    env.append_transform(StepCounter())
    with pytest.raises(RuntimeError, match="needs the seed of its trial's task, and there is none"):
        env.step(tensordict.set("action", torch.tensor(1)))


def test_no_task_leaks_into_the_next_trial():
    env = goal_env("vector", 2)
    actions = torch.randint(NUM_ACTIONS, (2, 60))
    steps = drive(env, actions)
    assert_goal_trials(steps, actions)
