"""Building blocks, against recorded numbers and by their properties."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torch.nn import functional as F

from tests.golden_utils import assert_close, cases, load
from torchrl_amago.modules._input_norm import InputNorm
from torchrl_amago.modules._layers import (
    MLP,
    RMSNorm,
    SigmaReparamLinear,
    make_activation,
    make_norm,
)
from torchrl_amago.modules._positions import rotate_by_position, sinusoidal_positions

# --- sigma-reparametrised linear ---


def build_linear(case) -> SigmaReparamLinear:
    hp = case.hyperparameters
    layer = SigmaReparamLinear(hp["d_in"], hp["d_out"], bias=hp["bias"])
    layer.load_state_dict(case.starting("w/"))
    return layer


SIGMA_CASES = cases("functional/sigma_reparam", "functional/sigma_reparam_nobias")


@pytest.mark.parametrize("case", SIGMA_CASES, ids=str)
def test_sigma_reparam_in_evaluation(case):
    layer = build_linear(case).eval()
    before = layer.u.clone()
    out = layer(case["x"])
    (out * case["cotangent"]).sum().backward()
    assert_close(out, case["out/eval"])
    assert_close(layer.weight.grad, case["out/eval_grad_weight"])
    assert_close(layer.gamma.grad, case["out/eval_grad_gamma"])
    assert torch.equal(layer.u, before)


@pytest.mark.parametrize("case", SIGMA_CASES, ids=str)
def test_sigma_reparam_in_training(case):
    layer = build_linear(case).train()
    for i in range(3):
        layer.zero_grad()
        out = layer(case["x"])
        (out * case["cotangent"]).sum().backward()
        assert_close(out, case["out/train"][i])
        assert_close(layer.u, case["out/train_u"][i])
        assert_close(layer.v, case["out/train_v"][i])
        if i == 0:
            assert_close(layer.weight.grad, case["out/train1_grad_weight"])
            assert_close(layer.gamma.grad, case["out/train1_grad_gamma"])


def test_sigma_reparam_starts_at_the_singular_vectors():
    case = load("functional/sigma_reparam_init")
    assert_close(case["w/u"] @ case["w/weight"] @ case["w/v"], case["out/u_W_v"])
    layer = SigmaReparamLinear(case.hyperparameters["d_in"], case.hyperparameters["d_out"])
    weight = layer.weight.detach()
    assert_close(layer.u @ weight @ layer.v, torch.linalg.svdvals(weight)[0])
    assert layer.gamma.item() == 1.0
    bound = case.hyperparameters["d_in"] ** -0.5
    assert 0 < layer.bias.abs().max() <= bound
    assert SigmaReparamLinear(200, 200).weight.std().item() == pytest.approx(0.02, rel=0.05)


@pytest.mark.parametrize("rows", [1, 50])
def test_sigma_reparam_scales_rows_or_matrix_alike(rows):
    layer = SigmaReparamLinear(6, 10).eval()
    nn.init.constant_(layer.gamma, 1.7)
    x = torch.randn(rows, 6)
    expected = F.linear(x, layer.effective_weight(), layer.bias)
    torch.testing.assert_close(layer(x), expected)
    assert torch.linalg.matrix_norm(layer.effective_weight(), 2).item() == pytest.approx(
        1.7, rel=1e-4
    )


def test_power_iteration_converges_and_can_be_left_out():
    layer = SigmaReparamLinear(6, 10).train()
    layer.u.copy_(F.normalize(torch.randn(10), dim=0))
    layer.v.copy_(F.normalize(torch.randn(6), dim=0))
    before = layer.u.clone()
    layer(torch.zeros(1, 6), power_iteration=False)
    assert torch.equal(layer.u, before)
    for _ in range(200):
        layer(torch.zeros(1, 6))
    assert torch.linalg.matrix_norm(layer.effective_weight(), 2).item() == pytest.approx(
        1.0, rel=1e-3
    )


def test_several_training_forwards_before_one_backward():
    layer = SigmaReparamLinear(4, 4)
    total = layer(torch.randn(2, 4)).sum() + layer.eval()(torch.randn(2, 4)).sum()
    total = total + layer.train()(torch.randn(2, 4)).sum()
    total.backward()  # in-place updates of u and v must not disturb the graph
    assert layer.weight.grad.isfinite().all()


def test_functional_calls_see_and_update_buffers():
    layer = SigmaReparamLinear(4, 3).train()
    params = TensorDict.from_module(layer).clone()
    before = params["u"].clone(), layer.u.clone()
    params["u"].copy_(F.normalize(torch.randn(3), dim=0))
    params["v"].copy_(F.normalize(torch.randn(4), dim=0))
    with params.to_module(layer):
        layer(torch.randn(2, 4))
    assert not torch.equal(params["u"], before[0])
    assert torch.equal(layer.u, before[1])
    torch.testing.assert_close(params["u"].norm(), torch.tensor(1.0))


# --- norms, activations, MLP ---


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("layer", "layer"),
        ("rms", "rmsnorm"),
        ("unit_ball", "unitball"),
        ("unit_ball_detached", "unitball"),
        ("hypersphere", "hypersphere"),
        ("simplicial", "simnorm"),
        ("none", "none"),
    ],
)
def test_norms(ours, theirs):
    case = load("functional/normalization")
    norm = make_norm(ours, case.hyperparameters["d"])
    norm.load_state_dict(case.starting(f"{theirs}/w/norm."))
    assert_close(norm(case["x"]), case[f"{theirs}/out"])


@pytest.mark.parametrize("name", ["leaky_relu", "relu", "gelu", "mish"])
def test_activations(name):
    case = load("functional/normalization")
    assert_close(make_activation(name)(case["x"]), case[f"act/{name}"])


def test_detached_norm_has_no_gradient_through_the_length():
    x = torch.tensor([3.0, 4.0], requires_grad=True)
    make_norm("unit_ball_detached", 2)(x).sum().backward()
    torch.testing.assert_close(x.grad, torch.tensor([0.2, 0.2]), rtol=1e-4, atol=0)


def test_rms_norm_by_hand():
    torch.testing.assert_close(
        RMSNorm(2, eps=0.0)(torch.tensor([1.0, 7.0])), torch.tensor([0.2, 1.4])
    )


def test_mlp_layers_and_order():
    mlp = MLP(3, 8, 2, 5, activation="relu", norm="layer", linear=SigmaReparamLinear)
    assert isinstance(mlp.out, SigmaReparamLinear)
    mlp.eval()
    x = torch.randn(4, 3)
    h = torch.relu(mlp.norms[0](mlp.hidden[0](x)))
    h = torch.relu(mlp.norms[1](mlp.hidden[1](h)))
    torch.testing.assert_close(mlp(x), mlp.out(h))


def test_mlp_dropout_only_in_training():
    mlp = MLP(3, 64, 1, 2, dropout=0.5)
    x = torch.randn(4, 3)
    assert not torch.equal(mlp(x), mlp(x))
    mlp.eval()
    assert torch.equal(mlp(x), mlp(x))


@pytest.mark.parametrize(
    ("build", "match"),
    [
        (lambda: make_norm("batch", 4), "norm must be one of .* got 'batch'"),
        (lambda: make_norm("simplicial", 12), "multiple of 8, got 12"),
        (lambda: make_activation("swish"), "activation must be one of .* got 'swish'"),
        (lambda: MLP(3, 4, 0, 2), "num_layers must be at least 1, got 0"),
        (lambda: sinusoidal_positions(torch.zeros(1), 3), "even size, got 3"),
    ],
)
def test_errors_name_the_rule(build, match):
    with pytest.raises(ValueError, match=match):
        build()


# --- positions ---


def test_sinusoidal_positions():
    case = load("functional/fixed_pos_emb")
    assert_close(sinusoidal_positions(case["pos"], case.hyperparameters["d_model"]), case["out"])


def test_rotary_positions():
    case = load("functional/rope")
    q, k, v = (z.transpose(1, 2) for z in case["qkv"].unbind(2))
    expected_q, expected_k, expected_v = (z.transpose(1, 2) for z in case["out"].unbind(2))
    positions = case["pos"].squeeze(-1)
    assert_close(rotate_by_position(q, positions), expected_q)
    assert_close(rotate_by_position(k, positions), expected_k)
    assert torch.equal(v, expected_v)


def test_positions_of_double_precision_are_double():
    positions = torch.tensor([[7, 1000]])
    x = torch.randn(1, 1, 2, 4, dtype=torch.float64)
    angle = positions[..., None].double() * torch.tensor([1.0, 1e-2], dtype=torch.float64)
    a, b = x[:, 0].chunk(2, -1)
    expected = torch.cat((a * angle.cos() - b * angle.sin(), a * angle.sin() + b * angle.cos()), -1)
    torch.testing.assert_close(rotate_by_position(x, positions)[:, 0], expected)
    found = sinusoidal_positions(positions, 4, torch.float64)
    expected = torch.stack((angle.sin(), angle.cos()), -1).flatten(-2)
    torch.testing.assert_close(found, expected)


def test_rotary_products_depend_on_distance_only():
    q, k = torch.randn(2, 1, 1, 1, 8)
    scores = [
        (
            rotate_by_position(q, torch.tensor([[i]])) * rotate_by_position(k, torch.tensor([[j]]))
        ).sum()
        for i, j in ((3, 1), (12, 10))
    ]
    torch.testing.assert_close(*scores)


# --- input normalisation ---


@pytest.mark.parametrize(
    "case", cases("functional/inputnorm", "functional/inputnorm_fast"), ids=str
)
def test_input_norm(case):
    hp = case.hyperparameters
    norm = InputNorm(hp["dim"], hp["beta"], hp["init_nu"])
    for i, x in enumerate(case["x"]):
        mask = ~(x == 4.0).all(-1)
        assert mask.any()
        assert not mask.all()
        norm.update(x, mask)
        assert_close(norm.mu, case["out/mu"][i])
        assert_close(norm.nu, case["out/nu"][i])
        assert_close(norm.t, case["out/_t"][i])
        assert_close(norm.sigma, case["out/sigma"][i])
        assert_close(norm(x), case["out/normalized"][i])


def test_input_norm_of_features_that_hardly_vary():
    case = load("functional/inputnorm_edge")
    norm = InputNorm(case.hyperparameters["dim"])
    norm.mu.copy_(case["mu"])
    norm.nu.copy_(case["nu"])
    assert_close(norm.sigma, case["out/sigma"])
    assert_close(norm(case["x"]), case["out/normalized"])


def test_input_norm_first_update_by_hand():
    norm = InputNorm(1, beta=0.5)
    norm.update(torch.tensor([[1.0], [3.0]]))  # t = 2: beta_t = 0.5 / (1 - 0.25) = 2/3
    torch.testing.assert_close(norm.mu, torch.tensor([4 / 3]))
    torch.testing.assert_close(norm.nu, torch.tensor([1 / 3 + 10 / 3]))


@pytest.mark.parametrize("poison", [torch.nan, torch.inf, 1e30])
@pytest.mark.parametrize("trailing", [True, False])
def test_input_norm_ignores_what_is_masked(poison, trailing):
    clean, poisoned = InputNorm(3), InputNorm(3)
    x = torch.randn(4, 6, 3)
    mask = torch.rand(4, 6) < 0.5
    clean.update(x[mask])
    poisoned.update(torch.where(mask[..., None], x, poison), mask[..., None] if trailing else mask)
    for name, value in clean.named_buffers():
        torch.testing.assert_close(poisoned.get_buffer(name), value)


def test_input_norm_of_nothing_but_padding_changes_nothing():
    norm = InputNorm(3)
    norm.update(torch.randn(4, 3))
    before = {name: value.clone() for name, value in norm.named_buffers()}
    norm.update(torch.full((4, 3), torch.nan), torch.zeros(4, dtype=torch.bool))
    for name, value in norm.named_buffers():
        assert torch.equal(value, before[name])


def test_input_norm_updates_in_place():
    norm = InputNorm(3)
    addresses = [b.data_ptr() for b in norm.buffers()]
    norm.update(torch.randn(4, 3))
    assert [b.data_ptr() for b in norm.buffers()] == addresses


@pytest.mark.parametrize("spread", [1.0, 0.0])
def test_input_norm_bounds_outliers(spread):
    norm = InputNorm(1, beta=0.5)
    for _ in range(30):
        norm.update(torch.tensor([[spread], [-spread]]))
    assert (norm.sigma > 0.01).item() == (spread > 0)
    assert norm(torch.tensor([[1e9], [-1e30]])).flatten().tolist() == [1e4, -1e4]


@pytest.mark.parametrize("outlier", [torch.finfo(torch.float32).max, torch.inf, -torch.inf])
def test_input_norm_forgets_an_outlier(outlier):
    norm = InputNorm(1, beta=0.1)
    norm.update(torch.tensor([[outlier], [0.0]]))
    for _ in range(600):
        norm.update(torch.tensor([[4.0], [6.0]]))
    torch.testing.assert_close(norm.mu, torch.tensor([5.0]), atol=1e-3, rtol=0)
    torch.testing.assert_close(norm.sigma, torch.tensor([1.0]), atol=1e-3, rtol=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_input_norm_counts_in_float32_at_least(dtype):
    """In half precision its step size would be infinite, and its bounds out of range."""
    norm, expected = InputNorm(3).to(dtype), InputNorm(3)
    for _ in range(5):
        x = torch.randn(64, 3).to(dtype)
        norm.update(x)
        expected.update(x.float())
        assert norm(x).dtype == dtype
    for name, value in expected.named_buffers():
        found = norm.get_buffer(name)
        assert found.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        torch.testing.assert_close(found.float(), value, atol=1e-4, rtol=1e-3)
