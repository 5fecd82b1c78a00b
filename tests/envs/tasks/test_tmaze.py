"""TMaze: episodes worked out by hand, the rules as properties against a plain loop, refusals, pictures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict

from torchrl_amago.envs import make_trial_env
from torchrl_amago.envs.tasks import TMaze
from torchrl_amago.evaluation import evaluate

AHEAD, UP, BACK, DOWN = range(4)


def play(env: TMaze, *actions: int, goal: float = 1.0) -> TensorDict:
    """Reset, set the goal, take actions in all rows: steps ``[rows, T]``, one-dimensional batches."""
    td = env.reset()
    env.load_state_dict({**env.state_dict(), "_goal": torch.full((env.num_rows,), goal)})
    td = env.reset(repeat_task=True)
    steps = []
    for action in actions:
        td["action"] = torch.full(env.batch_size, action)
        steps.append(env.step(td).clone())
        td = steps[-1]["next"].exclude("reward")
    return torch.stack(steps, -1)


def rewards(steps: TensorDict) -> list[float]:
    return [round(reward, 6) for reward in steps["next", "reward"].flatten().tolist()]


def seen(steps: TensorDict) -> list[list[float]]:
    """The first observation and all that follow."""
    first = steps["observation"][0]
    return [first.tolist(), *steps["next", "observation"].tolist()]


@pytest.mark.parametrize(("goal", "turn"), [(1.0, UP), (-1.0, DOWN)])
def test_the_right_way(goal, turn):
    steps = play(TMaze(2), AHEAD, AHEAD, turn, goal=goal)
    assert rewards(steps) == [0, 0, 1]
    assert seen(steps) == [[0, 0, goal], [0.5, 0, 0], [1, 0, 0], [1, goal, 0]]
    assert steps["next", "terminated"].flatten().tolist() == [False, False, True]
    assert not steps["next", "truncated"].any()


def test_the_wrong_arm():
    assert rewards(play(TMaze(2), AHEAD, AHEAD, DOWN)) == [0, 0, 0]


def test_dawdling_once_costs_every_further_step_and_the_arm():
    steps = play(TMaze(4), AHEAD, UP, AHEAD, AHEAD, AHEAD)
    assert rewards(steps) == [0, -0.25, -0.25, -0.25, 0]
    assert seen(steps)[-1] == [1, 0, 0]


def test_penalized_for_dawdling_alone():
    env = TMaze(4, penalize="dawdling")
    steps = play(env, AHEAD, UP, AHEAD, AHEAD, AHEAD)
    assert rewards(steps) == [0, -0.25, 0, 0, 0]
    assert rewards(play(env, AHEAD, AHEAD, AHEAD, AHEAD, UP)) == [0, 0, 0, 0, 1]
    assert rewards(play(env, AHEAD, AHEAD, BACK, DOWN, UP)) == [0, 0, -0.25, -0.25, 0]


def test_a_longer_episode_forgives_and_pays_at_its_end_only():
    env = TMaze(2, max_episode_steps=6)
    steps = play(env, UP, AHEAD, AHEAD, UP, UP, AHEAD)
    assert rewards(steps) == [-0.2, -0.2, 0, 0, 0, 1]
    assert steps["next", "done"].flatten().tolist() == [False] * 5 + [True]
    # Out of the right arm again, and into the other one.
    assert rewards(play(env, AHEAD, AHEAD, UP, DOWN, DOWN, AHEAD)) == [0, 0, 0, 0, 0, 0]
    # Walking back from the junction leaves the agent behind.
    assert rewards(play(env, AHEAD, AHEAD, BACK, AHEAD, UP, UP)) == [0, 0, -0.2, 0, 0, 1]


def test_walls_stay():
    env = TMaze(2, max_episode_steps=9, penalty=0.0)
    steps = play(env, BACK, UP, DOWN, AHEAD, UP, AHEAD, AHEAD, DOWN, BACK, goal=-1.0)
    places = [place[:2] for place in seen(steps)]
    assert places == [
        [0, 0], [0, 0], [0, 0], [0, 0], [0.5, 0], [0.5, 0], [1, 0], [1, 0], [1, -1], [1, -1]
    ]  # fmt: skip
    assert rewards(steps) == [0] * 8 + [1]


def test_back_at_the_start_the_goal_stays_hidden():
    steps = play(TMaze(3, max_episode_steps=8), AHEAD, BACK, AHEAD)
    assert [observation[2] for observation in seen(steps)] == [1, 0, 0, 0]


def test_ambiguous_corridor_looks_alike():
    steps = play(TMaze(3, ambiguous_position=True), AHEAD, AHEAD, AHEAD, UP)
    assert seen(steps) == [[0, 0, 1], [0, 0, 0], [0, 0, 0], [1, 0, 0], [1, 1, 0]]
    assert rewards(steps) == [0, 0, 0, 1]


def test_time_and_oracle():
    steps = play(TMaze(3, show_time=True, oracle=True), AHEAD, AHEAD, AHEAD, UP, goal=-1.0)
    assert [observation[2:] for observation in seen(steps)] == [
        [-1, 0], [-1, 0.25], [-1, 0.5], [-1, 0.75], [-1, 1]
    ]  # fmt: skip


def test_one_hot_actions_move_as_integers_do():
    env = TMaze(2, categorical_action_encoding=False, seed=0)
    td = env.reset()
    for action in (AHEAD, AHEAD, UP if env.goal > 0 else DOWN):
        td["action"] = torch.nn.functional.one_hot(torch.tensor(action), 4)
        td = env.step(td)["next"].exclude("done", "terminated", "truncated")
    assert td["reward"] == 1


def test_goals_are_fair_and_repeat_on_request():
    env = TMaze(2, batch_size=[2000], seed=0)
    env.reset()
    goals = env.goal
    assert set(goals.tolist()) == {-1.0, 1.0}
    assert goals.mean().item() == pytest.approx(0, abs=4 / 2000**0.5)
    env.reset(repeat_task=True)
    assert torch.equal(env.goal, goals)
    env.reset()
    assert (env.goal == goals).float().mean().item() == pytest.approx(0.5, abs=4 * 0.5 / 2000**0.5)


def walk_by_the_book(env: TMaze, goal: float, actions: list[int]) -> tuple[list, list]:
    """The paper's rules, one step after the other: positions and rewards."""
    x, y, places, paid = 0, 0, [], []
    for t, action in enumerate(actions, 1):
        if action in (AHEAD, BACK) and y == 0:
            x = min(max(x + (1 if action == AHEAD else -1), 0), env.corridor_length)
        elif action in (UP, DOWN) and x == env.corridor_length:
            y = min(max(y + (1 if action == UP else -1), -1), 1)
        if t == env.max_episode_steps:
            reward = float(y == goal)
        elif env.penalize == "behind":
            reward = -env.penalty if x < min(t, env.corridor_length) else 0.0
        else:
            reward = -env.penalty if action != AHEAD else 0.0
        places.append([x / env.corridor_length, y])
        paid.append(reward)
    return places, paid


@st.composite
def walks(draw):
    corridor = draw(st.integers(1, 6))
    extra = draw(st.integers(1, 4))
    episode = corridor + extra
    options = {
        "max_episode_steps": episode,
        "penalty": draw(st.floats(0, 1)) / (episode - 1),
        "penalize": draw(st.sampled_from(["behind", "dawdling"])),
    }
    # Mostly ahead: else hardly any walk ends in an arm.
    action = st.sampled_from([AHEAD] * 5 + [UP, UP, BACK, DOWN, DOWN])
    actions = draw(st.lists(action, min_size=episode, max_size=episode))
    return corridor, options, actions, draw(st.sampled_from([-1.0, 1.0]))


@given(walks())
def test_walks_follow_the_rules_and_success_is_a_positive_return(walk):
    corridor, options, actions, goal = walk
    env = TMaze(corridor, **options)
    steps = play(env, *actions, goal=goal)
    places, paid = walk_by_the_book(env, goal, actions)
    torch.testing.assert_close(steps["next", "observation"][:, :2], torch.tensor(places))
    torch.testing.assert_close(steps["next", "reward"].flatten(), torch.tensor(paid))
    assert steps["next", "done"].flatten().tolist() == [False] * (len(actions) - 1) + [True]
    in_right_arm = places[-1] == [1, goal]
    assert (sum(paid) > 0) == in_right_arm


def test_evaluation_reads_success():
    env = make_trial_env(TMaze(3, batch_size=[100], seed=0), episodes=1, show_progress=False)

    def always_up(td: TensorDict) -> TensorDict:
        return td.set("action", torch.where(td["time_idx"] == 3, UP, AHEAD).squeeze(-1))

    results = evaluate(always_up, env, trials_per_env=2)
    success = results.episode_success[:, 0]
    assert 0.3 < success.float().mean() < 0.7
    assert torch.equal(results.trial_return, success.float())
    assert (results.trial_length == 4).all()


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"corridor_length": 0}, "corridor_length must be an integer of at least 1, got 0"),
        ({"corridor_length": 2.0}, "corridor_length must be an integer .* got 2.0"),
        ({"max_episode_steps": 10}, "larger than corridor_length=10, got 10.*don't reach an arm"),
        ({"penalty": -0.1}, r"penalty must be in .* = \[0, 0.1\], got -0.1.*cost per step"),
        ({"penalty": 0.2}, r"= \[0, 0.1\], got 0.2.*outweigh"),
        ({"penalize": "lag"}, "penalize must be one of .*'dawdling'.*got 'lag'"),
    ],
)
def test_constructor_refuses(kwargs, match):
    with pytest.raises(ValueError, match=match):
        TMaze(**kwargs)


def test_render_shows_agent_flag_and_lamp():
    env = TMaze(5)
    env.reset()
    pictures = {}
    for goal in (1.0, -1.0):
        env.load_state_dict({**env.state_dict(), "_goal": torch.tensor([goal])})
        pictures[goal] = env.render(cell_pixels=24)
    up = pictures[1.0]
    assert up.shape == (72, 144, 3)
    assert up.dtype.name == "uint8"
    cells = up.reshape(3, 24, 6, 24, 3).swapaxes(1, 2)
    other = pictures[-1.0].reshape(3, 24, 6, 24, 3).swapaxes(1, 2)
    changed = {(i, j) for i in range(3) for j in range(6) if (cells[i, j] != other[i, j]).any()}
    # The flag in the two arms, the lamp on both sides of the agent and where its stem reaches.
    assert changed == {(0, 5), (2, 5), (0, 0), (2, 0), (1, 0)}
    play(env, AHEAD, AHEAD)
    later = env.render(cell_pixels=24).reshape(3, 24, 6, 24, 3).swapaxes(1, 2)
    assert (later[0, 0] == later[0, 1]).all()  # the lamp is out
    assert (later[1, 2] != later[1, 3]).any()  # the agent is two cells on
