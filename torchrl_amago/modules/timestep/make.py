"""Timestep encoders by name, for an environment's observations."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tensordict import NestedKey
from torchrl.data import TensorSpec
from torchrl.envs import EnvBase

from torchrl_amago import keys
from torchrl_amago._validation import pick
from torchrl_amago.modules.timestep import combined
from torchrl_amago.modules.timestep.base import TimestepEncoder
from torchrl_amago.modules.timestep.mlp import MLPTimestepEncoder

TIMESTEP_ENCODERS: dict[str, type[TimestepEncoder]] = {
    "mlp": MLPTimestepEncoder,
    "cnn": combined.CNNTimestepEncoder,
    "combined": combined.CombinedTimestepEncoder,
}
"""Timestep encoders by name; each is built by its ``from_specs(specs, **options)``."""

# Bookkeeping of the trial: read only if obs_keys names it.
_BOOKKEEPING = {
    *(keys.TIME_IDX, keys.IS_INIT, keys.EPISODE_IDX, keys.EPISODE_RETURN),
    *(keys.EPISODE_SUCCESS, keys.TASK_ID),
}


def make_timestep_encoder(
    env: EnvBase,
    encoder: str | type[TimestepEncoder] | Callable[..., TimestepEncoder] = "auto",
    *,
    obs_keys: Sequence[NestedKey] | None = None,
    **options: Any,
) -> TimestepEncoder:
    """Build a timestep encoder that fits an environment's observations.

    Args:
        env: environment with trial and previous-step transforms.
        encoder: a name of :data:`TIMESTEP_ENCODERS`, a class (built by its ``from_specs``), or a
            function called with ``(specs, **options)``; ``auto`` combines categories with vectors.
        obs_keys: entries to read besides the previous step; default all observations but the
            trial's bookkeeping, sorted by name.
        options: further arguments of the encoder.

    Raises:
        KeyError: if the environment lacks an entry.

    Example:
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> make_timestep_encoder(env, "combined", output_size=8)(env.reset())["timestep"].shape
        torch.Size([2, 8])
    """
    specs = observation_specs(env, obs_keys)
    if encoder == "auto":
        kinds = {combined.default_kind(spec) for spec in specs.values()}
        encoder = "combined" if kinds & {"category", "grid"} and "image" not in kinds else "mlp"
    encoder = pick("timestep_encoder", encoder, TIMESTEP_ENCODERS, "Or use 'auto'.")
    build = encoder.from_specs if isinstance(encoder, type) else encoder
    return build(specs, **options)


def observation_specs(
    env: EnvBase, obs_keys: Sequence[NestedKey] | None = None
) -> dict[NestedKey, TensorSpec]:
    """Return specs of one step of what :func:`make_timestep_encoder` reads, in order."""
    spec = env.observation_spec_unbatched
    available = list(spec.keys(True, True))
    if obs_keys is None:
        skip = _BOOKKEEPING | {keys.PREV_ACTION, keys.PREV_REWARD}
        names = [k for k in available if k not in skip and not str(k).startswith("_")]
        obs_keys = sorted(names, key=str)
    wanted = [*obs_keys, keys.PREV_REWARD, keys.PREV_ACTION]
    if missing := [key for key in wanted if key not in available]:
        raise KeyError(
            f"the policy reads {wanted}, but {missing} are not among the environment's "
            f"observations {available}. Use make_trial_env, or choose obs_keys."
        )
    return {key: spec[key] for key in wanted}
