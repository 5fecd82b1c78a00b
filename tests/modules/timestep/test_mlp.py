"""Timestep encoders: inputs of any dtype and shape, padding, statistics, errors."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import set_recurrent_mode

from torchrl_amago.modules import MLPTimestepEncoder, TimestepEncoder

SHAPES = {"position": (2,), ("nested", "flags"): (2, 3), "level": (), "prev_reward": (1,)}


def make_batch(*batch: int) -> TensorDict:
    return TensorDict(
        {
            "position": torch.randn(*batch, 2),
            "nested": TensorDict(flags=torch.rand(*batch, 2, 3) < 0.5, batch_size=batch),
            "level": torch.randint(5, batch),
            "prev_reward": torch.randn(*batch, 1),
        },
        batch_size=batch,
    )


def make_encoder(**options) -> MLPTimestepEncoder:
    return MLPTimestepEncoder(SHAPES, hidden_size=8, output_size=4, **options)


@pytest.mark.parametrize("batch", [(), (3,), (3, 5)])
def test_any_batch_shape_and_dtype(batch):
    td = make_batch(*batch)
    encoder = make_encoder().eval()
    out = encoder(td)["timestep"]
    assert out.shape == (*batch, 4)
    flat = torch.cat(
        [
            td["position"].reshape(-1, 2),
            td["nested", "flags"].reshape(-1, 6).float(),
            td["level"].reshape(-1, 1).float(),
            td["prev_reward"].reshape(-1, 1),
        ],
        -1,
    )
    expected = encoder.out_norm(encoder.mlp(encoder.input_norm(flat)))
    torch.testing.assert_close(out.reshape(-1, 4), expected)


@pytest.mark.parametrize("compiling", [False, True])
def test_padding_is_never_seen(compiling, monkeypatch):
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: compiling)
    clean, poisoned = make_batch(2, 6), None
    mask = torch.arange(6) < torch.tensor([[6], [2]])
    clean["collector", "mask"] = mask
    poisoned = clean.clone()
    poisoned["position"][~mask] = float("nan")
    poisoned["prev_reward"][~mask] = float("inf")
    one, other = make_encoder(), make_encoder()
    other.load_state_dict(one.state_dict())
    with set_recurrent_mode(True):
        out, out_poisoned = one(clean)["timestep"], other(poisoned)["timestep"]
    torch.testing.assert_close(out, out_poisoned)
    assert out.isfinite().all()
    for name, buffer in one.named_buffers():
        torch.testing.assert_close(buffer, other.get_buffer(name), msg=name)
    # Statistics are those of the real steps alone.
    real = make_encoder()
    with set_recurrent_mode(True):
        real(clean[mask].exclude("collector"))
    torch.testing.assert_close(one.input_norm.mu, real.input_norm.mu)


def test_statistics_move_in_training_on_sequences_only():
    encoder, td = make_encoder(), make_batch(2, 3)
    encoder(td)
    assert not encoder.input_norm.mu.any()
    with set_recurrent_mode(True):
        encoder.eval()(td)
        assert not encoder.input_norm.mu.any()
        encoder.train()(td)
    assert encoder.input_norm.mu.all()


def test_auto_widen():
    encoder = make_encoder(auto_widen=True)
    assert encoder.output_size == 10
    assert [p.shape[0] for p in encoder.mlp.parameters() if p.ndim == 2] == [10, 10, 10]
    assert encoder(make_batch(2))["timestep"].shape == (2, 10)


def test_ones_own_encoder_is_one_class_and_one_method():
    class Sum(TimestepEncoder):
        def encode(self, inputs, mask):
            return inputs[0].sum(-1, keepdim=True)

    encoder = Sum({"position": (2,)}, output_size=1)
    td = make_batch(4)
    torch.testing.assert_close(encoder(td)["timestep"], td["position"].sum(-1, keepdim=True))


def test_errors_name_the_rule():
    with pytest.raises(ValueError, match="number_of_shapes must be at least 1, got 0"):
        MLPTimestepEncoder({})
    with pytest.raises(KeyError, match="level"):
        make_encoder()(make_batch(2).exclude("level"))
    td = make_batch(2)
    td["position"] = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"'position' must end in \(2,\) for each step"):
        make_encoder()(td)


def test_double_observations_are_read_in_the_weights_precision():
    encoder, td = make_encoder().eval(), make_batch(3)
    expected = encoder(td.clone())["timestep"]
    td["position"] = td["position"].double()
    torch.testing.assert_close(encoder(td)["timestep"], expected)
