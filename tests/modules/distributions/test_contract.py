"""The contract of every policy distribution."""

from __future__ import annotations

import copy
import itertools
import math
import pickle
import types

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import InteractionType, ProbabilisticTensorDictModule, set_interaction_type
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical, MultiOneHot, OneHot

from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules.distributions import (
    DISTRIBUTIONS,
    Bernoulli,
    Beta,
    Discrete,
    TanhGaussian,
    TanhMixture,
    make_distribution,
)
from torchrl_amago.modules.distributions.base import StoredActions
from torchrl_amago.modules.distributions.discrete import OneHotParts

BOX = Bounded(-1.0, 1.0, shape=(3,))
CASES = {
    "index": (Categorical(5), Discrete, {}),
    "one-hot": (OneHot(5), Discrete, {"clip_high": 1.0}),
    "index with a dimension": (Categorical(5, shape=(1,), dtype=torch.int32), Discrete, {}),
    "indices": (MultiCategorical([2, 3]), Discrete, {}),
    "one-hots": (MultiOneHot([2, 3]), Discrete, {"clip_low": 0.05}),
    "bits": (Binary(4, dtype=torch.bool), Bernoulli, {"reduce": "sum"}),
    "Gaussian": (BOX, TanhGaussian, {}),
    "Gaussian in a grid": (Bounded(-1, 1, shape=(2, 2), dtype=torch.float64), TanhGaussian, {}),
    "Beta": (BOX, Beta, {}),
    "mixture": (BOX, TanhMixture, {"num_modes": 3}),
}
COUNTABLE = (Discrete, Bernoulli)


def _make(case):
    spec, cls, options = case
    return spec, cls(ActionSpace.from_spec(spec), **options)


@pytest.fixture(params=CASES.values(), ids=CASES.keys())
def case(request):
    return _make(request.param)


def test_shapes_and_dtypes(case):
    spec, policy_dist = case
    size = policy_dist.space.size
    params = torch.randn(4, 2, policy_dist.num_params)
    dist = policy_dist(params)
    assert dist.batch_shape == (4, 2)
    assert dist.event_shape == (size,)
    vectors = [dist.sample(), dist.deterministic_sample, dist.sample((3,))]
    assert [tuple(v.shape) for v in vectors] == [(4, 2, size), (4, 2, size), (3, 4, 2, size)]
    assert all(v.dtype == torch.float32 and not v.requires_grad for v in vectors)
    assert dist.log_prob(vectors[0]).shape == dist.entropy().shape == (4, 2)
    assert dist.log_prob(vectors[2]).shape == (3, 4, 2)
    assert dist.has_rsample == policy_dist.differentiable
    stored_spec = spec.expand(4, 2, *spec.shape)
    stored = policy_dist.stored(params)
    for action in (stored.sample(), stored.deterministic_sample):
        assert action.shape == stored_spec.shape
        assert action.dtype == spec.dtype
        assert stored_spec.is_in(action)
    assert stored.sample((3,)).shape == (3, *stored_spec.shape)
    assert stored.entropy().shape == (4, 2)


def test_a_single_action_needs_no_batch(case):
    _, policy_dist = case
    params = torch.randn(policy_dist.num_params)
    dist = policy_dist(params)
    assert dist.log_prob(dist.sample()).shape == ()
    assert policy_dist.stored(params).sample().shape == policy_dist.space.shape


def test_stored_actions_and_vectors_agree(case):
    _, policy_dist = case
    params = torch.randn(50, policy_dist.num_params)
    vectors, stored = policy_dist(params), policy_dist.stored(params)
    torch.manual_seed(1)
    vector = vectors.sample()
    torch.manual_seed(1)
    action = stored.sample()
    assert torch.equal(policy_dist.space.to_vector(action), vector)
    torch.testing.assert_close(stored.log_prob(action), vectors.log_prob(vector))
    greedy = policy_dist.space.from_vector(vectors.deterministic_sample)
    for name in ("deterministic_sample", "mode", "mean"):
        assert torch.equal(getattr(stored, name), greedy)


def test_equal_by_value_and_copied(case):
    _, policy_dist = case
    params = torch.randn(7, policy_dist.num_params)
    for twin in (pickle.loads(pickle.dumps(policy_dist)), copy.deepcopy(policy_dist)):  # noqa: S301
        assert twin == policy_dist
        assert hash(twin) == hash(policy_dist)
        assert torch.equal(
            twin(params).deterministic_sample, policy_dist(params).deterministic_sample
        )
    other = CASES["bits"] if isinstance(policy_dist, TanhGaussian) else CASES["Gaussian"]
    assert policy_dist != _make(other)[1]


def test_half_precision_is_computed_in_single(case):
    _, policy_dist = case
    params = torch.randn(4, policy_dist.num_params).bfloat16()
    dist, exact = policy_dist(params), policy_dist(params.float())
    assert dist.sample().dtype == torch.float32
    action = dist.sample()
    assert torch.equal(dist.log_prob(action), exact.log_prob(action))
    assert (
        policy_dist.stored(params).log_prob(policy_dist.stored(params).mode).dtype == torch.float32
    )


def test_parameters_of_another_size_raise(case):
    _, policy_dist = case
    wrong = torch.zeros(2, policy_dist.num_params + 1)
    for method in (policy_dist, policy_dist.stored):
        with pytest.raises(ValueError, match=rf"needs {policy_dist.num_params} parameters"):
            method(wrong)


# ------------------------------------------------------------------------- in a policy

GREEDY = (InteractionType.DETERMINISTIC, InteractionType.MODE, InteractionType.MEAN)


def test_in_a_policy(case):
    spec, policy_dist = case
    module = ProbabilisticTensorDictModule(
        in_keys={"params": "logits"},
        out_keys=["action"],
        distribution_class=policy_dist.stored,
        default_interaction_type=InteractionType.RANDOM,
        return_log_prob=True,
    )
    module = pickle.loads(pickle.dumps(copy.deepcopy(module)))  # noqa: S301
    params = torch.randn(200, policy_dist.num_params)
    greedy = policy_dist.stored(params).deterministic_sample
    with torch.no_grad():
        td = module(TensorDict(logits=params, batch_size=[200]))
        assert spec.expand(200, *spec.shape).is_in(td["action"])
        assert not torch.equal(td["action"], greedy)
        log_prob = policy_dist.stored(params).log_prob(td["action"])
        assert torch.equal(td["action_log_prob"], log_prob)
        for kind in GREEDY:
            with set_interaction_type(kind):
                td = module(TensorDict(logits=params, batch_size=[200]))
            assert torch.equal(td["action"], greedy), kind


# ---------------------------------------------------------------- numbers, gradients


def _actions(policy_dist) -> torch.Tensor:
    """All vectors, or for continuous actions edges, middle and what is beyond the clipping."""
    space = policy_dist.space
    if space.kind == "continuous":
        values = torch.tensor([-1.0, -0.999, 0.0, 0.5, 1.0])
        return values.unsqueeze(-1).expand(-1, space.size)
    sizes = space.sizes or (2,) * space.size
    choices = torch.tensor(list(itertools.product(*map(range, sizes))))
    return _one_hots(choices, sizes) if space.sizes else choices.float()


def _one_hots(choices: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
    parts = [torch.nn.functional.one_hot(c, n) for c, n in zip(choices.T, sizes, strict=True)]
    return torch.cat(parts, -1).float()


@pytest.mark.parametrize("magnitude", [1e1, 1e4])
def test_finite_at_extremes(case, magnitude):
    _, policy_dist = case
    signs = torch.tensor([-1.0, 0.0, 1.0])
    params = magnitude * signs[torch.randint(3, (64, policy_dist.num_params))]
    params.requires_grad_()
    dist = policy_dist(params)
    actions = _actions(policy_dist).unsqueeze(1)
    log_prob = dist.log_prob(actions.expand(-1, 64, -1))
    assert log_prob.isfinite().all()
    _assert_finite_gradient(log_prob, params)
    assert dist.entropy().isfinite().all()
    _assert_finite_gradient(dist.entropy(), params)
    sample = dist.sample()
    assert policy_dist.space.contains(policy_dist.space.from_vector(sample)).all()
    assert dist.log_prob(sample).isfinite().all()
    if policy_dist.differentiable:
        _assert_finite_gradient(dist.rsample(), params)


def test_a_row_that_is_not_finite_harms_no_other(case):
    _, policy_dist = case
    clean = torch.randn(3, policy_dist.num_params)
    params = clean.clone()
    params[1] = torch.nan
    action = policy_dist(clean).sample()
    rows = [0, 2]
    dist = policy_dist(params)
    for value in (dist.sample(), dist.entropy(), dist.deterministic_sample):
        assert value[rows].isfinite().all()
    expected = policy_dist(clean).log_prob(action)
    assert torch.equal(dist.log_prob(action)[rows], expected[rows])
    policy_dist.stored(params).sample()


def _assert_finite_gradient(value: torch.Tensor, params: torch.Tensor) -> None:
    if value.requires_grad:
        (grad,) = torch.autograd.grad(value.sum(), params, retain_graph=True)
        assert grad.isfinite().all()


# Densities are integrated in test_continuous.py.
@pytest.mark.parametrize("name", [name for name, (_, cls, _) in CASES.items() if cls in COUNTABLE])
def test_probabilities_of_all_actions_sum_to_one(name):
    _, policy_dist = _make(CASES[name])
    params = torch.randn(6, policy_dist.num_params, dtype=torch.float64)
    log_prob = policy_dist(params).log_prob(_actions(policy_dist).unsqueeze(1).double())
    total = log_prob.exp().sum(0)
    torch.testing.assert_close(total, torch.ones_like(total))
    entropy = -(log_prob.exp() * log_prob).sum(0)
    torch.testing.assert_close(policy_dist(params).entropy(), entropy)


def test_gradients_in_double_precision(case):
    _, policy_dist = case
    params = torch.randn(3, policy_dist.num_params, dtype=torch.float64, requires_grad=True)
    action = policy_dist(params).sample().double()
    assert torch.autograd.gradcheck(lambda p: policy_dist(p).log_prob(action), params)


# Raised by the compiler itself, where it meets the autograd function that samples Dirichlets.
@pytest.mark.filterwarnings(
    "ignore:.*autograd.function.Function.* should not be:DeprecationWarning"
)
@pytest.mark.parametrize("name", ["log_prob", "entropy", "sample"])
def test_compiles_in_one_graph(case, name):
    _, policy_dist = case
    params = torch.randn(4, policy_dist.num_params)
    action = policy_dist(params).sample()

    def compute(params: torch.Tensor) -> torch.Tensor:
        dist = policy_dist(params)
        return dist.log_prob(action) if name == "log_prob" else getattr(dist, name)()

    torch._dynamo.reset()
    compiled = torch.compile(compute, fullgraph=True, backend="eager")
    torch.manual_seed(3)
    expected = compute(params)
    torch.manual_seed(3)
    torch.testing.assert_close(compiled(params), expected)


# ------------------------------------------------------------------- choice, refusals


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (Categorical(5), Discrete),
        (MultiOneHot([2, 3]), Discrete),
        (Binary(4), Bernoulli),
        (BOX, TanhGaussian),
    ],
    ids=lambda value: type(value).__name__,
)
def test_default_distributions(spec, expected):
    space = ActionSpace.from_spec(spec)
    assert make_distribution(space) == expected(space)


def test_distributions_by_name_take_options():
    space = ActionSpace.from_spec(BOX)
    assert make_distribution(space, "beta", alpha_high=9.0) == Beta(space, alpha_high=9.0)
    assert make_distribution(space, "tanh_mixture", num_modes=2).num_params == 14
    for name, cls in DISTRIBUTIONS.items():
        spec = next(spec for spec, kind, _ in CASES.values() if kind is cls)
        assert type(make_distribution(ActionSpace.from_spec(spec), name)) is cls


def test_a_name_that_does_not_fit_raises():
    message = "continuous actions must be one of 'tanh_gaussian', 'beta', 'tanh_mixture', got"
    for name in ("discrete", "gaussian"):
        with pytest.raises(ValueError, match=f"{message} '{name}'"):
            make_distribution(ActionSpace.from_spec(BOX), name)
    with pytest.raises(ValueError, match="Discrete is a distribution over discrete or multi_disc"):
        Discrete(ActionSpace.from_spec(Binary(2)))


BAD_ARGUMENTS = [
    (Discrete, Categorical(4), {"clip_low": 0.25}, r"clip_low must be in \[0, 1/4\)"),
    (Discrete, Categorical(4), {"clip_high": 1.5}, r"clip_high in \(clip_low, 1\], got 0.001"),
    (Discrete, MultiCategorical([2, 2000]), {}, "in .0, 1/2000. for 2000 categories"),
    (Discrete, Categorical(4), {"temperature": 0.0}, "temperature must be positive, got 0"),
    (Bernoulli, Binary(4), {"reduce": "max"}, "reduce must be one of 'sum', 'mean', got 'max'"),
    (TanhGaussian, BOX, {"std_low": 0.0}, "std_low must be positive and below std_high, got 0"),
    (TanhGaussian, BOX, {"std_high": None}, "got .* and None.* with 'softplus' only"),
    (TanhMixture, BOX, {"std_low": math.inf}, "std_low must be positive and below"),
    (TanhMixture, BOX, {"std_high": math.inf}, "std_low must be positive and below"),
    (
        TanhGaussian,
        BOX,
        {"std_bound": "exp"},
        "bound of std must be one of 'tanh', 'softplus', got 'exp'",
    ),
    (TanhGaussian, BOX, {"clip_actions": (-1.0, 1.0)}, r"inside \(-1, 1\), the lower first"),
    (Beta, BOX, {"beta_low": 2.0, "beta_high": 1.0}, "beta_low must be positive and below beta_"),
    (Beta, BOX, {"concentration_bound": "exp"}, "bound of alpha must be one of"),
    (TanhMixture, BOX, {"num_modes": 0}, "num_modes must be at least 1, got 0"),
]


@pytest.mark.parametrize(("cls", "spec", "options", "message"), BAD_ARGUMENTS)
def test_bad_arguments_raise(cls, spec, options, message):
    with pytest.raises(ValueError, match=message):
        cls(ActionSpace.from_spec(spec), **options)


def test_only_indices_skip_the_way_over_vectors():
    params = torch.zeros(2, 5)
    assert not isinstance(_make(CASES["index"])[1].stored(params), StoredActions | OneHotParts)
    assert isinstance(_make(CASES["one-hot"])[1].stored(params), StoredActions)
    assert isinstance(Discrete.stored, types.FunctionType)
    assert math.isclose(
        _make(CASES["index"])[1].stored(params).entropy()[0], math.log(5), rel_tol=1e-6
    )


def test_stored_actions_have_the_dtype_of_the_spec():
    for dtype in (torch.int64, torch.int32):
        policy_dist = Discrete(ActionSpace.from_spec(Categorical(3, dtype=dtype)))
        stored = policy_dist.stored(torch.zeros(4, 3))
        assert stored.sample().dtype == stored.deterministic_sample.dtype == dtype
