"""The reference's weights (or gradients, or buffers) of encoders and heads under our names."""

from __future__ import annotations

from torch import Tensor

from tests.golden_utils import GoldenCase, transformer_weights


def _mlp_name(name: str) -> str:
    """`in_layer.weight` -> `hidden.0.weight`, `layers.0.bias` -> `hidden.1.bias`, and so on."""
    head, rest = name.split(".", 1)
    if head in ("in_layer", "inp_layer"):
        return f"hidden.0.{rest}"
    if head == "in_norm":
        return f"norms.0.{rest.removeprefix('norm.')}"
    if head in ("layers", "core_layers"):
        index, leaf = rest.split(".", 1)
        return f"hidden.{int(index) + 1}.{leaf}"
    if head == "norms":
        index, leaf = rest.split(".", 1)
        return f"norms.{int(index) + 1}.{leaf.removeprefix('norm.')}"
    assert head in ("out_layer", "output_layer"), name
    return f"out.{rest}"


def timestep_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """MLP timestep encoder."""
    renamed = {}
    for name, value in weights.items():
        part, rest = name.split(".", 1)
        if part == "in_norm":
            renamed[f"input_norm.{rest.lstrip('_')}"] = value
        elif part == "out_norm":
            renamed[f"out_norm.{rest.removeprefix('norm.')}"] = value
        else:
            renamed[f"mlp.{_mlp_name(rest)}"] = value
    return renamed


def cnn_timestep_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """CNN timestep encoder: convolutions in a row, or IMPALA's blocks of four layers."""
    parts = {"img_features": "embeddings.0.features", "rl2_features": "vectors", "merge": "merge"}
    layer_of = {"conv": 0, "residual1": 2, "residual2": 3}
    renamed = {}
    for name, value in weights.items():
        part, rest = name.split(".", 1)
        if part == "out_norm":
            name = f"out_norm.{rest.removeprefix('norm.')}"
        elif part in parts:
            name = f"{parts[part]}.{rest}"
        elif rest.startswith("blocks."):
            _, block, layer, leaf = rest.split(".", 3)
            name = f"embeddings.0.trunk.layers.{4 * int(block) + layer_of[layer]}.{leaf}"
        else:
            layer, leaf = rest.split(".", 1)
            name = f"embeddings.0.trunk.{2 * int(layer.removeprefix('conv')) - 2}.{leaf}"
        renamed[name] = value
    return renamed


def encoder_weights(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """Timestep encoder and Transformer or GRU, as parts 0 and 1 of a sequence."""
    timestep = timestep_weights(case.starting(f"{prefix}tstep_encoder."))
    trajectory = case.starting(f"{prefix}traj_encoder.")
    if case.hyperparameters["encoder"] == "gru":
        trajectory = recurrent_weights(trajectory)
    else:
        trajectory = transformer_weights(trajectory, case.hyperparameters["traj"]["n_heads"])
    return {f"module.0.{n}": v for n, v in timestep.items()} | {
        f"module.1.{n}": v for n, v in trajectory.items()
    }


def actor_weights(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """MLP actor head inside a TensorDictModule."""
    named = case.starting(f"{prefix}base.")
    return {f"module.mlp.{_mlp_name(name)}": value for name, value in named.items()}


def residual_actor_weights(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """Residual actor head inside a TensorDictModule."""
    renamed = {}
    for name, value in case.starting(prefix).items():
        part, rest = name.split(".", 1)
        if part == "inp":
            name = f"embed.{_mlp_name(rest)}"
        elif part == "residual_blocks":
            name = f"blocks.{rest.replace('norm.', '')}"
        renamed[f"module.{name}"] = value
    return renamed


def critic_weights(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """Critic ensemble inside a TensorDictModule."""
    named = case.starting(f"{prefix}net.")
    return {
        f"module.{_mlp_name(name)}": value.squeeze(0).squeeze(0) if name.endswith("bias") else value
        for name, value in named.items()
    }


def popart_buffers(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """PopArt's statistics; the count is one number here, the same for every discount."""
    names = {"mu": "mu", "nu": "nu", "w": "weight", "b": "bias", "_t": "count"}
    named = {names[name]: value.squeeze(-1) for name, value in case.starting(prefix).items()}
    if "count" in named:
        assert (named["count"] == named["count"][0]).all()
        named["count"] = named["count"][0]
    return named


def feedforward_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Feed-forward trajectory encoder."""
    names = {
        "traj_emb.": "embed.",
        "traj_blocks.": "blocks.",
        "traj_last.": "out.",
        "out_norm.norm.": "out_norm.",
        "ff1.": "ff_in.",
        "ff2.": "ff_out.",
        "norm1.norm.": "norm_in.",
        "norm2.norm.": "norm_out.",
    }
    renamed = {}
    for name, value in weights.items():
        for theirs, ours in names.items():
            name = name.replace(theirs, ours)
        renamed[name] = value
    return renamed


def recurrent_weights(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """GRU trajectory encoder."""
    return {name.replace("out_norm.norm.", "out_norm."): value for name, value in weights.items()}
