"""AMAGO's names and layouts of weights, translated: one pure function for each kind of module.

Each takes weights under AMAGO's names, without the prefix of the module, and gives them under ours. It
translates what it is given, so that gradients and parts of a module can be translated as well.

Legend: C critics, G discounts, H heads, A size of a head, D width.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

Weights = dict[str, Tensor]

_Replacement = str | Callable[[re.Match], str]
#: Patterns of AMAGO's names, with what to write in their place.
_Rules = Mapping[str, _Replacement]


def _next_layer(template: str) -> _Replacement:
    """AMAGO keeps the first layer apart and counts the others from 0."""
    return lambda match: template.format(int(match[1]) + 1, *match.groups()[1:])


_MLP: _Rules = {
    r"in_layer\.(\w+)": r"hidden.0.\1",
    r"in_norm\.norm\.(\w+)": r"norms.0.\1",
    r"layers\.(\d+)\.(\w+)": _next_layer("hidden.{}.{}"),
    r"norms\.(\d+)\.norm\.(\w+)": _next_layer("norms.{}.{}"),
    r"out_layer\.(\w+)": r"out.\1",
}
_ENSEMBLE: _Rules = {
    r"net\.inp_layer\.(\w+)": r"hidden.0.\1",
    r"net\.core_layers\.(\d+)\.(\w+)": _next_layer("hidden.{}.{}"),
    r"net\.output_layer\.(\w+)": r"out.\1",
}
_OUT_NORM: _Rules = {r"out_norm\.norm\.(\w+)": r"out_norm.\1"}


def _write(match: re.Match, replacement: _Replacement) -> str:
    return replacement(match) if callable(replacement) else match.expand(replacement)


def _inside(theirs: str, ours: str, rules: _Rules) -> _Rules:
    """The rules of a submodule, for names that begin with its own."""
    return {
        re.escape(theirs) + pattern: lambda match, to=replacement: ours + _write(match, to)
        for pattern, replacement in rules.items()
    }


def _renamed(weights: Mapping[str, Tensor], rules: _Rules) -> Weights:
    renamed = {}
    for name, value in weights.items():
        matches = ((re.fullmatch(pattern, name), to) for pattern, to in rules.items())
        ours = next((_write(match, to) for match, to in matches if match), None)
        if ours is None:
            raise KeyError(f"{name!r} is not a weight of this kind of AMAGO module.")
        renamed[ours] = value
    return renamed


def mlp_timestep_encoder(weights: Mapping[str, Tensor]) -> Weights:
    """``FFTstepEncoder`` -> :class:`~torchrl_amago.modules.MLPTimestepEncoder`.

    Args:
        weights: under AMAGO's names, ``base.in_layer.weight`` and so on.

    Raises:
        KeyError: if a name is not among AMAGO's.

    Example:
        >>> import torch
        >>> list(mlp_timestep_encoder({"base.layers.0.weight": torch.zeros(8, 8)}))
        ['mlp.hidden.1.weight']
    """
    rules: _Rules = {
        r"in_norm\.(mu|nu)": r"input_norm.\1",
        r"in_norm\._t": r"input_norm.t",
        **_inside("base.", "mlp.", _MLP),
        **_OUT_NORM,
    }
    return _renamed(weights, rules)


def cnn_timestep_encoder(weights: Mapping[str, Tensor]) -> Weights:
    """``CNNTstepEncoder`` -> :class:`~torchrl_amago.modules.CNNTimestepEncoder`.

    Its trunk is a row of convolutions, or IMPALA's blocks of four layers.

    Raises:
        KeyError: if a name is not among AMAGO's.

    Example:
        >>> import torch
        >>> list(cnn_timestep_encoder({"cnn.conv2.bias": torch.zeros(8)}))
        ['embeddings.0.trunk.2.bias']
    """
    layer_of = {"conv": 0, "residual1": 2, "residual2": 3}
    trunk = "embeddings.0.trunk."
    rules: _Rules = {
        r"cnn\.conv(\d+)\.(\w+)": lambda m: f"{trunk}{2 * int(m[1]) - 2}.{m[2]}",
        r"cnn\.blocks\.(\d+)\.(conv|residual1|residual2)\.(.+)": lambda m: (
            f"{trunk}layers.{4 * int(m[1]) + layer_of[m[2]]}.{m[3]}"
        ),
        r"img_features\.(\w+)": r"embeddings.0.features.\1",
        r"rl2_features\.(\w+)": r"vectors.\1",
        r"(merge\.\w+)": r"\1",
        **_OUT_NORM,
    }
    return _renamed(weights, rules)


def transformer_encoder(weights: Mapping[str, Tensor], num_heads: int) -> Weights:
    """``TformerTrajEncoder`` -> :class:`~torchrl_amago.modules.TransformerEncoder`.

    AMAGO reads packed projections as ``[3, A, H]``, we as ``[3, H, A]``.

    Args:
        weights: under AMAGO's names, ``tformer.inp.weight`` and so on.
        num_heads: H, which the projections' shapes don't show.

    Raises:
        KeyError: if a name is not among AMAGO's.

    Example:
        >>> import torch
        >>> name = "tformer.layers.0.attention_layer.qkv_projection.weight"
        >>> rows = torch.arange(12.0).unsqueeze(-1)  # 3 x (2 heads of size 2)
        >>> transformer_encoder({name: rows}, num_heads=2)["blocks.0.qkv.weight"].flatten()
        tensor([ 0.,  2.,  1.,  3.,  4.,  6.,  5.,  7.,  8., 10.,  9., 11.])
    """
    layer = r"tformer\.layers\.(\d+)\."
    rules: _Rules = {
        r"tformer\.inp\.(\w+)": r"embed.\1",
        r"tformer\.position_embedding\.embeddings\.(\w+)": r"position_table.\1",
        r"tformer\.norm\.norm\.(\w+)": r"norm.\1",
        layer + r"attention_layer\.head_scaler": r"blocks.\1.head_scale",
        layer + r"attention_layer\.qkv_projection\.(\w+)": r"blocks.\1.qkv.\2",
        layer + r"attention_layer\.out_projection\.(\w+)": r"blocks.\1.attention_out.\2",
        layer + r"norm1\.norm\.(\w+)": r"blocks.\1.norm_attention.\2",
        layer + r"norm2\.norm\.(\w+)": r"blocks.\1.norm_attention_out.\2",
        layer + r"norm3\.norm\.(\w+)": r"blocks.\1.norm_ff.\2",
        layer + r"norm4\.norm\.(\w+)": r"blocks.\1.norm_ff_hidden.\2",
        layer + r"ff1\.(\w+)": r"blocks.\1.ff_in.\2",
        layer + r"ff2\.(\w+)": r"blocks.\1.ff_out.\2",
    }

    def translated(name: str, value: Tensor) -> Tensor:
        if name.endswith("head_scale"):
            return value.reshape(-1, 1)
        if name.endswith((".qkv.weight", ".qkv.u")):
            return value.unflatten(0, (3, -1, num_heads)).transpose(1, 2).flatten(0, 2)
        return value

    return {name: translated(name, value) for name, value in _renamed(weights, rules).items()}


def gru_encoder(weights: Mapping[str, Tensor]) -> Weights:
    """``GRUTrajEncoder`` -> :class:`~torchrl_amago.modules.GRUEncoder`.

    Raises:
        KeyError: if a name is not among AMAGO's.

    Example:
        >>> import torch
        >>> list(gru_encoder({"out_norm.norm.weight": torch.ones(8)}))
        ['out_norm.weight']
    """
    rules = {r"(rnn\.(?:weight|bias)_[ih]h_l\d+|out\.\w+)": r"\1", **_OUT_NORM}
    return _renamed(weights, rules)


def feedforward_encoder(weights: Mapping[str, Tensor]) -> Weights:
    """``FFTrajEncoder`` -> :class:`~torchrl_amago.modules.FeedForwardEncoder`.

    Raises:
        KeyError: if a name is not among AMAGO's.

    Example:
        >>> import torch
        >>> list(feedforward_encoder({"traj_blocks.0.ff1.bias": torch.zeros(8)}))
        ['blocks.0.ff_in.bias']
    """
    block = r"traj_blocks\.(\d+)\."
    rules: _Rules = {
        r"traj_emb\.(\w+)": r"embed.\1",
        r"traj_last\.(\w+)": r"out.\1",
        block + r"ff1\.(\w+)": r"blocks.\1.ff_in.\2",
        block + r"ff2\.(\w+)": r"blocks.\1.ff_out.\2",
        block + r"norm1\.norm\.(\w+)": r"blocks.\1.norm_in.\2",
        block + r"norm2\.norm\.(\w+)": r"blocks.\1.norm_out.\2",
        **_OUT_NORM,
    }
    return _renamed(weights, rules)


def mamba_encoder(weights: Mapping[str, Tensor]) -> Weights:
    """``MambaTrajEncoder`` -> :class:`~torchrl_amago.modules.MambaEncoder`.

    Raises:
        KeyError: if a name is not among AMAGO's.

    Example:
        >>> import torch
        >>> list(mamba_encoder({"mambas.1.mamba.A_log": torch.zeros(8, 4)}))
        ['blocks.1.A_log']
    """
    rules: _Rules = {
        r"inp\.(\w+)": r"embed.\1",
        r"mambas\.(\d+)\.norm\.norm\.(\w+)": r"norms.\1.\2",
        r"mambas\.(\d+)\.mamba\.(.+)": r"blocks.\1.\2",
        r"out_norm\.norm\.(\w+)": r"norm.\1",
    }
    return _renamed(weights, rules)


def identity_encoder(weights: Mapping[str, Tensor]) -> Weights:
    """``IdentityTrajEncoder`` -> :class:`~torchrl_amago.modules.IdentityEncoder`: no weights.

    Raises:
        KeyError: if there is one.

    Example:
        >>> identity_encoder({})
        {}
    """
    return _renamed(weights, {})


def actor(weights: Mapping[str, Tensor]) -> Weights:
    """``Actor`` -> :class:`~torchrl_amago.modules.Actor`.

    Raises:
        KeyError: if a name is not among AMAGO's.

    Example:
        >>> import torch
        >>> list(actor({"base.out_layer.bias": torch.zeros(5)}))
        ['mlp.out.bias']
    """
    return _renamed(weights, _inside("base.", "mlp.", _MLP))


def residual_actor(weights: Mapping[str, Tensor]) -> Weights:
    """``ResidualActor`` -> :class:`~torchrl_amago.modules.ResidualActor`.

    Raises:
        KeyError: if a name is not among AMAGO's.

    Example:
        >>> import torch
        >>> list(residual_actor({"residual_blocks.0.1.norm.weight": torch.ones(8)}))
        ['blocks.0.1.weight']
    """
    rules: _Rules = {
        r"residual_blocks\.(\d+)\.([03])\.(\w+)": r"blocks.\1.\2.\3",
        r"residual_blocks\.(\d+)\.([14])\.norm\.(\w+)": r"blocks.\1.\2.\3",
        r"(out\.\w+)": r"\1",
        **_inside("inp.", "embed.", _MLP),
    }
    return _renamed(weights, rules)


def critic(weights: Mapping[str, Tensor]) -> Weights:
    """``NCritics``, ``NCriticsTwoHot`` -> the critics of :mod:`torchrl_amago.modules.critic`.

    AMAGO's biases are ``[1, 1, C, size]``, ours ``[C, size]``.

    Raises:
        KeyError: if a name is not among AMAGO's.

    Example:
        >>> import torch
        >>> critic({"net.inp_layer.bias": torch.zeros(1, 1, 4, 8)})["hidden.0.bias"].shape
        torch.Size([4, 8])
    """
    return {
        name: value.flatten(0, -2) if name.endswith("bias") else value
        for name, value in _renamed(weights, _ENSEMBLE).items()
    }


def popart(weights: Mapping[str, Tensor]) -> Weights:
    """``PopArtLayer`` -> :class:`~torchrl_amago.modules.PopArt`.

    AMAGO's statistics are ``[G, 1]``, ours ``[G]``; its count of updates is written down G times.

    Raises:
        KeyError: if a name is not among AMAGO's.
        ValueError: if the counts differ, which AMAGO never writes.

    Example:
        >>> import torch
        >>> popart({"_t": torch.full((3, 1), 8.0)})
        {'count': tensor(8.)}
    """
    rules = {"mu": "mu", "nu": "nu", "w": "weight", "b": "bias", "_t": "count"}
    named = {name: value.squeeze(-1) for name, value in _renamed(weights, rules).items()}
    if "count" in named:
        first, *rest = named["count"].unbind()
        if any(other != first for other in rest):
            raise ValueError(
                f"PopArt counts its updates once for all discounts, got {named['count'].tolist()}. "
                "AMAGO doesn't write that: look at where the weights come from."
            )
        named["count"] = first
    return named
