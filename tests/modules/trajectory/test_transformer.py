"""The Transformer encoder's arguments, errors, gradients and compilation."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import set_recurrent_mode

from tests.modules.trajectory.helpers import needs_compiler
from torchrl_amago._cpu import cpu_paths
from torchrl_amago.modules.trajectory import TrajectoryEncoder, TransformerEncoder
from torchrl_amago.modules.trajectory.transformer import TransformerBlock


def build(kind=TransformerEncoder, **options) -> TransformerEncoder:
    defaults = {"context_length": 8, "d_model": 16, "num_heads": 2, "num_layers": 2}
    return kind(4, **{**defaults, **options})


def sequences(batch=3, steps=6) -> TensorDict:
    return TensorDict(
        timestep=torch.randn(batch, steps, 4),
        time_idx=torch.arange(steps).expand(batch, steps).unsqueeze(-1),
        is_init=(torch.arange(steps) == 0).expand(batch, steps).unsqueeze(-1),
        batch_size=[batch, steps],
    ).contiguous()


def encode(encoder, td):
    with set_recurrent_mode(True):
        return encoder(td.clone())["state"]


def test_defaults_are_the_papers():
    encoder = TransformerEncoder(32, context_length=4)
    assert encoder.output_size == 256
    assert len(encoder.blocks) == 3
    assert encoder.blocks[0].ff_in.out_features == 1024
    assert encoder.blocks[0].num_heads == 8
    assert (encoder.dropout_emb, encoder.blocks[0].dropout_ff) == (0.05, 0.05)


def test_is_causal():
    encoder = build().eval()
    td = sequences()
    before = encode(encoder, td)
    td["timestep"][:, 3:] += 1.0
    after = encode(encoder, td)
    torch.testing.assert_close(after[:, :3], before[:, :3])
    assert (after[:, 3:] - before[:, 3:]).abs().amax((0, 2)).min() > 1e-4


def test_trials_in_one_row_are_kept_apart():
    encoder = build().eval()
    td = sequences()
    td["is_init"][1, 4] = True
    td["time_idx"][1, 4:] = torch.tensor([[0], [1]])
    together = encode(encoder, td)
    torch.testing.assert_close(
        together[1:2, 4:], encode(encoder, td[1:2, 4:]), rtol=1e-5, atol=1e-5
    )
    td["is_init"] = torch.zeros_like(td["is_init"])
    assert (encode(encoder, td)[1, 4:] - together[1, 4:]).abs().max() > 1e-3
    td.del_("is_init")  # optional for sequences of one trial
    torch.testing.assert_close(encode(encoder, td)[0], together[0])


def test_segments_never_ignores_is_init():
    encoder = build(segments="never").eval()
    td = sequences()
    expected = encode(encoder, td)
    td["is_init"][:, 3] = True
    assert torch.equal(encode(encoder, td), expected)


def test_segments_never_raises_for_padding_on_the_left():
    encoder = build(segments="never").eval()
    td = sequences()
    expected = encode(encoder, td)
    steps = torch.arange(6).expand(3, 6)
    on_the_right = td.clone().set(("collector", "mask"), steps < 4)
    torch.testing.assert_close(encode(encoder, on_the_right)[:, :4], expected[:, :4])
    for mask in (steps >= 2, (steps >= 2) | (torch.arange(3) > 0).unsqueeze(1)):
        padded = td.clone().set(("collector", "mask"), mask)
        with pytest.raises(
            ValueError,
            match=r"segments='never' needs .* padded on the right, got .* segments='auto'",
        ):
            encode(encoder, padded)


@pytest.mark.parametrize(
    "options",
    [{}, {"positions": "rotary"}, {"window": 3, "num_sinks": 1}, {"segments": "never"}],
    ids=["plain", "rotary", "sinks", "never"],
)
def test_padding_is_skipped_and_changes_nothing(options, monkeypatch):
    """States, gradients and singular vectors are those of whole rows; padding may be NaN."""
    td, length = sequences(steps=8), torch.tensor([3, 8, 1])
    td["timestep"] = td["timestep"].double()
    mask = torch.arange(8) < length[:, None]
    if options.get("segments") != "never":
        mask[1, :2] = False  # on the left, then two trials
        td["is_init"][1, 5] = True
        td["time_idx"][1, 5:, 0] = torch.arange(3)
    td["collector", "mask"] = mask
    td["timestep"][~mask] = torch.nan
    target, results, seen = torch.randn(3, 8, 16).double(), [], []
    forward = TransformerBlock.forward
    monkeypatch.setattr(
        TransformerBlock,
        "forward",
        lambda block, x, *args: seen.append(x) or forward(block, x, *args),
    )
    for skips in (True, False):
        torch.manual_seed(0)
        encoder = build(dropout_ff=0.0, dropout_emb=0.0, **options).double()
        with cpu_paths(None if skips else False):
            state = encode(encoder, td)
            ((state - target).square() * mask.unsqueeze(-1)).sum().backward()
        found = {name: p.grad for name, p in encoder.named_parameters()}
        results.append((state[mask], found, dict(encoder.named_buffers())))
        assert state.isfinite().all()
    torch.testing.assert_close(*results, rtol=1e-9, atol=1e-9)
    assert [x.shape for x in seen] == 2 * [(1, mask.sum(), 16)] + 2 * [(3, 8, 16)]


def test_a_subclass_may_take_no_mask():
    class Louder(TransformerEncoder):
        def sequence(self, x_NTI, positions_NT, is_init_NT):
            return 2 * super().sequence(x_NTI, positions_NT, is_init_NT)

    td = sequences()
    td["collector", "mask"] = mask = torch.arange(6) < torch.tensor([2, 6, 1])[:, None]
    louder, plain = build(Louder).eval(), build().eval()
    louder.load_state_dict(plain.state_dict())
    torch.testing.assert_close(encode(louder, td)[mask], 2 * encode(plain, td)[mask])


def test_leading_dimensions():
    encoder = build().eval()
    td = sequences(6)
    expected = encode(encoder, td)
    assert torch.equal(encode(encoder, td.view(2, 3, 6)), expected.view(2, 3, 6, -1))
    torch.testing.assert_close(encode(encoder, td[0]), expected[0])


@pytest.mark.parametrize("normformer", [True, False])
@pytest.mark.parametrize("head_scaling", [True, False])
def test_every_parameter_gets_a_gradient(normformer, head_scaling):
    encoder = build(normformer=normformer, head_scaling=head_scaling)
    (encode(encoder, sequences()) * torch.randn(16)).sum().backward()
    for name, p in encoder.named_parameters():
        assert p.grad is not None, name
        assert p.grad.abs().sum() > 0, name
    assert any("head_scale" in n for n, _ in encoder.named_parameters()) == head_scaling


@pytest.mark.parametrize("kind", ["dropout_ff", "dropout_emb", "dropout_attn", "dropout_qkv"])
def test_dropouts(kind):
    off = {"dropout_ff": 0.0, "dropout_emb": 0.0}
    encoder, td = build(**{**off, kind: 0.5}), sequences()
    for block in encoder.blocks:
        block.requires_grad_(False)
    assert not torch.allclose(encode(encoder, td), encode(encoder, td))
    encoder.eval()
    assert torch.equal(encode(encoder, td), encode(encoder, td))


def test_learned_positions_end_somewhere(monkeypatch):
    td = sequences(steps=6)
    assert encode(build(positions="learned", max_positions=9), td).shape == (3, 6, 16)
    encoder = build(positions="learned", max_positions=5, context_length=4)
    assert encode(encoder, td[:, :5]).shape == (
        3,
        5,
        16,
    )  # four steps, and the one that the last led to
    with pytest.raises(ValueError, match=r"end at max_positions=5, got time index 5.*'clip'"):
        encode(encoder, td)
    with pytest.raises(ValueError, match="end at max_positions=5"):
        encoder(td[:, -1].clone().set("is_init", torch.ones(3, 1, dtype=torch.bool)))
    with monkeypatch.context() as patch:
        patch.setattr(torch.compiler, "is_compiling", lambda: True)  # as where it isn't looked for
        with pytest.raises(IndexError):
            encode(encoder, td)
    clipped = build(positions="learned", max_positions=5, beyond_positions="clip").eval()
    expected = td.clone()
    expected["time_idx"].clamp_(max=4)
    assert torch.equal(encode(clipped, td), encode(clipped, expected))


def test_sequences_that_see_more_than_rollouts_are_warned_of_once():
    encoder = build(context_length=4)
    encode(encoder, sequences(steps=5))  # four steps, and the one that the last led to
    short_trials = sequences(steps=6)
    short_trials["time_idx"] %= 3
    encode(encoder, short_trials)
    encode(build(context_length=4, window=4), sequences(steps=6))
    with pytest.warns(UserWarning, match="sequences of 6 steps see all.* Set window=4, raise"):
        encode(encoder, sequences(steps=6))
    encode(encoder, sequences(steps=6))


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_heads": 3}, "num_heads must divide d_model.*num_heads=3, d_model=16"),
        ({"num_heads": 0}, "num_heads must be at least 1, got 0"),
        ({"context_length": 0}, "context_length must be at least 1, got 0"),
        ({"context_length": 8.0}, "context_length must be an integer of at least 1, got 8.0"),
        ({"num_layers": 0}, "num_layers must be at least 1, got 0"),
        ({"window": 0}, "window must be at least 1, got 0"),
        ({"window": 9}, "window must be at most context_length, got window=9, context_length=8"),
        ({"num_sinks": 1}, "sinks need a window"),
        ({"positions": "sin"}, "positions must be one of .* got 'sin'"),
        ({"positions": "learned"}, "needs max_positions above context_length=8"),
        (
            {"positions": "learned", "max_positions": 8},
            "needs max_positions above context_length=8.*max_positions=8",
        ),
        ({"dropout_ff": -0.5}, r"dropout_ff must be in \[0, 1\), got -0.5"),
        ({"d_ff": -1}, "d_ff must be at least 1, got -1"),
        ({"d_model": 0}, "d_model must be at least 1, got 0"),
        ({"max_positions": 4}, "positions='learned', and no other, needs max_positions"),
        (
            {"positions": "rotary", "num_heads": 16},
            "d_model must be even, and d_model / num_heads with .*num_heads=16",
        ),
        ({"beyond_positions": "wrap"}, "beyond_positions must be one of"),
        ({"beyond_positions": "clip"}, "any with beyond_positions='clip'; got positions='fixed'"),
        ({"segments": "always"}, "segments must be one of"),
        (
            {"on_weight_update": "forget"},
            "on_weight_update must be one of 'keep', 'restart', got 'forget'",
        ),
        ({"max_streams": 0}, "max_streams must be at least 1, got 0"),
        ({"norm": "batch"}, "norm must be one of"),
        ({"activation": "sin"}, "activation must be one of"),
    ],
)
def test_bad_arguments(options, match):
    with pytest.raises(ValueError, match=match):
        build(**options)


def test_bad_inputs():
    encoder, td = build(), sequences()
    with pytest.raises(KeyError, match="reads 'time_idx'.*PreviousStepTransform"):
        encode(encoder, td.exclude("time_idx"))
    with pytest.raises(KeyError, match="reads 'timestep'"):
        encode(encoder, td.exclude("timestep"))
    with pytest.raises(KeyError, match="reads 'is_init'.*InitTracker"):
        encoder(td[:, 0].exclude("is_init"))
    with pytest.raises(ValueError, match=r"\[\*B, T, I\], I = input_size=4.*got \(3, 6, 5\)"):
        encode(encoder, td.clone().set("timestep", torch.zeros(3, 6, 5)))
    with pytest.raises(ValueError, match=r"'time_idx' must have shape \(3, 6, 1\).*got \(3, 6\)"):
        encode(encoder, td.clone().set("time_idx", torch.zeros(3, 6, dtype=torch.int64)))
    with pytest.raises(ValueError, match=r"'is_init' must have shape \(3, 1\)"):
        encoder(td[:, 0].clone().set("is_init", torch.zeros(3, 2, dtype=torch.bool)))
    with pytest.raises(ValueError, match=r"must have shape \[\*B, T, I\].*got \(4,\)"):
        encode(encoder, td[0, 0])


def test_keys_are_configurable():
    encoder = build(
        timestep_key=("a", "x"),
        time_idx_key="t",
        is_init_key="start",
        stream_key="_m",
        state_key="s",
    )
    td = sequences()[:, 0]
    td = TensorDict(
        {("a", "x"): td["timestep"], "t": td["time_idx"], "start": td["is_init"]}, td.batch_size
    )
    out = encoder(td)
    assert out["s"].shape == (3, 16)
    assert out["_m"].shape == (3, 1)
    assert encoder.in_keys == [("a", "x"), "t", "start"]
    assert encoder.out_keys == ["s", "_m"]


def test_three_functions_make_an_encoder():
    """The base class does streams, masks, shapes and errors."""
    from torchrl_amago.modules.trajectory import Memory

    class Sum(TrajectoryEncoder):
        class Total(Memory):
            def __init__(self, rows):
                self.batch_size, self.device = rows, torch.device("cpu")
                self.value = torch.zeros(rows, 4)

            def clear(self, rows_B):
                self.value[rows_B] = 0.0

        def sequence(self, x_NTI, positions_NT, is_init_NT):
            return x_NTI.cumsum(1)

        def step(self, x_NI, positions_N, memory):
            return memory.value.add_(x_NI).clone()

        def new_memory(self, num_rows, device, dtype):
            return self.Total(num_rows)

    encoder, td = Sum(4, 4), sequences()
    expected, stream = encode(encoder, td), torch.zeros(3, 1, dtype=torch.int64)
    for t in range(6):
        out = encoder(td[:, t].clone().set("_stream", stream))
        torch.testing.assert_close(out["state"], expected[:, t])
        stream = out["_stream"]


@pytest.mark.slow
@needs_compiler
@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiles_without_graph_breaks_in_training():
    encoder, td = build(dropout_emb=0.0, dropout_ff=0.0, num_layers=1), sequences()
    x, positions, is_init = td["timestep"], td["time_idx"].squeeze(-1), td["is_init"].squeeze(-1)
    compiled = torch.compile(encoder.sequence, fullgraph=True, backend="aot_eager")
    u = encoder.blocks[0].qkv.u.clone()
    out = compiled(x, positions, is_init)
    assert not torch.equal(encoder.blocks[0].qkv.u, u)
    encoder.eval()
    torch.testing.assert_close(out, encoder.sequence(x, positions, is_init), rtol=1e-5, atol=1e-5)
