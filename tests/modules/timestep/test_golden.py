"""Timestep encoders against recorded numbers."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from tensordict import TensorDict
from torchrl.modules import set_recurrent_mode

from tests.golden_utils import GoldenCase, assert_close, cases
from tests.golden_weights import renamed
from torchrl_amago.modules import CNNTimestepEncoder, MLPTimestepEncoder

NORMS = {None: "none", "layer": "layer", "rmsnorm": "rms"}
TRUNKS = {
    "NatureishCNN": "nature",
    "IMPALAishCNN": "impala",
    "DrQCNN": "drq",
    "GridworldCNN": "grid",
}


def make_inputs(case: GoldenCase) -> TensorDict:
    """Observations, then the previous reward and action, as they were recorded."""
    inputs = {key: case[f"in/obs_{key}"] for key in sorted(case.starting("in/obs_"))}
    reward, action = case["in/rl2s"].split((1, case.hyperparameters["rl2_dim"] - 1), -1)
    return TensorDict(
        inputs | {"prev_reward": reward, "prev_action": action}, batch_size=reward.shape[:2]
    )


def make_shapes(inputs: TensorDict) -> dict[str, tuple[int, ...]]:
    return {key: tuple(value.shape[2:]) for key, value in inputs.items()}


@pytest.mark.parametrize("case", cases("modules/tstep_ff_*"), ids=str)
@pytest.mark.parametrize("training", [False, True])
def test_mlp(case, training):
    hp, inputs = case.hyperparameters, make_inputs(case)
    encoder = MLPTimestepEncoder(
        make_shapes(inputs),
        hidden_size=hp["d_hidden"],
        num_layers=hp.get("n_layers", 2),
        output_size=hp["d_output"],
        activation=hp.get("activation", "leaky_relu"),
        norm=NORMS[hp.get("norm")],
        out_norm=NORMS[hp.get("out_norm", "layer")],
        normalize_inputs=hp.get("normalize_inputs", True),
        hide_prev_step=hp.get("hide_rl2s", False),
    )
    weights = renamed(case, "w/", MLPTimestepEncoder)
    if encoder.input_norm is None:
        weights = {n: v for n, v in weights.items() if not n.startswith("input_norm")}
    encoder.load_state_dict(weights)
    encoder.train(training)
    with set_recurrent_mode(True) if training else nullcontext():
        out = encoder(inputs)["timestep"]
    assert_close(out, case["out/train" if training else "out/eval"])
    if training and encoder.input_norm is not None:
        for name, value in renamed(case, "after_train/", MLPTimestepEncoder).items():
            assert_close(encoder.get_buffer(name), value, msg=name)


@pytest.mark.parametrize("case", cases("modules/tstep_cnn_*"), ids=str)
def test_cnn(case):
    hp, inputs = case.hyperparameters, make_inputs(case)
    trunk_options = {}
    if "cnn_block_depths" in hp:
        trunk_options["channels"] = hp["cnn_block_depths"]
    if not hp.get("post_group_norm", True):
        trunk_options["num_groups"] = None
    encoder = CNNTimestepEncoder(
        make_shapes(inputs),
        trunk=TRUNKS[hp["cnn"]],
        trunk_options=trunk_options,
        channels_first=hp.get("channels_first", False),
        image_features=hp["img_features"],
        vector_features=hp["rl2_features"],
        output_size=hp["d_output"],
    )
    encoder.load_state_dict(renamed(case, "w/", CNNTimestepEncoder))
    assert_close(encoder(inputs)["timestep"], case["out"])
    if "out/cnn_features" in case:
        image = encoder.embeddings[0]
        pixels = inputs["observation"].flatten(0, 1).float() / 128 - 1
        if not image.channels_first:
            pixels = pixels.movedim(-1, 1)
        with torch.no_grad():
            features = image.trunk(pixels).flatten(1)
        assert_close(features, case["out/cnn_features"].flatten(0, 1))
