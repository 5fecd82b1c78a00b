"""The reference's weights (or gradients, or buffers) in a recorded case, under our names."""

from __future__ import annotations

from torch import Tensor

from tests.golden_utils import GoldenCase
from torchrl_amago.compat import weights as compat


def encoder_weights(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """Timestep encoder and Transformer or GRU, as parts 0 and 1 of a sequence."""
    timestep = compat.mlp_timestep_encoder(case.starting(f"{prefix}tstep_encoder."))
    trajectory = case.starting(f"{prefix}traj_encoder.")
    if case.hyperparameters["encoder"] == "gru":
        trajectory = compat.gru_encoder(trajectory)
    else:
        trajectory = compat.transformer_encoder(trajectory, case.hyperparameters["traj"]["n_heads"])
    return _inside("module.0", timestep) | _inside("module.1", trajectory)


def actor_weights(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """MLP actor head inside a TensorDictModule."""
    return _inside("module", compat.actor(case.starting(prefix)))


def residual_actor_weights(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """Residual actor head inside a TensorDictModule."""
    return _inside("module", compat.residual_actor(case.starting(prefix)))


def critic_weights(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """Critic ensemble inside a TensorDictModule."""
    return _inside("module", compat.critic(case.starting(prefix)))


def popart_buffers(case: GoldenCase, prefix: str) -> dict[str, Tensor]:
    """PopArt's statistics."""
    return compat.popart(case.starting(prefix))


def _inside(module: str, weights: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{module}.{name}": value for name, value in weights.items()}
