"""Policies and critics assembled from an environment's specs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torchrl.envs import EnvBase

from torchrl_amago import keys
from torchrl_amago._validation import check_choice, pick
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules import trajectory as encoders
from torchrl_amago.modules.actor import Actor, ActorHead, ActorModule, ResidualActor
from torchrl_amago.modules.critic import ActionCritic, DiscreteCritic
from torchrl_amago.modules.distributions import PolicyDistribution, make_distribution
from torchrl_amago.modules.exploration import make_exploration
from torchrl_amago.modules.policy import DISCOUNTS, Encoder, Policy
from torchrl_amago.modules.timestep import TimestepEncoder, make_timestep_encoder
from torchrl_amago.modules.trajectory import TrajectoryEncoder
from torchrl_amago.modules.value_codec import ValueCodec

Preset = Literal["robust", "paper"]
"""One set of choices that learns more tasks, or those that AMAGO publishes."""


def is_robust(preset: Preset) -> bool:
    """Return whether it is the robust preset; ValueError if it is none."""
    check_choice("preset", preset, get_args(Preset))
    return preset == "robust"


SEQ_MODELS: dict[str, Callable[..., TrajectoryEncoder]] = {
    "feedforward": encoders.FeedForwardEncoder,
    "gru": encoders.GRUEncoder,
    "identity": encoders.IdentityEncoder,
    "linear_attention": encoders.GatedLinearAttentionEncoder,
    "lstm": encoders.LSTMEncoder,
    "mamba": encoders.MambaEncoder,
    "transformer": encoders.TransformerEncoder,
}
"""Trajectory encoders by name; each takes ``(input_size, context_length=..., **options)``."""

ACTORS: dict[str, Callable[..., ActorHead]] = {"mlp": Actor, "residual": ResidualActor}
"""Actor heads by name; each takes ``(state_size, num_params, num_discounts, **options)``."""


def make_policy(
    env: EnvBase,
    *,
    context_length: int,
    seq_model: str | Callable[..., TrajectoryEncoder] = "transformer",
    seq_model_options: dict[str, Any] | None = None,
    timestep_encoder: str | Callable[..., TimestepEncoder] | TimestepEncoder = "auto",
    timestep_options: dict[str, Any] | None = None,
    actor: str | Callable[..., ActorHead] = "mlp",
    actor_options: dict[str, Any] | None = None,
    actor_obs_keys: Sequence[NestedKey] = (),
    action_mask_key: NestedKey | None = None,
    distribution: str | PolicyDistribution | None = None,
    distribution_options: dict[str, Any] | None = None,
    exploration: dict[str, Any] | None = None,
    discounts: Sequence[float] = DISCOUNTS,
    obs_keys: Sequence[NestedKey] | None = None,
    preset: Preset = "robust",
    device: torch.device | str | None = None,
) -> Policy:
    """Build a policy that fits an environment with trial and previous-step transforms.

    Args:
        env: environment whose specs describe observations and actions.
        context_length: number of steps that the policy remembers; the length of a trial, or less.
        seq_model: trajectory encoder, by name (:data:`SEQ_MODELS`) or as a class or function called
            with ``(input_size, context_length=..., **seq_model_options)``.
        timestep_encoder: ``mlp``, ``cnn`` (one image), ``combined`` (any observations), ``auto``
            (by these), a finished module, or as in :func:`make_timestep_encoder`.
        actor: actor head, by name (:data:`ACTORS`) or as a class or function called with
            ``(state_size, num_params, num_discounts, **actor_options)``.
        actor_obs_keys: observations that the actor reads besides the state.
        action_mask_key: mask of the allowed discrete actions, bool, one for each category. The
            timestep encoder reads it as well, unless ``obs_keys`` leaves it out.
        distribution: finished, by name (:data:`DISTRIBUTIONS`), or by default the usual one of the
            action space.
        *_options: further arguments of a part that is built here.
        exploration: arguments of :func:`~torchrl_amago.modules.exploration.make_exploration`
            (``horizon`` defaults to ``context_length``); None for no exploration beyond sampling.
        discounts: G discounts, each in (0, 1); the last is acted with.
        obs_keys: entries that a timestep encoder built here reads besides the previous step;
            default all observations but the trial's bookkeeping.
        preset: "robust" normalises the states of a trajectory encoder given by name, "paper" builds
            the published networks; see :func:`~torchrl_amago.make_trainer`.
        device: of the policy; default the environment's. On CUDA a transformer has heads of 64
            features unless `seq_model_options` has a ``num_heads``.

    Returns:
        A :class:`Policy` on that device.

    Raises:
        KeyError: if the environment lacks an entry.
        ValueError: if a part is unknown, or doesn't fit.

    Example:
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> policy = make_policy(env, context_length=45)
        >>> policy(env.reset())["action"].shape
        torch.Size([2])
    """
    space = ActionSpace.from_spec(env.full_action_spec_unbatched[env.action_key])
    if isinstance(distribution, PolicyDistribution):
        _check_unused(distribution, distribution_options=distribution_options)
        if distribution.space != space:
            wrong = f"is over actions of {distribution.space}, the environment's are {space}"
            raise ValueError(f"the distribution {wrong}. Leave it out, or name one.")
    else:
        distribution = make_distribution(space, distribution, **(distribution_options or {}))
    if isinstance(timestep_encoder, TensorDictModuleBase):
        _check_unused(timestep_encoder, timestep_options=timestep_options, obs_keys=obs_keys)
        timestep = timestep_encoder
    else:
        timestep = make_timestep_encoder(
            env, timestep_encoder, obs_keys=obs_keys, **(timestep_options or {})
        )
    device = env.device if device is None else torch.device(device)
    normalizes = is_robust(preset) and isinstance(seq_model, str)
    options = {**({"normalize_states": True} if normalizes else {}), **(seq_model_options or {})}
    if device is not None and device.type == "cuda" and seq_model == "transformer":
        options.setdefault("num_heads", max(1, options.get("d_model", 256) // 64))
    trajectory = pick("seq_model", seq_model, SEQ_MODELS)(
        timestep.output_size, context_length=context_length, **options
    )
    head = pick("actor", actor, ACTORS)(
        trajectory.output_size,
        distribution.num_params,
        len(discounts),
        **_extra_inputs(env, actor_obs_keys, action_mask_key, space),
        **(actor_options or {}),
    )
    mask_keys = [] if action_mask_key is None else [action_mask_key]
    if exploration is not None:
        masked = {} if action_mask_key is None else {"mask_key": action_mask_key}
        exploration = make_exploration(
            space, **{"horizon": context_length, **masked, **exploration}
        )
    policy = Policy(
        Encoder(timestep, trajectory),
        ActorModule(head, [keys.STATE, *actor_obs_keys, *mask_keys], [keys.ACTION_PARAMS]),
        distribution,
        exploration,
        discounts,
    )
    return policy if device is None else policy.to(device)


def make_critic(
    policy: Policy,
    *,
    takes_actions: bool | None = None,
    value_codec: ValueCodec | None = None,
    **options: Any,
) -> TensorDictModule:
    """Build the critic ensemble that goes with a policy.

    Args:
        policy: gives the state's size, the action space and the discounts.
        takes_actions: critics read the action (:class:`ActionCritic`), or list the values of all
            (:class:`DiscreteCritic`). Default: list those of a single discrete action, as AMAGO
            does; ValueError if they can't be listed.
        value_codec: the loss's; default scalars.
        options: further arguments of the critics (``num_critics``, ``hidden_size``, ...).

    Returns:
        ``"state" [*B, D] -> "action_value" [*B, C, G, A, *]``, or
        ``("state" [*B, D], "action_vector" [*S, *B, G, A]) -> "action_value" [*S, *B, C, G, *]``;
        on the policy's device and in its precision.

    Example:
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> policy = make_policy(env, context_length=45)
        >>> critic = make_critic(policy, num_critics=2)
        >>> critic(policy.encoder(env.reset()))["action_value"].shape
        torch.Size([2, 2, 7, 5])
    """
    space = policy.distribution.space
    listable = space.kind == "discrete"
    takes_actions = not listable if takes_actions is None else takes_actions
    if not takes_actions and not listable:
        got = f"got a {space.kind} space. Leave takes_actions out."
        raise ValueError(f"critics can list the values of a single discrete action only, {got}")
    if value_codec is not None and value_codec.event_shape:
        options["num_outputs"] = value_codec.event_shape.numel()
    if takes_actions:
        critic = ActionCritic(policy.state_size, space.size, policy.discounts, **options)
    else:
        critic = DiscreteCritic(policy.state_size, space.size, len(policy.discounts), **options)
    if value_codec is not None:
        critic.set_output(slope=value_codec.initial_slope(), bias=value_codec.initial_bias())
    weight = next(policy.parameters())
    in_keys = [keys.STATE, keys.ACTION_VECTOR] if takes_actions else [keys.STATE]
    critic = TensorDictModule(critic, in_keys, [keys.ACTION_VALUE])
    return critic.to(weight.device, weight.dtype)


def _extra_inputs(
    env: EnvBase, obs_keys: Sequence[NestedKey], mask_key: NestedKey | None, space: ActionSpace
) -> dict[str, Any]:
    """Return the arguments of an actor head that reads more than the state."""
    specs = env.full_observation_spec_unbatched
    read = [*obs_keys, *([] if mask_key is None else [mask_key])]
    if missing := [key for key in read if key not in specs.keys(True, True)]:
        raise KeyError(f"the actor reads {missing}, but the environment has {[*specs.keys(True)]}.")
    extra: dict[str, Any] = {}
    if obs_keys:
        extra["observation_sizes"] = [specs[key].shape.numel() for key in obs_keys]
    if mask_key is not None:
        if space.kind == "continuous":
            rule = "masks discrete actions, but these are continuous. Leave it out."
            raise ValueError(f"action_mask_key={mask_key!r} {rule}")
        parts = {"discrete": None, "multi_discrete": space.sizes, "multi_binary": ()}[space.kind]
        extra |= {"masks_actions": True, "mask_parts": parts}
    return extra


def _check_unused(part: object, **options: Any) -> None:
    if given := {name: value for name, value in options.items() if value}:
        raise ValueError(
            f"{', '.join(given)} go with a part that make_policy builds, got {given} and a "
            f"finished {type(part).__name__}. Give them to its constructor."
        )
