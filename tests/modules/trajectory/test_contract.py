"""The contract of all trajectory encoders, under many settings."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch._dynamo.testing import CompileCounterWithBackend
from torchrl.modules import set_recurrent_mode

from tests.modules.trajectory.helpers import (
    assert_nan_goes_with_its_trial,
    assert_padding_has_no_effect,
    needs_compiler,
    random_trials,
    sequence_states,
    take_steps,
)
from torchrl_amago.modules import trajectory

CONTEXT = 12
TRANSFORMER = {
    "context_length": CONTEXT,
    "window": CONTEXT,
    "d_model": 8,
    "num_heads": 2,
    "num_layers": 2,
}
ENCODERS = {
    "transformer": ("TransformerEncoder", TRANSFORMER),
    "transformer, learned": (
        "TransformerEncoder",
        {**TRANSFORMER, "positions": "learned", "max_positions": 99},
    ),
    "transformer, rotary": ("TransformerEncoder", {**TRANSFORMER, "positions": "rotary"}),
    "transformer, window": (
        "TransformerEncoder",
        {**TRANSFORMER, "window": 3, "norm": "rms", "activation": "gelu"},
    ),
    "transformer, sinks": (
        "TransformerEncoder",
        {**TRANSFORMER, "window": 3, "num_sinks": 2, "sink_bias": 0.5},
    ),
    "transformer, clipped": (
        "TransformerEncoder",
        {**TRANSFORMER, "logit_clip": 0.3, "num_sinks": 1, "sigma_reparam": False},
    ),
    "transformer, plain": (
        "TransformerEncoder",
        {
            **TRANSFORMER,
            "normformer": False,
            "head_scaling": False,
            "sigma_reparam": False,
            "norm": "unit_ball",
        },
    ),
    "transformer, rotary sinks": (
        "TransformerEncoder",
        {**TRANSFORMER, "positions": "rotary", "window": 3, "num_sinks": 2, "norm": "simplicial"},
    ),
    "transformer, learned sinks": (
        "TransformerEncoder",
        {
            **TRANSFORMER,
            "positions": "learned",
            "max_positions": 99,
            "window": 3,
            "num_sinks": 1,
            "logit_clip": 0.3,
            "norm": "hypersphere",
            "activation": "mish",
        },
    ),
    "identity": ("IdentityEncoder", {}),
    "feedforward": ("FeedForwardEncoder", {"d_model": 8}),
    "gru": ("GRUEncoder", {"d_model": 8, "num_layers": 2}),
    "lstm": ("LSTMEncoder", {"d_model": 8, "num_layers": 2}),
    "mamba": ("MambaEncoder", {"d_model": 8, "num_layers": 2}),
    "mamba, narrow": ("MambaEncoder", {"d_model": 8, "num_layers": 2, "d_conv": 2, "expand": 1}),
    "linear_attention, one head": (
        "GatedLinearAttentionEncoder",
        {"d_model": 16, "num_layers": 2, "num_heads": 1, "norm": "unit_ball_detached"},
    ),
    "linear_attention": (
        "GatedLinearAttentionEncoder",
        {"d_model": 16, "num_layers": 2, "num_heads": 2},
    ),
}
MEMORY_FREE = ("identity", "feedforward")
every_encoder = pytest.mark.parametrize("name", ENCODERS)


def build(name, seed=0, stir=True, **options):
    torch.manual_seed(seed)
    kind, defaults = ENCODERS[name]
    encoder = getattr(trajectory, kind)(4, **{**defaults, **options})
    with torch.no_grad():
        for p in encoder.parameters() if stir else ():  # the past must matter visibly
            p.add_(0.1 * torch.randn_like(p))
    return encoder


def test_no_encoder_is_left_out():
    known = {kind for kind, _ in ENCODERS.values()}
    public = {n for n in trajectory.__all__ if n.endswith("Encoder")} - {"TrajectoryEncoder"}
    assert known == public


@every_encoder
@given(
    batch=st.integers(1, 5),
    steps=st.integers(1, 40),
    reset_fraction=st.sampled_from([0.0, 0.05, 0.4]),
    double=st.booleans(),
    seed=st.integers(0, 99),
)
@settings(max_examples=12)
@torch.no_grad()
def test_steps_equal_the_window(name, batch, steps, reset_fraction, double, seed):
    encoder = build(name, seed, stir=double).eval()
    x, time_idx, is_init = random_trials(batch, steps, reset_fraction)
    if double:
        encoder, x = encoder.double(), x.double()
    states, _ = take_steps(encoder, x, time_idx, is_init)
    assert states.shape == (batch, steps, encoder.output_size)
    expected = sequence_states(encoder, x, time_idx, is_init)
    tolerance = 1e-9 if double else 1e-5
    torch.testing.assert_close(states, expected, rtol=tolerance, atol=tolerance)


@every_encoder
@torch.no_grad()
def test_is_causal_and_remembers(name):
    encoder = build(name).eval()
    x, time_idx, is_init = random_trials(3, 9, reset_fraction=0.0)
    before = sequence_states(encoder, x, time_idx, is_init)
    changed = x.clone()
    changed[:, 4] += 1.0
    change = (sequence_states(encoder, changed, time_idx, is_init) - before).abs().amax((0, 2))
    assert change[:4].max() <= 1e-6
    assert change[4] > 1e-4
    assert (change[5:7].min() > 1e-6) == (name not in MEMORY_FREE)


@every_encoder
def test_steps_ignore_training_mode(name):
    """Collecting with a policy in training mode: no dropout, no changed buffer, no gradient."""
    encoder = build(name).train()
    before = {key: value.clone() for key, value in encoder.state_dict().items()}
    trials = random_trials(3, 6)
    states, _ = take_steps(encoder, *trials)
    assert not states.requires_grad
    assert encoder.training
    expected = sequence_states(encoder.eval(), *trials)
    torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
    for key, value in encoder.state_dict().items():
        assert torch.equal(value, before[key]), key


@every_encoder
@torch.no_grad()
def test_autocast_to_bfloat16(name):
    encoder = build(name).eval()
    trials = random_trials(3, 20)
    exact = sequence_states(encoder, *trials)
    with torch.autocast("cpu", torch.bfloat16):
        for states in (sequence_states(encoder, *trials), take_steps(encoder, *trials)[0]):
            error = (states.float() - exact).square().mean().sqrt()
            assert error < 2e-2 * exact.square().mean().sqrt()


@every_encoder
def test_nan_in_one_row_stays_there_and_goes_with_its_trial(name):
    assert_nan_goes_with_its_trial(build(name).eval())


@every_encoder
def test_nan_in_padding_has_no_effect(name):
    assert_padding_has_no_effect(build(name).eval())


@every_encoder
@torch.no_grad()
def test_padding_on_the_left_has_no_effect(name):
    """A slice that starts in mid-trial, behind padding."""
    encoder = build(name).eval()
    x, time_idx, is_init = random_trials(2, 12, reset_fraction=0.0)
    time_idx, is_init = time_idx + 5, torch.zeros_like(is_init)
    mask = (torch.arange(12) >= torch.tensor([[3], [0]])) & (torch.arange(12) < 10)
    td = TensorDict(
        timestep=x,
        time_idx=time_idx,
        is_init=is_init,
        collector=TensorDict(mask=mask, batch_size=[2, 12]),
        batch_size=[2, 12],
    )
    for without in ((), ("is_init",)):
        with set_recurrent_mode(True):
            states = encoder(td.exclude(*without).clone())["state"]
        for row, first in ((0, 3), (1, 0)):
            real = (z[row : row + 1, first:10] for z in (x, time_idx, is_init))
            expected = sequence_states(encoder, *real)[0]
            torch.testing.assert_close(states[row, first:10], expected, rtol=1e-5, atol=1e-5)


@every_encoder
@pytest.mark.parametrize("shape", [(0, 5), (3, 0)])
def test_without_rows_or_steps_there_are_no_states(name, shape):
    encoder = build(name)
    td = TensorDict(timestep=torch.zeros(*shape, 4), batch_size=shape)
    with set_recurrent_mode(True):
        assert encoder(td)["state"].shape == (*shape, encoder.output_size)
    assert encoder(td)["state"].shape == (*shape, encoder.output_size)


@every_encoder
def test_every_parameter_gets_a_gradient(name):
    encoder = build(name)
    x, time_idx, is_init = random_trials(3, 7)
    x.requires_grad_()
    states = sequence_states(encoder, x, time_idx, is_init)
    (states * torch.randn_like(states)).sum().backward()
    assert x.grad.abs().sum() > 0
    for key, p in encoder.named_parameters():
        if key != "position_table.weight":
            assert p.grad is not None, key
            assert p.grad.abs().sum() > 0, key


@pytest.mark.parametrize("name", [name for name in ENCODERS if name not in MEMORY_FREE])
@torch.no_grad()
def test_memory_of_a_rollout(name):
    encoder = build(name).eval()
    x, time_idx, is_init = random_trials(3, 30, reset_fraction=0.0)
    _, stream = take_steps(encoder, x[:, :1], time_idx[:, :1], is_init[:, :1])
    memory = encoder._streams.find(int(stream[0]))
    size = sum(z.nbytes for z in memory.tensors().values())
    take_steps(encoder, x[:, 1:], time_idx[:, 1:], is_init[:, 1:], stream)
    assert encoder._streams.find(int(stream[0])) is memory
    assert sum(z.nbytes for z in memory.tensors().values()) == size
    assert size > 0
    assert encoder._streams.find(0) is None  # sequences' number


# Between them they have every option that changes the code which is traced.
COMPILED = [
    name
    for name in ENCODERS
    if name not in ("transformer, learned", "transformer, rotary", "transformer, window")
    and name not in ("transformer, sinks", "mamba, narrow", "linear_attention, one head")
]


@pytest.mark.parametrize("name", COMPILED)
@needs_compiler
@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@torch.no_grad()
def test_compiles_once_however_long_contexts_grow(name):
    torch._dynamo.reset()
    options = {} if name in MEMORY_FREE else {"num_layers": 1}
    if name == "transformer":
        options |= {"context_length": 200, "window": 200}  # more than is read in one piece
    encoder, plain = (build(name, **options).eval().double() for _ in range(2))
    counter = CompileCounterWithBackend("eager")
    encoder.compile(backend=counter, fullgraph=True)
    num_steps = 99 if "max_positions" in ENCODERS[name][1] else 220
    x, time_idx, is_init = random_trials(3, num_steps, reset_fraction=0.0)
    trials = x.double(), time_idx, is_init

    def encode_first(steps):
        x, time_idx, is_init = (z[:, :steps].clone() for z in trials)
        states = encoder._sequence(x, time_idx.squeeze(-1), is_init.squeeze(-1))
        expected = sequence_states(plain, x, time_idx, is_init)
        torch.testing.assert_close(states, expected, rtol=1e-9, atol=1e-9)
        return counter.frame_count

    for steps in (5, 40):  # a second length makes lengths dynamic
        warm = encode_first(steps)
    for steps in (17, 99):
        assert encode_first(steps) == warm
    warm, stream, states = counter.frame_count + 2, None, []
    for steps in (slice(0, 70), slice(70, None)):
        part, stream = take_steps(encoder, *(z[:, steps] for z in trials), stream)
        states.append(part)
        # The first length that is read, and the second, which makes lengths dynamic.
        assert counter.frame_count <= warm
    expected = sequence_states(plain, *trials)
    torch.testing.assert_close(torch.cat(states, 1), expected, rtol=1e-9, atol=1e-9)


BLOCKS = {  # ways of sequences longer than window + 128 steps
    "window": {"window": 3},
    "sinks": {"window": 3, "num_sinks": 2, "segments": "never"},
    "clipped": {"window": None, "logit_clip": 0.3},
}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@pytest.mark.parametrize("options", BLOCKS.values(), ids=BLOCKS)
@torch.no_grad()
def test_blocks_of_long_sequences_compile_once(options):
    torch._dynamo.reset()
    options = {"context_length": 700, "num_layers": 1, **options}
    encoder, plain = (build("transformer", **options).eval() for _ in range(2))
    counter = CompileCounterWithBackend("eager")
    encoder.compile(backend=counter)
    frames = []
    for steps in (300, 390, 310, 700):
        x, time_idx, is_init = random_trials(2, steps, reset_fraction=0.0)
        states = encoder._sequence(x, time_idx.squeeze(-1), is_init.squeeze(-1))
        expected = sequence_states(plain, x, time_idx, is_init)
        torch.testing.assert_close(states, expected, rtol=1e-5, atol=1e-5)
        frames.append(counter.frame_count)
    assert frames == [1, 2, 2, 2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # the compiler's own
@torch.no_grad()
def test_how_many_numbers_there_are_is_no_reason_to_compile_again():
    torch._dynamo.reset()
    encoder = build("transformer", d_model=16, num_layers=1, window=None)
    counter = CompileCounterWithBackend("eager")
    encoder.compile(backend=counter)
    frames = []
    for steps in (40, 50, 60, 9, 2):
        x, time_idx, is_init = random_trials(3, steps, reset_fraction=0.0)
        encoder._sequence(x, time_idx.squeeze(-1), is_init.squeeze(-1))
        frames.append(counter.frame_count)
    assert frames == [1] + 4 * [2]
