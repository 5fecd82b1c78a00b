"""Kinds of modules that AMAGO's agents are made of: how each is recognised, translated, measured.

Modules are told apart by names that only they have; sizes are read off shapes. Measuring works on our
names, so that our own modules can be measured as well and differences be named.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from torchrl_amago.compat import weights as translate
from torchrl_amago.compat.weights import Weights
from torchrl_amago.modules import (
    Actor,
    CNNTimestepEncoder,
    FeedForwardEncoder,
    GRUEncoder,
    IdentityEncoder,
    MambaEncoder,
    MLPTimestepEncoder,
    PopArt,
    ResidualActor,
    TransformerEncoder,
)
from torchrl_amago.modules.critic import CriticEnsemble
from torchrl_amago.modules.timestep.vision import TRUNKS


@dataclass(frozen=True)
class PartDescription:
    """One network: what :func:`~torchrl_amago.make_policy` calls it, and the sizes it was built with.

    Args:
        kind: its name for our builder.
        options: arguments that its weights show. A norm without weights isn't among them.
        input_size: how many numbers it reads in each step, an image aside.
        output_size: how many it writes.

    Example:
        >>> PartDescription("gru", {"d_model": 8}, input_size=4, output_size=8).options
        {'d_model': 8}
    """

    kind: str
    options: dict[str, Any]
    input_size: int
    output_size: int


def part_of(weights: Mapping[str, Tensor], part: str) -> Weights:
    """The weights of one of an agent's networks, without its name.

    Example:
        >>> part_of({"actor.a": 1, "critics.b": 2}, "actor")
        {'a': 1}
    """
    prefix = f"{part}."
    return {n.removeprefix(prefix): v for n, v in weights.items() if n.startswith(prefix)}


@dataclass(frozen=True)
class Kind:
    """One kind of module: how to recognise it there and here, translate it, measure it.

    Args:
        name: ours.
        marker: how some names begin that only this kind has; empty if it has no weights.
        module: our class.
        translate: AMAGO's names and layouts to ours.
        measure: sizes, from weights under our names.

    Example:
        >>> kind_of("traj_encoder", {"rnn.weight_hh_l0": None}).name
        'gru'
    """

    name: str
    marker: str
    module: type[nn.Module]
    translate: Callable[..., Weights]
    measure: Callable[[Weights], PartDescription]

    def translator(self, theirs: Mapping[str, Tensor]) -> Callable[[Weights], Weights]:
        """`translate` for single weights of a module, knowing what only the whole module shows."""
        if self.translate is not translate.transformer_encoder:
            return self.translate
        scales = [value for name, value in theirs.items() if name.endswith("head_scaler")]
        if not scales:
            raise ValueError(
                "a Transformer of AMAGO shows its number of heads by each layer's head_scaler, but "
                f"there is none among {sorted(theirs)[:5]}, .... Give the agent's whole state dict."
            )
        return partial(self.translate, num_heads=scales[0].numel())


def kind_of(part: str, theirs: Mapping[str, Tensor]) -> Kind:
    """Which kind of module AMAGO's weights of a part belong to.

    Raises:
        ValueError: if it is none of those that exist here.
    """
    for kind in KINDS[part]:
        if any(n.startswith(kind.marker) for n in theirs) if kind.marker else not theirs:
            return kind
    if not theirs:
        raise ValueError(
            f"there are no weights of AMAGO's {part}. Give the agent's whole state dict, or leave out "
            "the loss to fill a policy alone."
        )
    raise ValueError(
        f"AMAGO's {part} must be one of {[kind.name for kind in KINDS[part]]}, but its weights are "
        f"{sorted(theirs)[:5]}. A network of your own has to be written here as well, and its weights "
        "loaded by hand."
    )


def _linear(weights: Weights, name: str) -> tuple[int, int]:
    """Input and output size."""
    size_out, size_in = weights[f"{name}.weight"].shape
    return size_in, size_out


def _count(weights: Weights, pattern: str) -> int:
    """How many layers of a list there are; the pattern's group is their index."""
    return len({match[1] for name in weights if (match := re.match(pattern, name))})


def _norms(weights: Weights, **names: str) -> dict[str, str]:
    """Kinds of norms, as far as they have weights."""
    kinds = {"scale": "rms", "weight": "layer"}
    return {
        option: kind
        for option, name in names.items()
        for leaf, kind in kinds.items()
        if f"{name}.{leaf}" in weights
    }


def _mlp_timestep_encoder(weights: Weights) -> PartDescription:
    input_size, hidden_size = _linear(weights, "mlp.hidden.0")
    output_size = _linear(weights, "mlp.out")[1]
    options = {
        "hidden_size": hidden_size,
        "num_layers": _count(weights, r"mlp\.hidden\.(\d+)"),
        "output_size": output_size,
        **_norms(weights, norm="mlp.norms.0", out_norm="out_norm"),
    }
    return PartDescription("mlp", options, input_size, output_size)


def _cnn_timestep_encoder(weights: Weights) -> PartDescription:
    input_size, vector_features = _linear(weights, "vectors")
    output_size = _linear(weights, "merge")[1]
    options = {
        **_trunk(weights, "embeddings.0.trunk."),
        "image_features": _linear(weights, "embeddings.0.features")[1],
        "vector_features": vector_features,
        "output_size": output_size,
        **_norms(weights, out_norm="out_norm"),
    }
    return PartDescription("cnn", options, input_size, output_size)


def _trunk(weights: Weights, prefix: str) -> dict[str, Any]:
    convolutions = {
        int(match[1]): value
        for name, value in weights.items()
        if (match := re.fullmatch(re.escape(prefix) + r"(?:layers\.)?(\d+)\.weight", name))
    }
    shapes = [convolutions[index].shape for index in sorted(convolutions)]
    channels = tuple(shape[0] for shape in shapes)
    if any(name.startswith(f"{prefix}layers.") for name in weights):
        num_groups = 4 if f"{prefix}layers.2.norm.weight" in weights else None  # AMAGO's number
        return {"trunk": "impala", "trunk_options": dict(channels=channels, num_groups=num_groups)}
    kernels = tuple(shape[-1] for shape in shapes)
    known = {name: trunk.keywords["kernels"] for name, trunk in TRUNKS.items() if name != "impala"}
    name = next((name for name, usual in known.items() if usual == kernels), "nature")
    return {"trunk": name, "trunk_options": dict(channels=channels, kernels=kernels)}


def _transformer_encoder(weights: Weights) -> PartDescription:
    input_size, d_model = _linear(weights, "embed")
    options = {
        "d_model": d_model,
        "d_ff": _linear(weights, "blocks.0.ff_in")[1],
        "num_layers": _count(weights, r"blocks\.(\d+)"),
        "sigma_reparam": "blocks.0.qkv.gamma" in weights,
        **_norms(weights, norm="norm"),
    }
    if "blocks.0.head_scale" in weights:
        options["num_heads"] = weights["blocks.0.head_scale"].numel()
    if "norm" in options:
        options["normformer"] = bool(_norms(weights, norm="blocks.0.norm_attention_out"))
    if "position_table.weight" in weights:
        options |= {
            "positions": "learned",
            "max_positions": len(weights["position_table.weight"]),
        }
    return PartDescription("transformer", options, input_size, d_model)


def _gru_encoder(weights: Weights) -> PartDescription:
    hidden_size, d_model = _linear(weights, "out")
    options = {
        "d_model": d_model,
        "hidden_size": hidden_size,
        "num_layers": _count(weights, r"rnn\.weight_hh_l(\d+)"),
        **_norms(weights, out_norm="out_norm"),
    }
    return PartDescription("gru", options, weights["rnn.weight_ih_l0"].shape[1], d_model)


def _feedforward_encoder(weights: Weights) -> PartDescription:
    input_size, d_model = _linear(weights, "embed")
    options = {"d_model": d_model, "num_layers": _count(weights, r"blocks\.(\d+)")}
    if options["num_layers"]:
        options["d_ff"] = _linear(weights, "blocks.0.ff_in")[1]
    options |= _norms(weights, norm="blocks.0.norm_in", out_norm="out_norm")
    return PartDescription("feedforward", options, input_size, d_model)


def _mamba_encoder(weights: Weights) -> PartDescription:
    input_size, d_model = _linear(weights, "embed")
    d_inner, d_state = weights["blocks.0.A_log"].shape
    options = {
        "d_model": d_model,
        "d_state": d_state,
        "d_conv": weights["blocks.0.conv1d.weight"].shape[-1],
        "expand": d_inner // d_model,
        "num_layers": _count(weights, r"blocks\.(\d+)"),
        **_norms(weights, norm="norm"),
    }
    return PartDescription("mamba", options, input_size, d_model)


def _actor(weights: Weights) -> PartDescription:
    input_size, hidden_size = _linear(weights, "mlp.hidden.0")
    options = {
        "hidden_size": hidden_size,
        "num_layers": _count(weights, r"mlp\.hidden\.(\d+)"),
    }
    return PartDescription("mlp", options, input_size, _linear(weights, "mlp.out")[1])


def _residual_actor(weights: Weights) -> PartDescription:
    options = {
        "feature_size": _linear(weights, "embed.out")[1],
        "residual_size": _linear(weights, "blocks.0.0")[1],
        "num_blocks": _count(weights, r"blocks\.(\d+)"),
        **_norms(weights, norm="blocks.0.1"),
    }
    input_size, output_size = _linear(weights, "embed.hidden.0")[0], _linear(weights, "out")[1]
    return PartDescription("residual", options, input_size, output_size)


def _critic(weights: Weights) -> PartDescription:
    num_critics, input_size, hidden_size = weights["hidden.0.weight"].shape
    options = {
        "num_critics": num_critics,
        "hidden_size": hidden_size,
        "num_layers": _count(weights, r"hidden\.(\d+)"),
    }
    return PartDescription("ensemble", options, input_size, weights["out.weight"].shape[-1])


def _popart(weights: Weights) -> PartDescription:
    return PartDescription("popart", {}, len(weights["mu"]), len(weights["mu"]))


def _identity(weights: Weights) -> PartDescription:
    return PartDescription("identity", {}, 0, 0)


_ACTORS = (
    Kind("mlp", "base.", Actor, translate.actor, _actor),
    Kind("residual", "residual_blocks.", ResidualActor, translate.residual_actor, _residual_actor),
)
_CRITICS = (Kind("ensemble", "net.", CriticEnsemble, translate.critic, _critic),)

KINDS: dict[str, tuple[Kind, ...]] = {
    "tstep_encoder": (
        Kind(
            "mlp",
            "base.",
            MLPTimestepEncoder,
            translate.mlp_timestep_encoder,
            _mlp_timestep_encoder,
        ),
        Kind(
            "cnn",
            "cnn.",
            CNNTimestepEncoder,
            translate.cnn_timestep_encoder,
            _cnn_timestep_encoder,
        ),
    ),
    "traj_encoder": (
        Kind(
            "transformer",
            "tformer.",
            TransformerEncoder,
            translate.transformer_encoder,
            _transformer_encoder,
        ),
        Kind("gru", "rnn.", GRUEncoder, translate.gru_encoder, _gru_encoder),
        Kind(
            "feedforward",
            "traj_",
            FeedForwardEncoder,
            translate.feedforward_encoder,
            _feedforward_encoder,
        ),
        Kind("mamba", "mambas.", MambaEncoder, translate.mamba_encoder, _mamba_encoder),
        Kind("identity", "", IdentityEncoder, translate.identity_encoder, _identity),
    ),
    "actor": _ACTORS,
    "target_actor": _ACTORS,
    "critics": _CRITICS,
    "target_critics": _CRITICS,
    "popart": (Kind("popart", "mu", PopArt, translate.popart, _popart),),
}
"""What an agent's networks may be, by AMAGO's names of these."""
