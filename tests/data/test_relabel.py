"""Relabelling, compared with a plain replay of the rules and with the environment; its draws."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torchrl.envs.utils import step_mdp

from tests.data.trials import assert_columns, assert_same, make_buffer, seeded
from torchrl_amago import MazeRunner, TrialCollector, make_trial_buffer, make_trial_env
from torchrl_amago.data.relabel import GoalSequenceRelabel, HindsightRelabel
from torchrl_amago.data.relabel.goals import meeting_steps

MASK = ("collector", "mask")
LIMIT = 16  # steps of an episode in a maze
EMPTY = (-1.0, -1.0)
A, B, X, Y = (0.0, 0.0), (0.75, 0.75), (0.25, 0.0), (0.5, 0.0)  # goals and other places
FLAGS = [("next", flag) for flag in ("done", "terminated", "truncated")]
REWARDS = [("next", "reward"), "prev_reward", ("next", "prev_reward")]
REPLACED = ["goals", ("next", "goals"), *REWARDS, *FLAGS]


# ------------------------------------------------------------------ a world, by the book


def play(achieved: list[list[tuple]], goals: list[tuple], before: float = 0.0) -> list[dict]:
    """Make a trial with these achievements in its steps and these goals, until it ends.

    One goal is met in a step, the first that isn't empty; then it is shown empty. The last one ends
    the trial; if that doesn't happen, the last step truncates it.
    """
    goals, steps = list(goals), []
    for t, places in enumerate(achieved):
        shown = list(goals)
        left = [i for i, goal in enumerate(goals) if goal != EMPTY]
        reward = float(bool(left) and goals[left[0]] in places)
        if reward:
            goals[left[0]] = EMPTY
        terminated = reward == 1.0 and len(left) == 1
        last = terminated or t == len(achieved) - 1
        steps.append(
            {
                "goals": shown,
                ("next", "goals"): list(goals),
                ("next", "reward"): [reward],
                "prev_reward": [before],
                ("next", "prev_reward"): [reward],
                ("next", "done"): [last],
                ("next", "terminated"): [terminated],
                ("next", "truncated"): [last and not terminated],
                ("next", "achieved"): places,
            }
        )
        before = reward
        if terminated:
            break
    return steps


def as_batch(trials: list[list[dict]]) -> TensorDict:
    """Trials side by side, padded with NaN, in integers 1, and True."""
    longest = max(map(len, trials))
    batch = TensorDict({}, [len(trials), longest])
    for key, value in trials[0][0].items():
        like = torch.tensor(value)
        fill = float("nan") if like.is_floating_point() else True
        column = torch.full((len(trials), longest, *like.shape), fill, dtype=like.dtype)
        for b, steps in enumerate(trials):
            column[b, : len(steps)] = torch.tensor([step[key] for step in steps])
        batch[key] = column
    length = torch.tensor([len(steps) for steps in trials])
    batch[MASK] = torch.arange(longest) < length.unsqueeze(-1)
    return batch


def assert_shows(batch: TensorDict, trials: list[list[dict]], keys=REPLACED) -> None:
    """The batch holds these trials, bit by bit."""
    assert batch[MASK].sum(-1).tolist() == [len(steps) for steps in trials]
    for b, steps in enumerate(trials):
        for key in keys:
            shown = batch[key][b][batch[MASK][b]]
            assert torch.equal(shown, torch.tensor([step[key] for step in steps])), (b, key)


places = st.tuples(st.integers(0, 2), st.integers(0, 1)).map(lambda xy: (xy[0] / 4, xy[1] / 4))


@st.composite
def worlds(draw):
    """(achieved, goals) of some trials of equal numbers of goals; some begin with empty ones."""
    num_goals, num_places = draw(st.integers(1, 4)), draw(st.integers(1, 3))
    trials = []
    for _ in range(draw(st.integers(1, 4))):
        in_step = st.lists(places | st.just(EMPTY), min_size=num_places, max_size=num_places)
        achieved = draw(st.lists(in_step, min_size=1, max_size=12))
        goals = draw(st.lists(places, min_size=num_goals, max_size=num_goals))
        num_empty = draw(st.integers(0, num_goals - 1))
        trials.append((achieved, [EMPTY] * num_empty + goals[num_empty:]))
    return trials


def stored(worlds) -> TensorDict:
    return as_batch([play(*world) for world in worlds])


def replayed(worlds, new_goals) -> list[list[dict]]:
    """The stored trials with other goals.

    They end where their own goals were met; later steps are unknown: with goals that aren't met by
    then, they are cut off there.
    """
    seen = [[step[("next", "achieved")] for step in play(*world)] for world in worlds]
    return [play(achieved, goals) for achieved, goals in zip(seen, new_goals, strict=True)]


def with_single_goals(batch: TensorDict) -> TensorDict:
    """The batch with the first of its goals also under the names that HindsightRelabel reads."""
    batch["desired_goal"] = batch["goals"][:, :, 0]
    batch["next", "desired_goal"] = batch["next", "goals"][:, :, 0]
    batch["next", "achieved_goal"] = batch["next", "achieved"]
    return batch


def goals_at_first(batch: TensorDict) -> list[list[tuple]]:
    return [[tuple(goal) for goal in goals] for goals in batch["goals"][:, 0].tolist()]


# ------------------------------------------------------------------ sequences


@given(worlds(), st.data())
def test_replay_with_any_goals_follows_the_rules(worlds, data):
    batch = stored(worlds)
    num_goals = batch["goals"].shape[2]
    sequence = st.lists(places, min_size=num_goals, max_size=num_goals)
    new = data.draw(st.lists(sequence, min_size=len(worlds), max_size=len(worlds)))
    out = GoalSequenceRelabel(check=False).with_goals(batch, torch.tensor(new))
    assert_shows(out, replayed(worlds, new))
    # The original goals, and new ones for no trial, change nothing.
    goals, nowhere = batch["goals"][:, 0], torch.zeros(len(worlds), dtype=torch.bool)
    assert_shows(GoalSequenceRelabel().with_goals(batch, goals), [play(*world) for world in worlds])
    kept = GoalSequenceRelabel().with_goals(batch, torch.tensor(new), nowhere)
    assert_same(batch.clone().update(kept), batch)  # padding included


@given(worlds(), st.sampled_from(["some", "all"]), st.integers(0, 2**31))
def test_relabelled_trials_are_those_with_new_goals_made_as_the_paper_says(worlds, strategy, seed):
    batch = stored(worlds)
    before = batch.clone()
    out = batch.clone().update(GoalSequenceRelabel(strategy).relabel_trials(batch, seeded(seed)))
    assert_same(batch, before)
    assert_shows(out, replayed(worlds, goals_at_first(out)))
    for b, ((achieved, goals), new) in enumerate(zip(worlds, goals_at_first(out), strict=True)):
        steps = play(achieved, goals)
        old = [goal for goal in goals if goal != EMPTY]
        assert new[: len(goals) - len(old)] == [EMPTY] * (len(goals) - len(old))
        new = new[len(goals) - len(old) :]
        assert EMPTY not in new
        met = [t for t, step in enumerate(steps) if step[("next", "reward")][0]]
        done, open_ = old[: len(met)], old[len(met) :]
        gives = [any(place != EMPTY for place in step[("next", "achieved")]) for step in steps]
        free = [t for t in range(len(steps)) if t not in met and gives[t]]
        num_met = int(out["next", "reward"][b][out[MASK][b]].sum())
        if strategy == "all":
            assert num_met >= min(len(old), len(done) + len(free))
        # Goals that were met stay, in their order; open ones keep their places at the end.
        rest = iter(new)
        assert all(goal in rest for goal in done)
        kept = next(k for k in range(len(open_) + 1) if new[k + len(done) :] == open_[k:])
        assert kept <= len(free)
        everything = [place for step in steps for place in step[("next", "achieved")]]
        assert all(goal in everything for goal in new[: kept + len(done)])


def test_a_relabelled_trial_by_hand():
    """Goals A, B; the walk is X, A, Y, A. Replaced is B, by X or Y (or A)."""
    world, seen = ([[X], [A], [Y], [A]], [A, B]), set()
    for seed in range(40):
        out = GoalSequenceRelabel("all").relabel_trials(stored([world]), seeded(seed))
        goals = tuple(goals_at_first(out)[0])
        seen.add(goals)
        reward = {(X, A): [1, 1], (A, Y): [0, 1, 1], (A, A): [0, 1, 0, 1]}[goals]
        assert_shows(out, replayed([world], [goals]))
        assert out["next", "reward"][out[MASK]].flatten().tolist() == reward
    assert len(seen) == 3


def test_some_draws_each_number_of_new_goals_alike():
    rows, num_goals = 6000, 3
    walk = [[(t / 8, 0.0)] for t in range(8)]
    goals = [(9.0, 9.0), (8.0, 8.0), (7.0, 7.0)]
    batch = as_batch([play(walk, goals)]).expand(rows, 8).contiguous()
    out = GoalSequenceRelabel("some").relabel_trials(batch, seeded())
    num_new = out["next", "reward"].sum((1, 2)).long()
    fraction = torch.bincount(num_new, minlength=num_goals + 1) / rows
    assert fraction.tolist() == pytest.approx([0.25] * 4, abs=4 * (0.1875 / rows) ** 0.5)
    # Where one goal is new, each step's achievement is as likely.
    first = out["goals"][num_new == 1, 0, 0, 0]
    count = torch.bincount((first * 8).round().long(), minlength=8)
    expected = len(first) / 8
    assert ((count - expected) ** 2 / expected).sum() < 24.3  # 99.9%, 7 degrees of freedom
    assert (out["goals"][num_new == 1, 0, 1:] == torch.tensor(goals[1:])).all()


def test_each_achieved_goal_is_as_likely_and_a_step_gives_one():
    """Step 0 achieves two things and step 1 one: of three, each is the new goal equally often."""
    rows = 6000
    walk = [[A, X], [EMPTY, Y]]
    batch = as_batch([play(walk, [B])]).expand(rows, 2).contiguous()
    out = GoalSequenceRelabel("all").relabel_trials(batch, seeded())
    count = Counter(tuple(goal) for goal in out["goals"][:, 0, 0].tolist())
    assert set(count) == {A, X, Y}
    for number in count.values():
        assert number / rows == pytest.approx(1 / 3, abs=4 * (2 / 9 / rows) ** 0.5)
    both = as_batch([play(walk, [B, B])]).expand(200, 2).contiguous()
    out = GoalSequenceRelabel("all").relabel_trials(both, seeded())
    assert (out["goals"][:, 0, 1] == torch.tensor(Y)).all()
    assert out[MASK].all()


def test_none_reads_and_changes_nothing():
    relabel = GoalSequenceRelabel("none")
    assert relabel.in_keys == []
    trials = TensorDict({MASK: torch.tensor([[True, False]])}, [1, 2])
    assert_same(relabel.relabel_trials(trials), trials)


def test_goals_that_stay_visible_and_trials_that_go_on():
    trial = play([[X], [A], [B], [X]], [X, X])
    for step in trial:
        step["goals"] = step[("next", "goals")] = [X, X]
        step[("next", "terminated")] = [False]
        step[("next", "truncated")] = step[("next", "done")]
    batch = as_batch([trial])
    relabel = GoalSequenceRelabel(empty_goal=None, ends_trial=False)
    relabel.relabel_trials(batch)  # replays the stored trial, and finds it
    out = relabel.with_goals(batch, torch.tensor([[A, B]]))
    assert out[MASK].all()
    assert_columns(out["next"], reward=[0, 1, 1, 0], terminated=[False] * 4)
    assert (out["goals"] == torch.tensor([A, B])).all()


def rewarded(batch: TensorDict, reward: float) -> TensorDict:
    """Trials that meet no goal, with this reward for it in place of 0."""
    for key in (("next", "reward"), ("next", "prev_reward")):
        batch[key] += reward
    batch["prev_reward"][:, 1:] += reward
    return batch


def test_any_reward_function():
    """Being within 0.3 of a goal is worth the closeness; nearness decides, not equality."""

    def closeness(achieved, goal):
        distance = (achieved - goal.unsqueeze(-2)).norm(dim=-1).amin(-1)
        return torch.where(distance < 0.3, 1 - distance, -0.25)

    walk = [[(place, 0.0)] for place in (0.0, 1.0, 2.25, 3.0)]
    batch = rewarded(as_batch([play(walk, [(5.0, 0.0), (6.0, 0.0)])]), -0.25)
    relabel = GoalSequenceRelabel(reward_fn=closeness)
    relabel.relabel_trials(batch)
    out = relabel.with_goals(batch, torch.tensor([[[1.0, 0.0], [2.0, 0.0]]]))
    assert out["next", "reward"].flatten().tolist()[:3] == [-0.25, 1.0, 0.75]
    assert out[MASK].sum() == 3
    assert out["next", "terminated"].flatten()[:3].tolist() == [False, False, True]


def test_entries_of_other_names_nested_ones_too():
    renamed = {
        "goals": ("instruction", "goals"),
        "prev_reward": "before",
        ("next", "goals"): ("next", "instruction", "goals"),
        ("next", "prev_reward"): ("next", "before"),
        ("next", "reward"): ("next", "score"),
        ("next", "achieved"): ("next", "seen", "achieved"),
    }
    batch = as_batch([play([[A], [X]], [Y])])
    other = TensorDict({renamed.get(k, k): batch[k] for k in batch.keys(True, True)}, [1, 2])
    goal_keys = {"goal_key": ("instruction", "goals"), "achieved_key": ("seen", "achieved")}
    reward_keys = {"reward_key": "score", "prev_reward_key": "before"}
    relabel = GoalSequenceRelabel("all", **goal_keys, **reward_keys)
    assert set(relabel.in_keys) == set(other.keys(True, True)) - {MASK}
    out = relabel.relabel_trials(other, seeded())
    expected = GoalSequenceRelabel("all").relabel_trials(batch, seeded())
    for key in REPLACED:
        assert torch.equal(out[renamed.get(key, key)], expected[key])


def test_integer_goals_of_one_number():
    """A goal is one of some tokens; -1 is none, which goals must be able to hold."""
    batch = as_batch([play([[(-1,)], [(4,)], [(5,)]], [(7,), (8,)])])
    out = GoalSequenceRelabel("all").relabel_trials(batch)
    assert out["goals"].dtype == torch.int64
    assert out["goals"][..., 0].tolist() == [[[4, 5], [4, 5], [-1, 5]]]
    assert out["next", "goals"][0, -1, :, 0].tolist() == [-1, -1]
    batch["goals"] = batch["goals"].to(torch.uint8)
    with pytest.raises(RuntimeError, match="cannot be converted to type uint8_t"):
        GoalSequenceRelabel().relabel_trials(batch)


YES = torch.tensor([[[True]]])
HALF = {("next", "reward"): torch.tensor([[[0.5], [0.0]]])}
CUT = {("next", "terminated"): ~YES, ("next", "truncated"): YES}


@pytest.mark.parametrize(
    ("trial", "changes", "match"),
    [
        (play([[X], [A]], [A, X]) * 2, {}, r"\['goals'.*single episode"),  # two episodes
        (play([[A], [X]], [Y]), HALF, r"\[\('next', 'reward'\).*environment's reward as reward_fn"),
        (play([[A]], [A]), CUT, r"'terminated'\), .*ends `terminated` when it meets its goal, as"),
    ],
    ids=["episodes", "reward", "truncated"],
)
def test_trials_of_something_else_raise_with_the_remedy_and_on_request_not(trial, changes, match):
    batch = as_batch([trial]).update(changes)
    with pytest.raises(ValueError, match=rf"reproduce the stored trials .* {match}"):
        GoalSequenceRelabel().relabel_trials(batch)
    GoalSequenceRelabel(check=False).relabel_trials(batch)


def test_trials_are_checked_until_a_goal_was_met():
    missed, met = as_batch([play([[X], [X]], [A])]), as_batch([play([[X], [A]], [A])])
    relabel = GoalSequenceRelabel(reward_fn=lambda achieved, goal: torch.zeros(1, 2, 1))
    relabel.relabel_trials(missed)  # says nothing of reward_fn
    missed["prev_reward"] += 1
    relabel.relabel_trials(missed)  # says no more than the first
    with pytest.raises(ValueError, match=r"reproduce the stored trials .*'reward'"):
        relabel.relabel_trials(met)
    relabel = GoalSequenceRelabel()
    relabel.relabel_trials(met)
    met["next", "reward"] *= 2
    relabel.relabel_trials(met)  # is checked no more


@pytest.mark.parametrize("make", [GoalSequenceRelabel, HindsightRelabel])
def test_what_ended_a_trial_otherwise_still_does(make):
    batch = as_batch([play([[X], [X]], [A]), play([[X], [A]], [A])])
    batch["next", "terminated"][0, 1], batch["next", "truncated"][0, 1] = True, False  # it died
    goals = torch.tensor([[B], [B]])
    if make is HindsightRelabel:
        batch, goals = with_single_goals(batch), goals[:, 0]
    out = make(check=False).with_goals(batch, goals)
    assert_columns(out["next"], terminated=[0, 1, 0, 0], truncated=[0, 0, 0, 1], done=[0, 1] * 2)


def test_a_time_limit_that_terminates_just_when_a_goal_is_met():
    batch = as_batch([play([[X], [A]], [A, B])])
    batch["next", "terminated"][0, 1], batch["next", "truncated"][0, 1] = True, False
    GoalSequenceRelabel().relabel_trials(batch)  # finds what was stored
    out = GoalSequenceRelabel().with_goals(batch, torch.tensor([[B, A]]))
    assert out["next", "terminated"].flatten().tolist() == [False, True]


@pytest.mark.parametrize("make", [GoalSequenceRelabel, HindsightRelabel])
def test_shapes_that_do_not_fit_raise(make):
    batch = with_single_goals(as_batch([play([[A]], [A])]))
    relabel = make(reward_fn=lambda achieved, goal: (achieved == goal).all(-1))
    with pytest.raises(ValueError, match=r"goal, \(1, 1, 1\), got \(1, 1, 1, 1\).*Reduce over N"):
        relabel.relabel_trials(batch)
    batch["next", "achieved"] = batch["next", "achieved_goal"] = torch.zeros(1, 1, 1)
    with pytest.raises(ValueError, match=r"must have the shape \[2\] of a goal.*got \[1\]"):
        make().relabel_trials(batch)


def test_stored_trials_without_goals_raise():
    rb = make_buffer([5], relabel=HindsightRelabel())
    with pytest.raises(KeyError, match=r"desired_goal.* not found .*observation"):
        rb.sample()


def test_wrong_arguments_raise():
    with pytest.raises(ValueError, match="strategy must be one of 'some', 'all', 'none'"):
        GoalSequenceRelabel("most")
    with pytest.raises(ValueError, match="strategy must be one of 'future', 'final', 'episode'"):
        HindsightRelabel("past")
    with pytest.raises(ValueError, match=r"fraction must be in \[0, 1\], got 1.5"):
        HindsightRelabel(fraction=1.5)


@given(st.data())
def test_meeting_steps_are_those_of_a_plain_loop(data):
    num_steps, num_goals = data.draw(st.integers(1, 8)), data.draw(st.integers(1, 4))
    flags = st.lists(st.booleans(), min_size=num_goals, max_size=num_goals)
    hits = data.draw(st.lists(flags, min_size=num_steps, max_size=num_steps))
    is_empty = data.draw(flags)
    expected, now = [], -1
    for k in range(num_goals):
        if not is_empty[k]:
            now = next((t for t in range(now + 1, num_steps) if hits[t][k]), num_steps)
        expected.append(now)
    assert meeting_steps(torch.tensor([hits]), torch.tensor([is_empty])).tolist() == [expected]


# ------------------------------------------------------------------ the environment itself


def maze_env(rows=(8,), limit=LIMIT, trial_end="terminated", **options):
    options = {"num_goals": 1, "max_episode_steps": limit, **options}
    maze = MazeRunner(7, batch_size=rows, seed=0, **options)
    return make_trial_env(maze, episodes=1, trial_end=trial_end)


def walk(env, td: TensorDict, actions: torch.Tensor) -> TensorDict:
    """All rows take these actions, whatever becomes of them, `[rows, steps]`."""
    steps = []
    for action in actions:
        steps.append(env.step(td.set("action", action)))
        td = step_mdp(steps[-1])
    return torch.stack(steps, 1)


@pytest.mark.parametrize("strategy", ["some", "all"])
@pytest.mark.parametrize("trial_end", ["terminated", "episode"])
def test_relabelled_mazes_are_what_the_environment_does(strategy, trial_end):
    """The stored actions, in the same mazes with the new goals, give the relabelled trials."""
    rows, limit = [48], 60
    env = maze_env(rows, limit, trial_end, num_goals=3, randomize_actions=True)
    actions = torch.randint(5, (limit, *rows))
    trials = walk(env, env.reset(), actions)
    is_over = trials["next", "done"].squeeze(-1).cumsum(1) > 0
    trials[MASK] = torch.ones_like(is_over)
    trials[MASK][:, 1:] = ~is_over[:, :-1]
    own = GoalSequenceRelabel().with_goals(trials, trials["goals"][:, 0])
    assert torch.equal(own[MASK], trials[MASK])
    for key in REPLACED:
        assert torch.equal(own[key][trials[MASK]], trials[key][trials[MASK]])
    out = GoalSequenceRelabel(strategy).relabel_trials(trials, seeded())
    assert (out[MASK] != trials[MASK]).any()
    state = env.base_env.state_dict()
    state["_goals"] = (out["goals"][:, 0] * 7).round().long() @ torch.tensor([7, 1])
    env.base_env.load_state_dict(state)
    again = walk(env, env.reset(repeat_task=True), actions)
    for key in REPLACED:
        assert torch.equal(again[key][out[MASK]], out[key][out[MASK]]), key
    ends = out[MASK].sum(-1, keepdim=True) - 1
    assert again["next", "done"].squeeze(-1).gather(1, ends).all()


# ------------------------------------------------------------------ in a buffer


@pytest.fixture(scope="module")
def collected():
    """Trials of random actions, flat, as the collector writes them."""
    env, buffer = maze_env([16], 20, num_goals=2), make_buffer(capacity=10_000)
    torch.manual_seed(0)
    options = {"frames_per_batch": 16 * 60, "total_frames": 16 * 60, "replay_buffer": buffer}
    list(TrialCollector(env, env.rand_action, **options))
    return buffer[:]


def refilled(steps: TensorDict, slice_length: int, relabel=None, **options):
    options |= {"relabel": relabel, "warn_short": False}
    buffer = make_trial_buffer(10_000, slice_length, 64, **options)
    buffer.extend(steps)
    return buffer


def test_batches_of_a_buffer_hold_relabelled_trials(collected):
    buffer = refilled(collected, 20, GoalSequenceRelabel("some"))
    seen = Counter()
    for _ in range(3):
        for trial in buffer.sample().split(1):
            real = trial[trial[MASK]]["next"]
            achieved = [[tuple(place) for place in step] for step in real["achieved"].tolist()]
            expected = play(achieved, *goals_at_first(trial))
            # Trials out of time are terminated, too.
            expected[-1] |= {("next", "terminated"): [True], ("next", "truncated"): [False]}
            assert_shows(trial, [expected])
            seen[int(real["reward"].sum())] += 1
    assert set(seen) == {0, 1, 2}
    assert (buffer[:] == collected).all()


def test_slices_of_a_buffer_are_cut_from_relabelled_trials(collected):
    whole = refilled(collected, 20, GoalSequenceRelabel("all")).sample()
    reward = whole["next", "reward"].squeeze(-1).where(whole[MASK], 0)
    assert (reward.sum(-1) == 2).all()
    buffer = refilled(collected, 4, GoalSequenceRelabel("all"), crop="both")
    for batch in (whole, buffer.sample()):
        real = batch[MASK]
        follows = real[:, 1:]
        for key in ("goals", "prev_reward", "achieved"):
            assert torch.equal(batch[key][:, 1:][follows], batch["next", key][:, :-1][follows])
        assert torch.equal(batch["next", "prev_reward"][real], batch["next", "reward"][real])
        is_met = (batch["next", "goals"] == -1).all(-1)
        assert torch.equal(is_met.all(-1, keepdim=True)[real], batch["next", "terminated"][real])
        assert batch["next", "reward"][real].any()


# ------------------------------------------------------------------ single goals


def straight(length: int) -> list[list[tuple]]:
    """A walk 0, 1, 2, ..."""
    return [[(float(step),)] for step in range(length)]


def single_goal_trials(lengths: list[int]) -> TensorDict:
    """Trials that walk straight and never come to their goal."""
    batch = with_single_goals(as_batch([play(straight(m), [(99.0,)]) for m in lengths]))
    batch["next", "achieved_goal"] = batch["next", "achieved_goal"][:, :, 0]
    return batch


@pytest.mark.parametrize("strategy", ["final", "future", "episode"])
def test_single_goals_by_hand(strategy):
    lengths = [5, 2, 1] * 50
    batch = single_goal_trials(lengths)
    before = batch.clone()
    out = HindsightRelabel(strategy, fraction=1.0).relabel_trials(batch, seeded())
    assert_same(batch, before)
    goals = out["desired_goal"][:, :1]
    assert (out["desired_goal"] == goals).all()
    assert (out["next", "desired_goal"] == goals).all()
    goals, last = goals.flatten(), torch.tensor(lengths) - 1
    assert ((goals >= 0) & (goals <= last)).all()
    assert strategy != "final" or (goals == last).all()
    # The walk comes to n at step n, which ends it.
    assert torch.equal(out[MASK].sum(-1), goals.long() + 1)
    pairs = zip(lengths, goals.tolist(), strict=True)
    assert_shows(out, [play(straight(m), [(goal,)]) for m, goal in pairs], REWARDS + FLAGS)


def test_where_single_goals_come_from():
    rows, length = 9000, 4
    batch = single_goal_trials([length]).expand(rows, length).contiguous()
    # future: a step, then one that isn't before it.
    future = [sum(1 / (length - n) for n in range(step + 1)) / length for step in range(length)]
    for strategy, expected in (("episode", [0.25] * 4), ("future", future)):
        out = HindsightRelabel(strategy, fraction=1.0).relabel_trials(batch, seeded())
        count = torch.bincount(out["desired_goal"][:, 0, 0].long(), minlength=length)
        expected = torch.tensor(expected) * rows
        assert ((count - expected) ** 2 / expected).sum() < 16.3  # 99.9%, 3 degrees of freedom
    out = HindsightRelabel(fraction=0.3).relabel_trials(batch, seeded())
    unchanged = out["desired_goal"][:, 0, 0] == 99
    assert unchanged.float().mean().item() == pytest.approx(0.7, abs=4 * (0.21 / rows) ** 0.5)
    for key in ("prev_reward", ("next", "reward"), ("next", "done"), ("next", "truncated"), MASK):
        assert torch.equal(out[key][unchanged], batch[key][unchanged])


def test_rewards_of_each_step_where_trials_go_on():
    """As in Gymnasium-Robotics: -1 away from the goal, 0 at it, and the trial goes on."""

    def sparse(achieved, goal):
        return ((achieved - goal.unsqueeze(-2)).norm(dim=-1).amin(-1) < 1.5).float() - 1

    batch = rewarded(single_goal_trials([5]), -1.0)
    options = {"fraction": 1.0, "reward_fn": sparse, "success_threshold": -0.5}
    out = HindsightRelabel("final", ends_trial=False, **options).relabel_trials(batch)
    assert_columns(out["next"], reward=[-1, -1, -1, 0, 0], terminated=[False] * 5)
    assert_columns(out, prev_reward=[0, -1, -1, -1, 0])
    assert out[MASK].all()
    assert torch.equal(out["next", "done"], batch["next", "done"])
    out = HindsightRelabel("final", **options).relabel_trials(batch)
    assert out[MASK].flatten().tolist() == [True] * 4 + [False]


def test_each_place_but_empty_ones_may_be_the_goal():
    batch = single_goal_trials([3] * 300)
    place = batch["next", "achieved_goal"]
    batch["next", "achieved_goal"] = torch.stack([place, place + 10], 2)
    out = HindsightRelabel("final", fraction=1.0).relabel_trials(batch, seeded())
    assert out["desired_goal"][:, 0, 0].unique().tolist() == [2.0, 12.0]
    assert (out["next", "reward"][:, -1] == 1).all()

    # The last step achieves nothing in every third trial, and else one or two things of three.
    places = torch.stack([torch.full_like(place, -1.0), place, place + 10], 2)
    places[::3, -1] = places[1::3, -1, 2] = -1.0
    batch["next", "achieved_goal"] = places
    out = HindsightRelabel("final", fraction=1.0, empty_goal=-1.0).relabel_trials(batch, seeded())
    goals = out["desired_goal"][:, 0, 0].view(-1, 3)
    assert (goals[:, 0] == 99).all()
    assert torch.equal(out[MASK], batch[MASK])
    assert (goals[:, 1] == 2).all()
    assert goals[:, 2].unique().tolist() == [2.0, 12.0]
    assert 30 < (goals[:, 2] == 2).sum() < 70


class CornersOnly(GoalSequenceRelabel):
    """Draws the goals itself; the replay is the base's."""

    def new_goals(self, trials, generator):
        goals = trials["goals"][:, 0]
        return torch.zeros_like(goals), torch.ones(len(goals), dtype=torch.bool)


def test_ones_own_goals():
    walk = [[X], [A], [A]]
    out = CornersOnly().relabel_trials(as_batch([play(walk, [Y, B])]))
    assert_shows(out, [play(walk, [A, A])])
