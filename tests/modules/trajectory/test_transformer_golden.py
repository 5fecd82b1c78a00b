"""The Transformer against numbers recorded from the public AMAGO code."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import set_recurrent_mode

from tests.golden_utils import GoldenCase, assert_close, cases
from tests.golden_weights import renamed
from torchrl_amago.modules.trajectory import TransformerEncoder

CASES = cases("modules/traj_tformer_*")
POSITIONS = {"fixed": "fixed", "rope": "rotary", "learnable": "learned"}
NORMS = {"layer": "layer", "rmsnorm": "rms"}


def build(case: GoldenCase) -> TransformerEncoder:
    hp = case.hyperparameters
    encoder = TransformerEncoder(
        hp["tstep_dim"],
        context_length=hp["max_seq_len"],
        d_model=hp["d_model"],
        num_heads=hp["n_heads"],
        d_ff=hp["d_ff"],
        num_layers=hp["n_layers"],
        dropout_ff=hp["dropout_ff"],
        dropout_emb=hp["dropout_emb"],
        activation=hp["activation"],
        norm=NORMS[hp["norm"]],
        positions=POSITIONS[hp["pos_emb"]],
        max_positions=hp.get("max_time_idx"),
        sigma_reparam=hp["sigma_reparam"],
        normformer=hp["normformer_norms"],
    )
    weights = renamed(case, "w/", TransformerEncoder, hp["n_heads"])
    encoder.load_state_dict(weights)
    return encoder.eval()


def window(encoder, x, time_idx) -> torch.Tensor:
    td = TensorDict(timestep=x, time_idx=time_idx, batch_size=x.shape[:2])
    with set_recurrent_mode(True):
        return encoder(td)["state"]


def steps(encoder, x, time_idx, is_init) -> torch.Tensor:
    states, stream = [], torch.zeros(x.shape[0], 1, dtype=torch.int64)
    for t in range(x.shape[1]):
        td = TensorDict(
            timestep=x[:, t],
            time_idx=time_idx[:, t],
            is_init=is_init[:, t, None],
            _stream=stream,
            batch_size=x.shape[:1],
        )
        encoder(td)
        states.append(td["state"])
        stream = td["_stream"]
    return torch.stack(states, 1)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_whole_window(case):
    encoder, ctx = build(case), case.hyperparameters["max_seq_len"]
    out = window(encoder, case["in/seq"][:, :ctx], case["in/time_idxs"][:, :ctx])
    assert_close(out, case["out/full_first_ctx"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_fresh_windows(case):
    encoder, ctx = build(case), case.hyperparameters["max_seq_len"]
    x, time_idx = case["in/seq"], case["in/time_idxs"]
    last = [
        window(encoder, x[:, end - ctx : end], time_idx[:, end - ctx : end])[:, -1]
        for end in range(ctx + 1, x.shape[1] + 1)
    ]
    assert_close(torch.stack(last, 1), case["out/fresh_window_last"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cached_steps_past_the_window(case):
    encoder, x = build(case), case["in/seq"]
    is_init = torch.zeros(x.shape[:2], dtype=torch.bool)
    is_init[:, 0] = True
    out = steps(encoder, x, case["in/time_idxs"], is_init)
    assert_close(out, case["out/cached_steps"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_cached_steps_with_resets(case):
    encoder, x = build(case), case["in/seq"]
    is_init = torch.zeros(x.shape[:2], dtype=torch.bool)
    is_init[:, 0] = True
    # The reference is reset after the step that ended the trial.
    is_init[:, 1:] = case["in/reset_dones"].T[:, :-1]
    assert is_init[:, 1:].any()
    out = steps(encoder, x, case["in/reset_time_idxs"], is_init)
    assert_close(out, case["out/cached_steps_with_resets"])


@pytest.mark.parametrize("case", CASES, ids=str)
def test_training_outputs_gradients_and_power_iteration(case):
    encoder, hp = build(case).train(), case.hyperparameters
    ctx = hp["max_seq_len"]
    x = case["in/seq"][:, :ctx].requires_grad_()
    out = window(encoder, x, case["in/time_idxs"][:, :ctx])
    assert_close(out, case["out/train_full_first_ctx"])
    (out * case["in/cotangent"]).sum().backward()
    assert_close(x.grad, case["out/train_grad_seq"])
    expected = renamed(case, "grad/", TransformerEncoder, hp["n_heads"])
    grads = {name: p.grad for name, p in encoder.named_parameters()}
    assert len(expected) >= 12
    largest = max(value.abs().max() for value in expected.values())
    for name, value in expected.items():
        # A scalar's gradient is one sum that cancels; its rounding is of the size of its terms.
        assert_close(grads[name], value, msg=name, scale=largest if value.numel() == 1 else None)
    after = renamed(case, "after_train/", TransformerEncoder, hp["n_heads"])
    assert bool(after) == hp["sigma_reparam"]
    for name, value in after.items():
        assert_close(encoder.get_buffer(name), value, msg=name)
