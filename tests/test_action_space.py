"""Action spaces: specs by hand, the way to vectors and back, errors."""

from __future__ import annotations

import pickle

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    Unbounded,
)

from torchrl_amago.action_space import (
    ActionSpace,
    is_finitely_bounded,
    is_in_policy_scale,
    one_hot_parts,
)


def _space(spec) -> ActionSpace:
    return ActionSpace.from_spec(spec)


# -------------------------------------------------------------------- from a spec


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Categorical(5), ("discrete", (), (5,), False, 5)),
        (Categorical(5, shape=(1,)), ("discrete", (1,), (5,), False, 5)),
        (Categorical(5, shape=(2,)), ("multi_discrete", (2,), (5, 5), False, 10)),
        (OneHot(4), ("discrete", (4,), (4,), True, 4)),
        (OneHot(4, shape=(3, 4)), ("multi_discrete", (3, 4), (4, 4, 4), True, 12)),
        (MultiCategorical([2, 3]), ("multi_discrete", (2,), (2, 3), False, 5)),
        (MultiCategorical([[2, 3], [4, 5]]), ("multi_discrete", (2, 2), (2, 3, 4, 5), False, 14)),
        (MultiCategorical([7]), ("discrete", (1,), (7,), False, 7)),
        (MultiOneHot([2, 3]), ("multi_discrete", (5,), (2, 3), True, 5)),
        (MultiOneHot([2, 3], shape=(2, 5)), ("multi_discrete", (2, 5), (2, 3, 2, 3), True, 10)),
        (Binary(3), ("multi_binary", (3,), (), False, 3)),
        (Binary(shape=(2, 3)), ("multi_binary", (2, 3), (), False, 6)),
        (Bounded(-1.0, 1.0, shape=(2, 3)), ("continuous", (2, 3), (), False, 6)),
        (Bounded(-1.0, 1.0, shape=()), ("continuous", (), (), False, 1)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_specs_by_hand(spec, expected):
    space = _space(spec)
    assert (space.kind, space.shape, space.sizes, space.one_hot, space.size) == expected
    assert space.dtype == spec.dtype


def test_equal_by_value_and_picklable():
    space = _space(MultiCategorical([2, 3], dtype=torch.int32))
    assert space == _space(MultiCategorical([2, 3], dtype=torch.int32))
    assert space != _space(MultiCategorical([2, 3]))
    assert pickle.loads(pickle.dumps(space)) == space  # noqa: S301
    assert hash(space) == hash(pickle.loads(pickle.dumps(space)))  # noqa: S301


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        (Composite(left=Categorical(2)), "got Composite of dtype .*action_key"),
        (Bounded(0, 5, shape=(2,), dtype=torch.int64), "got BoundedDiscrete of dtype torch.int64"),
        (Unbounded(2, dtype=torch.int64), "got UnboundedDiscrete of dtype torch.int64"),
        (Unbounded(2), "must have finite bounds, got UnboundedContinuous.*RescaleAction"),
        (Bounded(0.0, torch.inf, shape=(2,)), "must have finite bounds, got BoundedContinuous"),
        (
            Bounded(-2.0, 2.0, shape=(1,)),
            r"bounds -1 and 1, got -2 to 2\. Append torchrl\.envs\.ActionScaling\(\)",
        ),
        (
            Bounded(torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 1.0])),
            "bounds -1 and 1, got -1 to 1",
        ),
    ],
)
def test_other_spaces_raise(spec, message):
    with pytest.raises(ValueError, match=message):
        _space(spec)


def test_bounds_may_be_left_to_others():
    for spec in (Unbounded(2), Bounded(-2.0, 2.0, shape=(2,))):
        assert ActionSpace.from_spec(spec, check_bounds=False).kind == "continuous"


def test_finite_bounds():
    largest = torch.finfo(torch.float32).max
    half = Bounded(torch.tensor([-1.0, -1.0]), torch.tensor([1.0, torch.inf]))
    assert not is_finitely_bounded(half)
    assert not is_finitely_bounded(Bounded(-largest, 1.0, shape=(1,)))
    assert not is_finitely_bounded(Bounded(0, 5, shape=(1,), dtype=torch.int64))
    assert not is_finitely_bounded(Categorical(3))
    assert is_finitely_bounded(Bounded(-2.0, 1.0, shape=(1,)))
    assert not is_in_policy_scale(Bounded(-2.0, 1.0, shape=(1,)))
    assert is_in_policy_scale(Bounded(-1.0, 1.0, shape=(4,), dtype=torch.float64))


# ----------------------------------------------------------------- vectors by hand


def test_vectors_by_hand():
    index = _space(Categorical(3)).to_vector(torch.tensor([[2], [0]]))
    assert index.tolist() == [[[0, 0, 1]], [[1, 0, 0]]]
    assert index.dtype == torch.float32
    parts = _space(MultiCategorical([2, 3])).to_vector(torch.tensor([[1, 0], [0, 2]]))
    assert parts.tolist() == [[0, 1, 1, 0, 0], [1, 0, 0, 0, 1]]
    bits = _space(Binary(3, dtype=torch.bool)).to_vector(torch.tensor([True, False, True]))
    assert bits.tolist() == [1, 0, 1]
    numbers = _space(Bounded(-1.0, 1.0, shape=(2, 2))).to_vector(torch.full((5, 2, 2), 0.5))
    assert numbers.tolist() == [[0.5] * 4] * 5


def test_a_vector_is_not_the_action_itself():
    action = torch.zeros(3)
    _space(Bounded(-1.0, 1.0, shape=(3,))).to_vector(action).fill_(1.0)
    assert action.eq(0).all()


def test_samples_with_rounding_errors_become_whole_actions():
    vector = torch.tensor([1.0 - 6e-8, 6e-8, -6e-8, 1.0 + 1.2e-7])
    assert _space(MultiOneHot([2, 2])).from_vector(vector).tolist() == [1, 0, 0, 1]
    assert _space(Binary(4, dtype=torch.bool)).from_vector(vector).tolist() == [1, 0, 0, 1]
    assert _space(MultiCategorical([2, 2])).from_vector(vector).tolist() == [0, 1]


def test_one_hot_parts_raise_for_other_indices():
    with pytest.raises(RuntimeError, match="out of bounds"):
        one_hot_parts(torch.tensor([2, 0]), [2, 3])


def test_actions_of_another_shape_raise():
    space = _space(Binary(3))
    for wrong in (torch.zeros(2), torch.zeros(3, 2), torch.zeros(())):
        with pytest.raises(ValueError, match=r"shape \[\*batch, \*\(3,\)\], got "):
            space.to_vector(wrong)
        with pytest.raises(ValueError, match="must have the shape"):
            space.contains(wrong)


# --------------------------------------------------------------------- there and back

SIZES = st.lists(st.integers(1, 5), min_size=1, max_size=4)
SHAPES = st.lists(st.integers(1, 3), max_size=2)
INTEGERS = st.sampled_from([torch.int64, torch.int32, torch.uint8])
BITS = st.sampled_from([torch.bool, torch.int8, torch.float32])
FLOATS = st.sampled_from([torch.float32, torch.float64])

SPECS = st.one_of(
    st.builds(lambda n, dtype: Categorical(n, dtype=dtype), st.integers(1, 7), INTEGERS),
    st.builds(lambda n, dtype: OneHot(n, dtype=dtype), st.integers(1, 7), INTEGERS),
    st.builds(lambda sizes, dtype: MultiCategorical(sizes, dtype=dtype), SIZES, INTEGERS),
    st.builds(lambda sizes: MultiOneHot(sizes), SIZES),
    st.builds(lambda n, dtype: Binary(n, dtype=dtype), st.integers(1, 5), BITS),
    st.builds(lambda shape, dtype: Bounded(-1, 1, shape=shape, dtype=dtype), SHAPES, FLOATS),
)


@given(SPECS, SHAPES)
def test_there_and_back(spec, batch):
    space = _space(spec)
    # TorchRL draws from MultiCategorical([n]) without its last dimension.
    action = spec.expand(*batch, *spec.shape).rand().reshape((*batch, *spec.shape))
    vector = space.to_vector(action)
    assert vector.shape == (*batch, space.size)
    assert vector.dtype == torch.float32
    back = space.from_vector(vector)
    assert back.dtype == action.dtype
    assert back.shape == action.shape
    torch.testing.assert_close(back, action.float().to(action.dtype), rtol=0, atol=0)
    assert space.contains(action).all()
    assert space.contains(action).shape == tuple(batch)
    if space.sizes:
        assert (vector.sum(-1) == len(space.sizes)).all()


# ------------------------------------------------------------------------- contains


@pytest.mark.parametrize(
    ("spec", "inside", "outside"),
    [
        (Categorical(3), [0, 2, 1.0], [-1, 3, 1.5, torch.nan, torch.inf, 255]),
        (MultiCategorical([2, 3]), [[1, 2], [0, 0]], [[2, 0], [0, 3], [0, -1], [0, torch.nan]]),
        (
            OneHot(3),
            [[0, 1, 0]],
            [[0, 0, 0], [1, 1, 0], [0, 0.5, 0.5], [2, 0, 0], [1, torch.nan, 0]],
        ),
        (MultiOneHot([2, 2]), [[0, 1, 1, 0]], [[1, 1, 0, 0], [0, 1, 0, 0], [0, 1, -1, 2]]),
        (Binary(2), [[0, 1], [1, 1]], [[0, 2], [0, 0.5], [torch.nan, 0]]),
        (
            Bounded(-1.0, 1.0, shape=(2,)),
            [[-1, 1], [0, 1 + 5e-7]],
            [[0, 1.001], [torch.nan, 0], [0, -torch.inf]],
        ),
    ],
    ids=lambda value: type(value).__name__,
)
def test_contains(spec, inside, outside):
    space = _space(spec)
    assert space.contains(torch.tensor(inside, dtype=torch.float64)).all()
    assert not space.contains(torch.tensor(outside, dtype=torch.float64)).any()


def test_contains_stored_integers():
    space = _space(Categorical(3, dtype=torch.uint8))
    actions = torch.tensor([[0, 2], [3, 255]], dtype=torch.uint8)
    assert space.contains(actions).tolist() == [[True, True], [False, False]]
    assert _space(Binary(2, dtype=torch.bool)).contains(torch.tensor([True, False]))
