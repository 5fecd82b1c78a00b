from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from torchrl_amago.data.trial_table import TrialTable
from torchrl_amago.data.trial_weights import Priorities, Shares
from torchrl_amago.data.weight_blocks import WeightBlocks

weights = st.lists(st.floats(0, 10).map(lambda x: round(x, 3)), min_size=1, max_size=40)


def expected(weight: list[float], uniform: np.ndarray) -> list[int]:
    """The plain way: walk along the weights."""
    found = []
    for position in uniform * sum(weight):
        number = 0
        while position >= weight[number] and number < len(weight) - 1:
            position -= weight[number]
            number += 1
        found.append(number)
    return found


@given(weights, st.integers(0, 2**31))
def test_blocks_find_what_a_walk_finds(weight, seed):
    if not sum(weight):
        return
    blocks = WeightBlocks(len(weight))
    order = np.random.default_rng(seed).permutation(len(weight))
    for part in np.array_split(order, 3):
        if len(part):
            blocks.set(part, np.array(weight)[part])
    np.testing.assert_allclose(blocks.total, sum(weight))
    middle = np.array([sum(weight[:n]) + w / 2 for n, w in enumerate(weight) if w > 0])
    nonzero = [n for n, w in enumerate(weight) if w > 0]
    assert blocks.find(middle).tolist() == nonzero
    assert blocks.find(np.array([0.0, np.nextafter(blocks.total, 0)])).tolist() == [
        nonzero[0],
        nonzero[-1],
    ]


@given(
    st.lists(st.lists(st.integers(1, 9), min_size=1, max_size=3), min_size=1, max_size=60),
    st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_shares_follow_what_comes_and_goes(writes, looks):
    table = TrialTable(30, 92)
    shares = Shares(lambda length: length.astype(float) ** 2)
    uniform = np.linspace(0.001, 0.999, 50)
    for number, lengths in enumerate(writes):
        plan = table.plan(lengths)
        table.evict(plan.begin)
        table.extend(plan.first, lengths)
        if looks[number]:
            drawn = shares.draw(table, uniform)
            assert drawn.tolist() == expected((table.steps**2.0).tolist(), uniform)


@given(
    st.lists(
        st.tuples(st.integers(1, 6), st.dictionaries(st.integers(0, 5), st.floats(0, 5))),
        min_size=1,
        max_size=60,
    ),
    st.lists(st.booleans(), min_size=60, max_size=60),
)
def test_priorities_follow_what_comes_and_goes(events, looks):
    table, priorities = TrialTable(30, 92), Priorities(alpha=1.0, beta=0.5)
    plain: dict[int, float] = {}
    largest, uniform = 1.0, np.linspace(0.0013, 0.9987, 50)
    for number, (length, changes) in enumerate(events):
        plan = table.plan([length])
        table.evict(plan.begin)
        table.extend(plan.first, [length])
        plain[table.end - 1] = largest
        if not looks[number]:
            continue
        # Some of these are gone, some come twice.
        index = np.array([table.end - 1 - 2 * back for back in changes] * 2, np.int64)
        values = np.array([*changes.values()] * 2)
        priorities.update(table, index, values)
        for name, value in zip(index.tolist(), values.tolist(), strict=True):
            if table.begin <= name < table.end:
                plain[name] = max(value, 1e-6)
                largest = max(largest, value)
        alive = [plain[name] for name in range(table.begin, table.end)]
        drawn, weight = priorities.draw(table, uniform)
        chance = np.array(alive)[drawn] / sum(alive)
        ideal = (len(table) * chance) ** -0.5
        np.testing.assert_allclose(weight, ideal / ideal.max(), rtol=1e-5)
        # The blocks take trials in another order: each is drawn as often as its weight says.
        count = np.bincount(drawn, minlength=len(alive))
        np.testing.assert_allclose(count, 50 * np.array(alive) / sum(alive), atol=2.01)


def test_priorities_keep_their_draws_across_a_save():
    table, priorities = TrialTable(400, 1202), Priorities(0.7, 0.4)
    for number in range(90):
        plan = table.plan([5])
        table.evict(plan.begin)
        table.extend(plan.first, [5])
        priorities.update(table, np.array([number]), np.array([number % 7 + 0.1]))
    copy = Priorities(0.7, 0.4)
    copy.load_state_dict(priorities.state_dict())
    uniform = np.linspace(0, 0.999, 200)
    for ours, theirs in zip(
        copy.draw(table, uniform), priorities.draw(table, uniform), strict=True
    ):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("value", [-1.0, float("nan"), float("inf")])
def test_refuses_priorities_that_cannot_be(value):
    table, priorities = TrialTable(10, 32), Priorities(1.0, 1.0)
    table.extend([0], [5])
    with pytest.raises(ValueError, match="finite and not negative"):
        priorities.update(table, np.array([0]), np.array([value]))
