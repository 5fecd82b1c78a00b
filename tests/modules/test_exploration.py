"""Exploration: the schedule by hand, each kind of noise by frequency, scales of trials."""

from __future__ import annotations

import math

import pytest
import torch
from tensordict import TensorDict
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot
from torchrl.envs.utils import ExplorationType, set_exploration_type

from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules import BilevelEpsilonGreedy
from torchrl_amago.modules.exploration import BilevelGaussian, make_exploration

NUM_ROWS = 20_000


def _step(num_rows: int, time: int = 0, init: bool = True) -> TensorDict:
    return TensorDict(
        action=torch.zeros(num_rows, dtype=torch.int64),
        time_idx=torch.full((num_rows, 1), time),
        is_init=torch.full((num_rows, 1), init),
        batch_size=[num_rows],
    )


def test_schedule_by_hand_and_clamped_beyond_both_horizons():
    explore = BilevelEpsilonGreedy(5, horizon=10, anneal_frames=100)
    explore.step(50)
    start, end = (1.0 + 0.05) / 2, (0.8 + 0.01) / 2
    epsilon = explore.epsilon(torch.tensor([[0], [5], [10], [1000]])).flatten()
    torch.testing.assert_close(epsilon, torch.tensor([start, (start + end) / 2, end, end]))
    explore.step(10_000)
    assert explore.epsilon(torch.tensor([[1000]])).item() == pytest.approx(0.01)


def test_a_power_keeps_noise_for_the_trials_end():
    explore = BilevelEpsilonGreedy(
        5, horizon=10, start_of_trial=(0.0, 0.0), end_of_trial=(0.8, 0.0), power=3.0
    )
    epsilon = explore.epsilon(torch.tensor([[0], [5], [10], [1000]])).flatten()
    torch.testing.assert_close(epsilon, torch.tensor([0.0, 0.8 / 8, 0.8, 0.8]))


@pytest.mark.parametrize("one_hot", [False, True])
def test_fraction_of_random_actions_is_epsilon(one_hot):
    explore = BilevelEpsilonGreedy(5, horizon=10, anneal_frames=1, scale_power=0, one_hot=one_hot)
    td = _step(20_000)
    if one_hot:
        td["action"] = torch.nn.functional.one_hot(td["action"], 5)
    with set_exploration_type(ExplorationType.RANDOM):
        action = explore(td)["action"]
    index = action.argmax(-1) if one_hot else action
    assert (index != 0).float().mean().item() == pytest.approx(0.8, abs=0.02)
    assert action.shape == ((20_000, 5) if one_hot else (20_000,))


def test_greedy_modes_leave_actions_alone():
    explore = BilevelEpsilonGreedy(5, horizon=10)
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        assert explore(_step(100))["action"].eq(0).all()


def test_scale_is_drawn_at_the_trials_start_and_kept_within_it():
    explore = BilevelEpsilonGreedy(5, horizon=10)
    with set_exploration_type(ExplorationType.RANDOM):
        first = explore(_step(1000))
        following = _step(1000, time=1, init=False)
        following["_epsilon_scale"] = first["_epsilon_scale"].clone()
        following["is_init"][:10] = True
        second = explore(following)
    scale = first["_epsilon_scale"]
    assert 0.4 < scale.mean() < 0.6
    assert scale.max() < 1.0
    assert torch.equal(scale[10:], second["_epsilon_scale"][10:])
    assert not torch.equal(scale[:10], second["_epsilon_scale"][:10])


@pytest.mark.parametrize(("power", "low", "high"), [(0, 1.0, 1.0), (1, 0.45, 0.55), (3, 0.1, 0.16)])
def test_the_power_of_scales_sets_their_median(power, low, high):
    explore = BilevelEpsilonGreedy(5, horizon=10, scale_power=power)
    with set_exploration_type(ExplorationType.RANDOM):
        scale = explore(_step(4000))["_epsilon_scale"]
    assert low <= scale.median() <= high  # the median of u ** p is 0.5 ** p
    assert scale.max() > 0.95


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"horizon": 0}, "horizon must be positive, got 0"),
        ({"anneal_frames": 0}, "anneal_frames must be positive, got 0"),
        ({"power": 0}, "power must be positive, got 0"),
        ({"scale_power": -1}, "scale_power must be finite and at least 0, got -1"),
        ({"end_of_trial": (0.5, -0.1)}, "end_of_trial must be finite and at least 0, got -0.1"),
    ],
)
def test_wrong_schedules(options, message):
    with pytest.raises(ValueError, match=message):
        BilevelEpsilonGreedy(5, **{"horizon": 10, **options})


# ------------------------------------------------------------------ other action spaces


def _explore(explore, action: torch.Tensor, **entries: torch.Tensor) -> torch.Tensor:
    with set_exploration_type(ExplorationType.RANDOM):
        td = _step(len(action)).set("action", action.clone()).update(entries)
        return explore(td)["action"]


def _constant(epsilon: float) -> dict:
    return dict(start_of_trial=(epsilon, epsilon), end_of_trial=(epsilon, epsilon), scale_power=0)


@pytest.mark.parametrize("one_hot", [False, True])
def test_parts_are_replaced_independently(one_hot):
    sizes, epsilon = (2, 4), 0.6
    explore = BilevelEpsilonGreedy(sizes, horizon=10, one_hot=one_hot, **_constant(epsilon))
    space = ActionSpace.from_spec((MultiOneHot if one_hot else MultiCategorical)(sizes))
    action = space.from_vector(torch.tensor([1.0, 0, 1, 0, 0, 0]).expand(NUM_ROWS, 6))
    result = _explore(explore, action)
    assert result.dtype == action.dtype
    assert space.contains(result).all()
    first, second = space.to_vector(result).split(sizes, -1)
    # A replaced part keeps its value by chance: once in its number of choices.
    changed = torch.stack([first[:, 0] == 0, second[:, 0] == 0])
    expected = torch.tensor([epsilon * 1 / 2, epsilon * 3 / 4])
    torch.testing.assert_close(changed.float().mean(1), expected, rtol=0, atol=0.02)
    both = (changed[0] & changed[1]).float().mean().item()
    assert both == pytest.approx(expected.prod().item(), abs=0.015)
    choices = second[changed[1]].sum(0) / changed[1].sum()
    torch.testing.assert_close(choices, torch.tensor([0, 1, 1, 1]) / 3, rtol=0, atol=0.02)


@pytest.mark.parametrize("dtype", [torch.bool, torch.int8])
def test_bits_are_replaced_independently(dtype):
    space = ActionSpace.from_spec(Binary(3, dtype=dtype))
    explore = make_exploration(space, 10, **_constant(0.5))
    action = torch.tensor([0, 1, 1], dtype=dtype).expand(NUM_ROWS, 3)
    result = _explore(explore, action)
    assert result.dtype == dtype
    flipped = (result != action).float()
    torch.testing.assert_close(flipped.mean(0), torch.full((3,), 0.25), rtol=0, atol=0.02)
    assert flipped.T.corrcoef().fill_diagonal_(0).abs().max() < 0.03


@pytest.mark.parametrize("shape", [(), (3,), (2, 2)])
def test_gaussian_noise_by_hand(shape):
    explore = BilevelGaussian(horizon=10, **_constant(0.2))
    action = torch.full((NUM_ROWS, *shape), 0.1, dtype=torch.float64)
    noise = _explore(explore, action) - action
    assert noise.dtype == torch.float64
    assert noise.shape == action.shape
    assert noise.mean().item() == pytest.approx(0.0, abs=0.01)
    assert noise.std().item() == pytest.approx(0.2, abs=0.01)
    if shape == (3,):
        assert noise.T.corrcoef().fill_diagonal_(0).abs().max() < 0.03


def test_gaussian_noise_is_clipped():
    explore = BilevelGaussian(horizon=10, **_constant(1.0))
    result = _explore(explore, torch.zeros(NUM_ROWS, 1))
    assert result.abs().max() == 1.0
    at_the_edge = (result.abs() == 1.0).float().mean().item()
    assert at_the_edge == pytest.approx(math.erfc(1 / math.sqrt(2)), abs=0.02)


def test_gaussian_noise_follows_the_schedule_and_each_trials_scale():
    explore = BilevelGaussian(horizon=10, start_of_trial=(0.3, 0.3), end_of_trial=(0.0, 0.0))
    with set_exploration_type(ExplorationType.RANDOM):
        td = explore(_step(NUM_ROWS).set("action", torch.zeros(NUM_ROWS, 1)))
        scale = td["_epsilon_scale"]
        assert (td["action"] / scale).std().item() == pytest.approx(0.3, abs=0.02)
        last = _step(NUM_ROWS, time=10, init=False).set("action", torch.zeros(NUM_ROWS, 1))
        assert not explore(last.set("_epsilon_scale", scale))["action"].any()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        greedy = _step(NUM_ROWS).set("action", torch.zeros(NUM_ROWS, 1))
        assert not explore(greedy)["action"].any()


@pytest.mark.parametrize("one_hot", [False, True])
def test_only_allowed_choices_are_random(one_hot):
    sizes = (2, 4)
    allowed = torch.tensor([True, True, False, True, False, True])
    explore = BilevelEpsilonGreedy(
        sizes, horizon=10, one_hot=one_hot, mask_key="action_mask", **_constant(1.0)
    )
    assert "action_mask" in explore.in_keys
    space = ActionSpace.from_spec((MultiOneHot if one_hot else MultiCategorical)(sizes))
    action = space.from_vector(torch.tensor([1.0, 0, 0, 1, 0, 0]).expand(NUM_ROWS, 6))
    result = _explore(explore, action, action_mask=allowed.expand(NUM_ROWS, 6))
    fractions = space.to_vector(result).mean(0)
    torch.testing.assert_close(fractions, 0.5 * allowed.float(), rtol=0, atol=0.02)
    with pytest.raises(KeyError, match="action_mask"):
        _explore(explore, action)


SPECS = {
    "index": Categorical(5),
    "index with a dimension": Categorical(5, shape=(1,)),
    "one-hot": OneHot(5),
    "indices": MultiCategorical([2, 3]),
    "one-hots": MultiOneHot([2, 3]),
    "bits": Binary(3, dtype=torch.bool),
    "numbers": Bounded(-1.0, 1.0, shape=(2, 2)),
}


@pytest.mark.parametrize("spec", SPECS.values(), ids=SPECS.keys())
def test_made_for_any_space(spec):
    space = ActionSpace.from_spec(spec)
    explore = make_exploration(space, 10, power=2.0, **_constant(1.0))
    assert (explore.horizon, explore.power) == (10, 2.0)
    first = torch.cat([torch.eye(n)[0] for n in space.sizes]) if space.sizes else None
    action = spec.zero() if first is None else space.from_vector(first)
    action = action.expand(50, *spec.shape)
    result = _explore(explore, action)
    assert result.shape == action.shape
    assert result.dtype == spec.dtype
    assert space.contains(result).all()
    assert not torch.equal(result, action)


@pytest.mark.parametrize(
    "spec", [Categorical(5), OneHot(5, dtype=torch.int64)], ids=["index", "1-hot"]
)
def test_one_part_draws_the_same_whichever_way_it_is_given(spec):
    space = ActionSpace.from_spec(spec)
    action = spec.expand(64, *spec.shape).rand()
    results = []
    for explore in (
        BilevelEpsilonGreedy(5, 10, one_hot=space.one_hot),
        BilevelEpsilonGreedy([5], 10, one_hot=space.one_hot),
        make_exploration(space, 10),
    ):
        torch.manual_seed(2)
        results.append(_explore(explore, action))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


# ------------------------------------------------------------------ noise that lasts


def _walk(explore, action: torch.Tensor, num_steps: int, **entries: torch.Tensor) -> torch.Tensor:
    """Explore step after step from the same action, and stack the results, [T, B, ...]."""
    td, actions = _step(len(action)).update(entries), []
    with set_exploration_type(ExplorationType.RANDOM):
        for time in range(num_steps):
            td.set("action", action.clone()).set("is_init", torch.full((len(action), 1), time == 0))
            td = explore(td.copy())
            actions.append(td["action"])
    return torch.stack(actions)


def test_held_noise_lasts_as_long_as_asked_and_is_no_more_frequent():
    explore = BilevelEpsilonGreedy(1000, horizon=10, max_duration=8.0, **_constant(0.3))
    assert explore.out_keys[-1] == "_noise"
    actions = _walk(explore, torch.full((4000,), -1), 60)
    is_noise = actions >= 0
    assert is_noise.float().mean().item() == pytest.approx(0.3, abs=0.02)
    kept = (actions[1:] == actions[:-1]) & is_noise[1:]
    # A row of mean duration d keeps its noise with probability 1 - 1/d, and log d is uniform.
    expected = 1 - (1 - 1 / 8) / math.log(8)
    assert (kept.sum() / is_noise[:-1].sum()).item() == pytest.approx(expected, abs=0.02)


def test_held_noise_of_numbers_keeps_its_deviation():
    explore = BilevelGaussian(horizon=10, max_duration=4.0, **_constant(0.1))
    noise = _walk(explore, torch.zeros(4000, 2), 40)
    assert noise.std().item() == pytest.approx(0.1, abs=0.005)
    same = (noise[1:] == noise[:-1]).all(-1).float().mean().item()
    assert same == pytest.approx(1 - (1 - 1 / 4) / math.log(4), abs=0.02)


def test_each_trial_draws_new_noise_and_greedy_steps_leave_it():
    explore = BilevelGaussian(horizon=10, max_duration=1e9, **_constant(0.1))
    td = _step(500).set("action", torch.zeros(500, 1))
    with set_exploration_type(ExplorationType.RANDOM):
        first = explore(td.copy())
        second = explore(first.copy())
    assert first["action"].all()
    assert (first["_noise"] != second["_noise"])[:, 1:].all()
    with set_exploration_type(ExplorationType.DETERMINISTIC):
        greedy = explore(second.copy().set("action", td["action"]))
    assert torch.equal(greedy["_noise"], second["_noise"])
    assert not greedy["action"].any()


def test_held_choices_follow_the_mask():
    explore = BilevelEpsilonGreedy(
        4, horizon=10, mask_key="action_mask", max_duration=1e9, **_constant(1.0)
    )
    td = _step(2000)
    with set_exploration_type(ExplorationType.RANDOM):
        td["action_mask"] = torch.tensor([True, True, False, False]).expand(2000, 4)
        assert explore(td)["action"].unique().tolist() == [0, 1]
        td["action_mask"] = torch.tensor([False, False, False, True]).expand(2000, 4)
        td["is_init"] = torch.zeros(2000, 1, dtype=torch.bool)
        assert explore(td)["action"].unique().tolist() == [3]


def test_duration_below_a_step():
    with pytest.raises(ValueError, match="max_duration must be positive, got 0"):
        BilevelGaussian(horizon=10, max_duration=0)


def test_numbers_of_a_seed():
    """Recorded when epsilon-greedy was for single actions only: runs must stay what they were."""
    torch.manual_seed(0)
    actions = _explore(BilevelEpsilonGreedy(5, horizon=10), torch.full((16,), 9))
    assert actions.tolist() == [9, 9, 9, 9, 9, 9, 1, 3, 3, 3, 9, 4, 9, 9, 9, 9]
