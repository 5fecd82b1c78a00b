from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torch._dynamo.testing import CompileCounterWithBackend
from torchrl.modules import GRUModule, LSTMModule, set_recurrent_mode

from tests.golden_utils import assert_close, load
from tests.golden_weights import renamed
from torchrl_amago.modules import GRUEncoder, LSTMEncoder
from torchrl_amago.modules.trajectory.kernels.rnn import _OPERATORS, recurrence

BOTH = pytest.mark.parametrize("encoder_class", [GRUEncoder, LSTMEncoder])
KINDS = pytest.mark.parametrize("kind", ["gru", "lstm"])
TORCH = {"gru": nn.GRU, "lstm": nn.LSTM}


def random_resets(N: int, T: int, fraction: float, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(N, T, generator=generator) < fraction


def steps(encoder, x_NTI: torch.Tensor, is_init_NT: torch.Tensor) -> torch.Tensor:
    memory = encoder.new_memory(len(x_NTI), x_NTI.device, x_NTI.dtype)
    states = []
    with torch.no_grad():
        for x_NI, is_init_N in zip(x_NTI.unbind(1), is_init_NT.unbind(1), strict=True):
            memory.clear(is_init_N)
            states.append(encoder.step(x_NI, None, memory))
    return torch.stack(states, 1)


def build_recorded() -> tuple:
    case = load("modules/traj_gru")
    hp = case.hyperparameters
    encoder = GRUEncoder(
        hp["tstep_dim"],
        d_model=hp["d_output"],
        hidden_size=hp["d_hidden"],
        num_layers=hp["n_layers"],
    )
    encoder.load_state_dict(renamed(case, "w/", GRUEncoder))
    return case, encoder


def test_recorded_window_and_steps():
    case, encoder = build_recorded()
    x = case["in/seq"]
    assert_close(encoder.sequence(x, None, None), case["out"])
    assert_close(steps(encoder, x, torch.zeros(x.shape[:2], dtype=torch.bool)), case["out"])


def test_recorded_final_hidden_state():
    case, encoder = build_recorded()
    memory = encoder.new_memory(4, torch.device("cpu"), torch.float32)
    for x_NI in case["in/seq"].unbind(1):
        encoder.step(x_NI, None, memory)
    hidden = torch.stack([layer[0] for layer in memory.layers])
    assert_close(hidden.detach(), case["out/final_hidden"])


def test_recorded_resets_in_both_modes():
    case, encoder = build_recorded()
    x = case["in/seq"]
    is_init = torch.zeros(x.shape[:2], dtype=torch.bool)
    # The reference is reset after the step that ended the trial.
    is_init[:, 1:] = case["in/dones"].T[:, :-1]
    assert is_init.any()
    assert_close(steps(encoder, x, is_init), case["out/stepwise_with_resets"])
    assert_close(encoder.sequence(x, None, is_init), case["out/stepwise_with_resets"])


@BOTH
@given(
    N=st.integers(1, 5),
    T=st.integers(1, 40),
    fraction=st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    num_layers=st.integers(1, 3),
    seed=st.integers(0, 99),
)
@settings(max_examples=20, deadline=None)
def test_steps_equal_the_window(encoder_class, N, T, fraction, num_layers, seed):
    torch.manual_seed(seed)
    encoder = encoder_class(3, d_model=8, hidden_size=6, num_layers=num_layers)
    x_NTI, is_init_NT = torch.randn(N, T, 3), random_resets(N, T, fraction, seed)
    window = encoder.sequence(x_NTI, None, is_init_NT)
    torch.testing.assert_close(steps(encoder, x_NTI, is_init_NT), window, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("encoder_class", "module_class", "name"),
    [(GRUEncoder, GRUModule, "gru"), (LSTMEncoder, LSTMModule, "lstm")],
)
def test_same_as_torchrls_module_from_the_same_weights(encoder_class, module_class, name):
    torch.manual_seed(0)
    module = module_class(4, 8, num_layers=2, in_key="x", out_key="y")
    encoder = encoder_class(4, d_model=8)
    encoder.rnn.load_state_dict(getattr(module, name).state_dict())
    x_NTI, is_init_NT = torch.randn(3, 20, 4), random_resets(3, 20, 0.2)
    td = TensorDict(x=x_NTI, is_init=is_init_NT.unsqueeze(-1), batch_size=[3, 20])
    with set_recurrent_mode(True):
        expected = encoder.out_norm(encoder.out(module(td)["y"]))
    torch.testing.assert_close(encoder.sequence(x_NTI, None, is_init_NT), expected)


@KINDS
@pytest.mark.parametrize("fraction", [None, 0.0, 0.3])
def test_gradients_of_the_operator(kind, fraction):
    torch.manual_seed(0)
    weights = [w.detach().requires_grad_() for w in TORCH[kind](3, 2).double().parameters()]
    x_TNI = torch.randn(5, 2, 3, dtype=torch.float64, requires_grad=True)
    is_init_TN = None if fraction is None else random_resets(5, 2, fraction, seed=3)
    if fraction:
        assert is_init_TN[1:].any()
        assert not is_init_TN.all(0).any()

    def layer(x_TNI, *weights):
        return _OPERATORS[kind](x_TNI, *weights, is_init_TN)

    assert torch.autograd.gradcheck(layer, (x_TNI, *weights))


@KINDS
def test_gradients_of_the_operator_are_the_kernels(kind):
    """oneDNN's LSTM kernel is for float32 alone."""
    torch.manual_seed(0)
    rnn = TORCH[kind](16, 16)
    x_TNI, cotangent = torch.randn(60, 3, 16, requires_grad=True), torch.randn(60, 3, 16)
    inputs = [x_TNI, *rnn.parameters()]
    expected = torch.autograd.grad(rnn(x_TNI)[0], inputs, cotangent)
    got = torch.autograd.grad(_OPERATORS[kind](*inputs, None), inputs, cotangent)
    for ours, theirs in zip(got, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5 * theirs.abs().max().item())


@BOTH
def test_gradient_check_of_the_window_with_resets(encoder_class):
    torch.manual_seed(0)
    encoder = encoder_class(2, d_model=3, hidden_size=3, num_layers=2).double()
    is_init_NT = torch.tensor([[1, 0, 0, 1, 0, 0], [0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    x_NTI = torch.randn(2, 6, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: encoder.sequence(x, None, is_init_NT), x_NTI)


@BOTH
def test_gradients_stay_within_the_trial(encoder_class):
    encoder = encoder_class(2, d_model=4)
    x_NTI = torch.randn(1, 6, 2, requires_grad=True)
    is_init_NT = torch.tensor([[False, False, False, True, False, False]])
    encoder.sequence(x_NTI, None, is_init_NT)[:, 4, 0].sum().backward()
    assert x_NTI.grad[0].any(-1).tolist() == [False, False, False, True, True, False]


@pytest.mark.parametrize("lengths", [[1] * 9, [9], [5, 4], [1, 1, 7], [2, 2, 2, 2, 1]])
@KINDS
def test_stretches_of_all_lengths(kind, lengths):
    torch.manual_seed(0)
    rnn = TORCH[kind](3, 4)
    x_TNI = torch.randn(9, 2, 3)
    is_init_TN = torch.zeros(9, 2, dtype=torch.bool)
    for start in torch.tensor([0, *lengths[:-1]]).cumsum(0):
        is_init_TN[start, 0] = True  # the other row is one trial
    out = recurrence(kind, x_TNI, is_init_TN, list(rnn.parameters()))
    pieces = [rnn(piece)[0] for piece in x_TNI[:, 0].split(lengths)]
    torch.testing.assert_close(out[:, 0], torch.cat(pieces))
    torch.testing.assert_close(out[:, 1], rnn(x_TNI[:, 1])[0])


@BOTH
def test_cleared_rows_carry_nothing_over(encoder_class):
    torch.manual_seed(0)
    encoder = encoder_class(2, d_model=4)
    memory = encoder.new_memory(2, torch.device("cpu"), torch.float32)
    with torch.no_grad():
        encoder.step(torch.full((2, 2), torch.nan), None, memory)
        memory.clear(torch.tensor([True, False]))
        x_NI = torch.randn(2, 2)
        state = encoder.step(x_NI, None, memory)
    torch.testing.assert_close(state[:1], encoder.sequence(x_NI[:1, None], None, None)[:, 0])
    assert state[1].isnan().all()


@BOTH
def test_bfloat16_autocast(encoder_class):
    torch.manual_seed(0)
    encoder = encoder_class(8, d_model=32)
    x_NTI, is_init_NT = torch.randn(3, 50, 8), random_resets(3, 50, 0.05)
    expected = encoder.sequence(x_NTI, None, is_init_NT)
    with torch.autocast("cpu", torch.bfloat16):
        window = encoder.sequence(x_NTI, None, is_init_NT)
        memory_steps = steps(encoder, x_NTI, is_init_NT)
    for got in (window, memory_steps):
        error = (got.float() - expected).abs().max() / expected.abs().max()
        assert error < 2e-2


@BOTH
def test_memory_lives_in_float32_and_outlives_inference_mode(encoder_class):
    encoder = encoder_class(2, d_model=4)
    with torch.inference_mode():
        memory = encoder.new_memory(2, torch.device("cpu"), torch.bfloat16)
        encoder.step(torch.ones(2, 2), None, memory)
    assert memory.layers[0][0].dtype == torch.float32
    memory.clear(torch.ones(2, dtype=torch.bool))
    assert not memory.layers[0][0].any()


@BOTH
def test_compiled_without_breaks_or_recompilation(encoder_class):
    torch.manual_seed(0)
    torch._dynamo.reset()
    encoder = encoder_class(3, d_model=8, num_layers=1)
    sequence_counter = CompileCounterWithBackend("aot_eager")
    step_counter = CompileCounterWithBackend("aot_eager")
    sequence = torch.compile(encoder.sequence, backend=sequence_counter, fullgraph=True)
    step = torch.compile(encoder.step, backend=step_counter, fullgraph=True)

    def gradients(function, x_NTI, is_init_NT):
        out = function(x_NTI, None, is_init_NT)
        return [out, *torch.autograd.grad(out.square().sum(), list(encoder.parameters()))]

    for T in (4, 7, 12):
        args = torch.randn(2, T, 3), random_resets(2, T, 0.3)
        for ours, theirs in zip(
            gradients(sequence, *args), gradients(encoder.sequence, *args), strict=True
        ):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    assert sequence_counter.frame_count == 2  # the first length, then any length
    memory, expected = (encoder.new_memory(2, torch.device("cpu"), torch.float32) for _ in range(2))
    with torch.no_grad():
        for position in torch.arange(8):
            x_NI = torch.randn(2, 3)
            got = step(x_NI, position.expand(2), memory)
            torch.testing.assert_close(got, encoder.step(x_NI, None, expected))
    assert step_counter.frame_count == 1


@BOTH
def test_bad_arguments(encoder_class):
    with pytest.raises(ValueError, match=r"num_layers must be at least 1, got 0.*FeedForward"):
        encoder_class(4, num_layers=0)
    with pytest.raises(ValueError, match=r"norm must be one of .*got 'batch'"):
        encoder_class(4, out_norm="batch")


@pytest.mark.parametrize("kind", [GRUEncoder, LSTMEncoder])
@torch.no_grad()
def test_longest_memory(kind):
    """Within `longest_memory` steps without input the slowest units fade to about 1/e."""
    encoder = kind(4, d_model=400, num_layers=1, longest_memory=100)
    for name, p in encoder.rnn.named_parameters():
        if "weight" in name:
            p.zero_()
    weights = encoder.rnn.all_weights[0]
    state = [torch.ones(1, 400) for _ in range(encoder.tensors_per_layer)]
    kept, empty = (
        encoder._step_cell(torch.zeros(1, 4), [z * scale for z in state], weights)[-1]
        for scale in (1, 0)
    )
    memory = -1 / (kept - empty).log()
    assert 80 < memory.max() < 105
    assert memory.min() < 10
    with pytest.raises(ValueError, match="longest_memory must be at least 2, got 1"):
        kind(4, longest_memory=1)
