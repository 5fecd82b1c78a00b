from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import set_recurrent_mode

from tests.golden_utils import GoldenCase, assert_close, cases
from tests.golden_weights import renamed
from torchrl_amago.modules import FeedForwardEncoder, IdentityEncoder

CASES = cases("modules/traj_ff*")
NORMS = {"layer": "layer", "rmsnorm": "rms"}


def build(case: GoldenCase) -> FeedForwardEncoder:
    hp = case.hyperparameters
    encoder = FeedForwardEncoder(
        hp["tstep_dim"],
        d_model=hp["d_model"],
        d_ff=hp["d_ff"],
        num_layers=hp.get("n_layers", 1),
        activation=hp.get("activation", "leaky_relu"),
        norm=NORMS[hp["norm"]] if "norm" in hp else "none",
        out_norm=NORMS[hp.get("out_norm", "layer")],
    )
    encoder.load_state_dict(renamed(case, "w/", FeedForwardEncoder))
    return encoder


def steps(encoder, x_NTI: torch.Tensor) -> torch.Tensor:
    memory = encoder.new_memory(len(x_NTI), x_NTI.device, x_NTI.dtype)
    return torch.stack([encoder.step(x, None, memory) for x in x_NTI.unbind(1)], 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_recorded_numbers(case):
    encoder, x = build(case), case["in/seq"]
    assert_close(encoder.sequence(x, None, None), case["out"])
    assert_close(steps(encoder, x), case["out"])


def test_steps_have_no_dropout_and_sequences_have_it():
    encoder = FeedForwardEncoder(4, d_model=16, dropout=0.5).train()
    x_NTI = torch.randn(3, 6, 4)
    expected = FeedForwardEncoder.sequence(encoder.eval(), x_NTI, None, None)
    encoder.train()
    torch.testing.assert_close(steps(encoder, x_NTI), expected)
    assert (encoder.sequence(x_NTI, None, None) == 0).any()
    assert not (expected == 0).any()


@pytest.mark.parametrize("encoder", [FeedForwardEncoder(4, d_model=8), IdentityEncoder(4)])
def test_nothing_is_remembered(encoder):
    x_NTI = torch.randn(2, 5, 4)
    changed = torch.cat((torch.randn(2, 4, 4), x_NTI[:, 4:]), 1)
    one, other = (encoder.sequence(x, None, None)[:, 4] for x in (x_NTI, changed))
    torch.testing.assert_close(one, other, rtol=0, atol=0)
    step = TensorDict(timestep=x_NTI[:, 4], time_idx=torch.full((2, 1), 4), batch_size=[2])
    assert encoder.out_keys == ["state"]
    state = encoder(step)["state"]
    torch.testing.assert_close(state, one)
    assert set(step.keys()) == {"timestep", "time_idx", "state"}
    assert len(encoder._streams) == 0


def test_identity_passes_gradients_and_hides_padding():
    x = torch.ones(1, 3, 2, requires_grad=True)
    td = TensorDict(
        timestep=x,
        time_idx=torch.zeros(1, 3, 1, dtype=torch.int64),
        collector=TensorDict(mask=torch.tensor([[True, True, False]]), batch_size=[1, 3]),
        batch_size=[1, 3],
    )
    with set_recurrent_mode(True):
        state = IdentityEncoder(2, context_length=7)(td)["state"]
    assert state.tolist() == [[[1.0, 1.0], [1.0, 1.0], [0.0, 0.0]]]
    state.sum().backward()
    assert x.grad.tolist() == state.tolist()


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"num_layers must be at least 1, got -1. Or use 0"):
        FeedForwardEncoder(4, num_layers=-1)
    with pytest.raises(ValueError, match=r"norm must be one of .*got 'batch'"):
        FeedForwardEncoder(4, norm="batch")
    with pytest.raises(ValueError, match=r"dropout must be in \[0, 1\), got 1.5"):
        FeedForwardEncoder(4, num_layers=0, dropout=1.5)
    with pytest.raises(ValueError, match=r"d_model must be at least 1, got 0"):
        FeedForwardEncoder(4, d_model=0)
