"""Single recorded modules: built from what their weights show, they give the reference's numbers."""

from __future__ import annotations

import pytest
import torch
from tensordict import TensorDict
from torch import nn
from torchrl.modules import set_recurrent_mode

from tests.golden_utils import GoldenCase, assert_close, cases
from torchrl_amago.compat.kinds import PartDescription, kind_of
from torchrl_amago.modules import ACTORS, SEQ_MODELS, TIMESTEP_ENCODERS


def described(case: GoldenCase, part: str) -> tuple[PartDescription, dict[str, torch.Tensor]]:
    """What the weights show, and the weights under our names."""
    theirs = case.starting("w/")
    kind = kind_of(part, theirs)
    weights = kind.translator(theirs)(theirs)
    return kind.measure(weights), weights


def filled(module: nn.Module, weights: dict[str, torch.Tensor]) -> nn.Module:
    module.load_state_dict(weights)
    return module.eval()


@pytest.mark.parametrize("case", cases("modules/traj_*"), ids=str)
def test_trajectory_encoders(case):
    hp = case.hyperparameters
    description, weights = described(case, "traj_encoder")
    unseen = {"activation": hp["activation"]} if "activation" in hp else {}
    if hp.get("pos_emb") == "rope":
        unseen["positions"] = "rotary"
    context = hp.get("max_seq_len", 32)
    encoder = SEQ_MODELS[description.kind](
        description.input_size, context_length=context, **description.options, **unseen
    )
    filled(encoder, weights)
    assert description.output_size == encoder.output_size
    is_window = description.kind == "transformer"
    x = case["in/seq"][:, :context] if is_window else case["in/seq"]
    td = TensorDict(timestep=x, batch_size=x.shape[:2])
    td["time_idx"] = (
        case["in/time_idxs"][:, :context]
        if is_window
        else torch.zeros(*x.shape[:2], 1, dtype=torch.int64)
    )
    with set_recurrent_mode(True):
        state = encoder(td)["state"]
    assert_close(state, case["out/full_first_ctx" if is_window else "out"])


@pytest.mark.parametrize("case", cases("modules/tstep_*"), ids=str)
def test_timestep_encoders(case):
    hp = case.hyperparameters
    description, weights = described(case, "tstep_encoder")
    reward, action = case["in/rl2s"].split((1, hp["rl2_dim"] - 1), -1)
    inputs = {key: case[f"in/obs_{key}"] for key in sorted(case.starting("in/obs_"))}
    inputs |= {"prev_reward": reward, "prev_action": action}
    shapes = {key: tuple(value.shape[2:]) for key, value in inputs.items()}
    unseen = {"activation": hp["activation"]} if "activation" in hp else {}
    if hp.get("hide_rl2s"):
        unseen["hide_prev_step"] = True
    if hp.get("channels_first"):
        unseen["channels_first"] = True
    if not hp.get("normalize_inputs", True):
        unseen["normalize_inputs"] = False
        weights = {n: v for n, v in weights.items() if not n.startswith("input_norm.")}
    encoder = TIMESTEP_ENCODERS[description.kind](shapes, **description.options, **unseen)
    filled(encoder, weights)
    td = TensorDict(inputs, batch_size=reward.shape[:2])
    assert_close(encoder(td)["timestep"], case["out/eval" if "out/eval" in case else "out"])


@pytest.mark.parametrize("case", cases("modules/actor_*", "modules/residual_actor_*"), ids=str)
def test_actors(case):
    hp = case.hyperparameters
    description, weights = described(case, "actor")
    num_discounts = len(hp["gammas"])
    unseen = {"activation": hp["activation"]} if "activation" in hp else {}
    actor = ACTORS[description.kind](
        description.input_size,
        description.output_size // num_discounts,
        num_discounts,
        **description.options,
        **unseen,
    )
    filled(actor, weights)
    assert_close(actor(case["in/state"]), case["out/dist_params"])


def test_convolutions_unlike_any_trunk_show_channels_and_kernels():
    theirs = {
        "cnn.conv1.weight": torch.zeros(8, 3, 5, 5),
        "cnn.conv2.weight": torch.zeros(9, 8, 3, 3),
        "img_features.weight": torch.zeros(4, 36),
        "rl2_features.weight": torch.zeros(2, 6),
        "merge.weight": torch.zeros(7, 6),
    }
    kind = kind_of("tstep_encoder", theirs)
    assert kind.measure(kind.translate(theirs)) == PartDescription(
        "cnn",
        {
            "trunk": "nature",
            "trunk_options": {"channels": (8, 9), "kernels": (5, 3)},
            "image_features": 4,
            "vector_features": 2,
            "output_size": 7,
        },
        input_size=6,
        output_size=7,
    )


def test_a_name_that_no_kind_has():
    theirs = {"tformer.layers.0.attention_layer.head_scaler": torch.ones(1, 1, 2, 1)}
    kind = kind_of("traj_encoder", theirs)
    with pytest.raises(KeyError, match="norm9"):
        kind.translator(theirs)({"tformer.layers.0.norm9.norm.weight": torch.ones(4)})
