"""Rename rules from AMAGO's weights to ours, one table for each of our modules.

Legend: C critics, G discounts, H heads, A size of a head.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor, nn

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

# Pattern at the start of AMAGO's name -> its replacement.
_Rules = Mapping[str, str | Callable[[re.Match[str]], str]]


def _after_first(ours: str) -> Callable[[re.Match[str]], str]:
    """Return a replacement for AMAGO's further layers, which it counts from 0 after the first."""
    return lambda match: f"{ours}.{int(match[1]) + 1}."


def _mlp(theirs: str, ours: str) -> _Rules:
    return {
        rf"{theirs}\.in_layer\.": f"{ours}.hidden.0.",
        rf"{theirs}\.in_norm\.norm\.": f"{ours}.norms.0.",
        rf"{theirs}\.layers\.(\d+)\.": _after_first(f"{ours}.hidden"),
        rf"{theirs}\.norms\.(\d+)\.norm\.": _after_first(f"{ours}.norms"),
        rf"{theirs}\.out_layer\.": f"{ours}.out.",
    }


_OUT_NORM = {r"out_norm\.norm\.": "out_norm."}
_CONVOLUTIONS = "embeddings.0.trunk."
_IMPALA_LAYERS = {"conv": 0, "residual1": 2, "residual2": 3}  # of the four in a section
_BLOCK = r"tformer\.layers\.(\d+)\."
_FF_BLOCK = r"traj_blocks\.(\d+)\."

_RULES: dict[type[nn.Module], _Rules] = {
    MLPTimestepEncoder: {
        r"in_norm\._t$": "input_norm.t",
        r"in_norm\.(mu|nu)$": r"input_norm.\1",
        **_mlp("base", "mlp"),
        **_OUT_NORM,
    },
    CNNTimestepEncoder: {
        r"cnn\.conv(\d+)\.": lambda m: f"{_CONVOLUTIONS}{2 * int(m[1]) - 2}.",
        r"cnn\.blocks\.(\d+)\.(conv|residual1|residual2)\.": lambda m: (
            f"{_CONVOLUTIONS}layers.{4 * int(m[1]) + _IMPALA_LAYERS[m[2]]}."
        ),
        r"img_features\.": "embeddings.0.features.",
        r"rl2_features\.": "vectors.",
        r"merge\.": "merge.",
        **_OUT_NORM,
    },
    TransformerEncoder: {
        r"tformer\.inp\.": "embed.",
        r"tformer\.position_embedding\.embeddings\.": "position_table.",
        r"tformer\.norm\.norm\.": "norm.",
        _BLOCK + r"attention_layer\.head_scaler$": r"blocks.\1.head_scale",
        _BLOCK + r"attention_layer\.qkv_projection\.": r"blocks.\1.qkv.",
        _BLOCK + r"attention_layer\.out_projection\.": r"blocks.\1.attention_out.",
        _BLOCK + r"norm1\.norm\.": r"blocks.\1.norm_attention.",
        _BLOCK + r"norm2\.norm\.": r"blocks.\1.norm_attention_out.",
        _BLOCK + r"norm3\.norm\.": r"blocks.\1.norm_ff.",
        _BLOCK + r"norm4\.norm\.": r"blocks.\1.norm_ff_hidden.",
        _BLOCK + r"ff1\.": r"blocks.\1.ff_in.",
        _BLOCK + r"ff2\.": r"blocks.\1.ff_out.",
    },
    GRUEncoder: {r"rnn\.": "rnn.", r"out\.": "out.", **_OUT_NORM},
    FeedForwardEncoder: {
        r"traj_emb\.": "embed.",
        r"traj_last\.": "out.",
        _FF_BLOCK + r"ff1\.": r"blocks.\1.ff_in.",
        _FF_BLOCK + r"ff2\.": r"blocks.\1.ff_out.",
        _FF_BLOCK + r"norm1\.norm\.": r"blocks.\1.norm_in.",
        _FF_BLOCK + r"norm2\.norm\.": r"blocks.\1.norm_out.",
        **_OUT_NORM,
    },
    MambaEncoder: {
        r"inp\.": "embed.",
        r"mambas\.(\d+)\.norm\.norm\.": r"norms.\1.",
        r"mambas\.(\d+)\.mamba\.": r"blocks.\1.",
        r"out_norm\.norm\.": "norm.",
    },
    IdentityEncoder: {},
    Actor: _mlp("base", "mlp"),
    ResidualActor: {
        r"residual_blocks\.(\d+)\.([03])\.": r"blocks.\1.\2.",
        r"residual_blocks\.(\d+)\.([14])\.norm\.": r"blocks.\1.\2.",
        r"out\.": "out.",
        **_mlp("inp", "embed"),
    },
    CriticEnsemble: {
        r"net\.inp_layer\.": "hidden.0.",
        r"net\.core_layers\.(\d+)\.": _after_first("hidden"),
        r"net\.output_layer\.": "out.",
    },
    PopArt: {r"mu$": "mu", r"nu$": "nu", r"w$": "weight", r"b$": "bias", r"_t$": "count"},
}


def translate(
    name: str, value: Tensor, module: type[nn.Module], num_heads: int = 1
) -> tuple[str | None, Tensor]:
    """Return one weight of a module under our name (None if no rule fits) and in our layout.

    Shapes that AMAGO does not write stay as they are.
    """
    rules = next((_RULES[base] for base in module.__mro__ if base in _RULES), {})
    renamed = (re.subn("^" + pattern, ours, name) for pattern, ours in rules.items())
    ours = next((ours for ours, count in renamed if count), None)
    if ours is None:
        return None, value
    if ours.endswith(".head_scale"):  # [1, 1, H, 1]
        return ours, value.reshape(-1, 1)
    if ours.endswith((".qkv.weight", ".qkv.u")) and len(value) % (3 * num_heads) == 0:
        # Rows [3, A, H] become [3, H, A].
        return ours, value.unflatten(0, (3, -1, num_heads)).transpose(1, 2).flatten(0, 2)
    if issubclass(module, CriticEnsemble) and ours.endswith("bias"):  # [1, 1, C, n]
        return ours, value.squeeze(0).squeeze(0)
    if issubclass(module, PopArt):  # [G, 1]; the count is G times the same
        return ours, value.flatten()[0] if ours == "count" else value.squeeze(-1)
    return ours, value
