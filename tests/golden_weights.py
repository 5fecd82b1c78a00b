"""The reference's weights (or gradients, or buffers) in a recorded case, under our names."""

from __future__ import annotations

from torch import Tensor, nn

from tests.golden_utils import GoldenCase
from torchrl_amago.compat._rename import translate
from torchrl_amago.modules import (
    Actor,
    GRUEncoder,
    MLPTimestepEncoder,
    PopArt,
    ResidualActor,
    TransformerEncoder,
)
from torchrl_amago.modules.critic import CriticEnsemble


def renamed(
    case: GoldenCase, prefix: str, module: type[nn.Module], num_heads: int = 1
) -> dict[str, Tensor]:
    """Entries of a case that start with a prefix, translated for a class of ours."""
    weights = case.starting(prefix).items()
    ours = dict(translate(name, value, module, num_heads) for name, value in weights)
    assert None not in ours, f"{case} has weights under {prefix} that {module} has no place for"
    assert len(ours) == len(weights)
    return ours


def encoder_weights(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """Timestep encoder and Transformer or GRU, as parts 0 and 1 of a sequence."""
    timestep = renamed(case, f"{prefix}tstep_encoder.", MLPTimestepEncoder)
    if case.hyperparameters["encoder"] == "gru":
        trajectory = renamed(case, f"{prefix}traj_encoder.", GRUEncoder)
    else:
        heads = case.hyperparameters["traj"]["n_heads"]
        trajectory = renamed(case, f"{prefix}traj_encoder.", TransformerEncoder, heads)
    return _inside("module.0", timestep) | _inside("module.1", trajectory)


def actor_weights(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """MLP actor head inside a TensorDictModule."""
    return _inside("module", renamed(case, prefix, Actor))


def residual_actor_weights(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """Residual actor head inside a TensorDictModule."""
    return _inside("module", renamed(case, prefix, ResidualActor))


def critic_weights(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """Critic ensemble inside a TensorDictModule."""
    return _inside("module", renamed(case, prefix, CriticEnsemble))


def popart_buffers(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """PopArt's statistics."""
    return renamed(case, prefix, PopArt)


def _inside(module: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{name}": value for name, value in weights.items()}
