"""Assemble policies and critics from an environment's specs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from tensordict import NestedKey
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from torchrl.data import Composite
from torchrl.envs import EnvBase

from torchrl_amago import keys
from torchrl_amago._validation import pick
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules.actor import Actor, ActorHead, ActorModule, ResidualActor
from torchrl_amago.modules.critic import ActionCritic, DiscreteCritic
from torchrl_amago.modules.distributions import PolicyDistribution, make_distribution
from torchrl_amago.modules.exploration import make_exploration
from torchrl_amago.modules.policy import DISCOUNTS, Encoder, Policy, check_discounts
from torchrl_amago.modules.timestep import TimestepEncoder, make_timestep_encoder
from torchrl_amago.modules.trajectory import (
    FeedForwardEncoder,
    GatedLinearAttentionEncoder,
    GRUEncoder,
    IdentityEncoder,
    LSTMEncoder,
    MambaEncoder,
    TrajectoryEncoder,
    TransformerEncoder,
)
from torchrl_amago.modules.value_codec import ValueCodec

SEQ_MODELS: dict[str, Callable[..., TrajectoryEncoder]] = {
    "feedforward": FeedForwardEncoder,
    "gru": GRUEncoder,
    "identity": IdentityEncoder,
    "linear_attention": GatedLinearAttentionEncoder,
    "lstm": LSTMEncoder,
    "mamba": MambaEncoder,
    "transformer": TransformerEncoder,
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
    timestep_encoder: str | Callable[..., TimestepEncoder] | TimestepEncoder = "mlp",
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
) -> Policy:
    """Build a policy that fits an environment with trial and previous-step transforms.

    Args:
        env: environment whose specs say what is observed and done.
        context_length: how many steps the policy remembers; the length of a trial, or less.
        seq_model: trajectory encoder, by name (:data:`SEQ_MODELS`) or as a class or function called
            with ``(input_size, context_length=..., **seq_model_options)``.
        seq_model_options: further arguments of the trajectory encoder.
        timestep_encoder: ``mlp``, ``cnn`` (one image), ``combined`` (observations of any kind), or
            your own: a module as it is, a class or function as in :func:`make_timestep_encoder`.
        timestep_options: further arguments of a timestep encoder that isn't a module yet.
        actor: actor head, by name (:data:`ACTORS`) or as a class or function called with
            ``(state_size, num_params, num_discounts, **actor_options)``.
        actor_options: further arguments of the actor head.
        actor_obs_keys: observations that the actor reads besides the state.
        action_mask_key: entry that says which discrete actions are allowed, bool, one for each
            category. The timestep encoder reads it as well, unless ``obs_keys`` leaves it out.
        distribution: of actions: by name (:data:`~torchrl_amago.modules.distributions.DISTRIBUTIONS`), as
            it is, or the usual one of the action space.
        distribution_options: further arguments of a distribution that is chosen here.
        exploration: arguments of :func:`~torchrl_amago.modules.exploration.make_exploration`
            (``horizon`` defaults to ``context_length``); None for no exploration beyond sampling.
        discounts: G discounts, each in (0, 1); the last is acted with.
        obs_keys: entries that such an encoder reads besides the previous step; default all
            observations but the trial's bookkeeping.

    Returns:
        A :class:`Policy`; on the environment's device.

    Raises:
        KeyError: if the environment lacks the previous step or one of the keys.
        ValueError: if the action space is not supported, or an encoder, actor or distribution is
            unknown or doesn't fit.

    Example:
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> policy = make_policy(env, context_length=45)
        >>> policy(env.reset())["action"].shape
        torch.Size([2])
    """
    check_discounts(discounts)
    space = ActionSpace.from_spec(env.full_action_spec_unbatched[env.action_key])
    if isinstance(distribution, PolicyDistribution):
        _check_own_distribution(distribution, distribution_options, space)
    else:
        distribution = make_distribution(space, distribution, **(distribution_options or {}))
    if action_mask_key is not None and space.kind == "continuous":
        raise ValueError(
            f"action_mask_key={action_mask_key!r} says which discrete actions are allowed, but these are "
            "continuous. Leave it out, and add the entry to obs_keys if the policy is to see it."
        )
    if isinstance(timestep_encoder, TensorDictModuleBase):
        _check_own_encoder(timestep_encoder, timestep_options, obs_keys)
        timestep = timestep_encoder
    else:
        timestep = make_timestep_encoder(
            env, timestep_encoder, obs_keys=obs_keys, **(timestep_options or {})
        )
    trajectory = pick("seq_model", seq_model, SEQ_MODELS)(
        timestep.output_size, context_length=context_length, **(seq_model_options or {})
    )
    head = pick("actor", actor, ACTORS)(
        trajectory.output_size,
        distribution.num_params,
        len(discounts),
        **_extra_inputs(env, actor_obs_keys, action_mask_key, space),
        **(actor_options or {}),
    )
    mask_keys = [] if action_mask_key is None else [action_mask_key]
    explore = None
    if exploration is not None:
        masked = {} if action_mask_key is None else {"mask_key": action_mask_key}
        explore = make_exploration(space, **{"horizon": context_length, **masked, **exploration})
    policy = Policy(
        Encoder(timestep, trajectory),
        ActorModule(
            head,
            in_keys=[keys.STATE, *actor_obs_keys, *mask_keys],
            out_keys=[keys.ACTION_PARAMS],
        ),
        distribution,
        explore,
        discounts,
    )
    return policy if env.device is None else policy.to(env.device)


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
            (:class:`DiscreteCritic`). Default: list where there is a single discrete action, as AMAGO
            does; AMAGO-2's read it always.
        value_codec: the loss's; default scalars. Bins need as many outputs, and may start at a value.
        options: further arguments of the critics (``num_critics``, ``hidden_size``, ...).

    Returns:
        ``"state" [*B, D] -> "action_value" [*B, C, G, A, *]``, or
        ``("state" [*B, D], "action_vector" [*S, *B, G, A]) -> "action_value" [*S, *B, C, G, *]``; on the
        policy's device and in its precision.

    Raises:
        ValueError: if the actions can't be listed, or an option is for critics of the other kind.

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
        raise ValueError(
            f"critics can list the values of a single discrete action only, got a {space.kind} space. "
            "Leave takes_actions out."
        )
    if value_codec is not None and value_codec.event_shape:
        options["num_outputs"] = value_codec.event_shape.numel()
    if not takes_actions and "action_gain" in options:
        raise ValueError(
            "action_gain goes with critics that take the action, and these list the values of all. "
            "Use takes_actions=True, or leave it out."
        )
    if takes_actions:
        critic = ActionCritic(policy.state_size, space.size, policy.discounts, **options)
    else:
        critic = DiscreteCritic(policy.state_size, space.size, len(policy.discounts), **options)
    if value_codec is not None:
        slope, bias = value_codec.initial_slope(), value_codec.initial_bias()
        if slope is not None:
            critic.set_output_slope(slope)
        if bias is not None:
            critic.set_output_bias(bias)
    weight = next(policy.parameters())
    return TensorDictModule(
        critic,
        in_keys=[keys.STATE, keys.ACTION_VECTOR] if takes_actions else [keys.STATE],
        out_keys=[keys.ACTION_VALUE],
    ).to(weight.device, weight.dtype)


def _extra_inputs(
    env: EnvBase,
    obs_keys: Sequence[NestedKey],
    action_mask_key: NestedKey | None,
    space: ActionSpace,
) -> dict[str, Any]:
    """Arguments of an actor head that reads more than the state."""
    specs = env.full_observation_spec_unbatched
    sizes = [_spec_of(specs, key).shape.numel() for key in obs_keys]
    extra: dict[str, Any] = {"observation_sizes": sizes} if sizes else {}
    if action_mask_key is not None:
        _spec_of(specs, action_mask_key)
        extra["masks_actions"] = True
        if space.kind != "discrete":
            extra["mask_parts"] = space.sizes if space.kind == "multi_discrete" else ()
    return extra


def _spec_of(specs: Composite, key: NestedKey) -> Any:
    if key not in specs.keys(True, True):
        raise KeyError(
            f"the actor is to read {key!r}, but the environment's observations are "
            f"{sorted(map(str, specs.keys(True, True)))}. Name one of them in actor_obs_keys or "
            "action_mask_key."
        )
    return specs[key]


def _check_own_distribution(
    distribution: PolicyDistribution, options: dict[str, Any] | None, space: ActionSpace
) -> None:
    if options:
        raise ValueError(
            f"distribution_options go with a distribution that make_policy builds, got {options} and a "
            f"finished {type(distribution).__name__}. Give them to its constructor."
        )
    if distribution.space != space:
        raise ValueError(
            f"the distribution is over actions of {distribution.space}, the environment's are {space}. "
            "Build it with ActionSpace.from_spec of the environment's action spec."
        )


def _check_own_encoder(
    encoder: TensorDictModuleBase,
    options: dict[str, Any] | None,
    obs_keys: Sequence[NestedKey] | None,
) -> None:
    if options or obs_keys is not None:
        raise ValueError(
            "timestep_options and obs_keys go with a timestep encoder that make_policy builds, got "
            f"timestep_options={options}, obs_keys={obs_keys} and a finished module. Give them to the "
            "module's constructor."
        )
    if not hasattr(encoder, "output_size"):
        raise TypeError(
            "a timestep encoder must say the size of what it writes, but the module of type "
            f"{type(encoder).__name__} has no output_size. Subclass TimestepEncoder, or set the "
            "attribute."
        )
