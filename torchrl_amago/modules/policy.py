"""Assemble encoders, heads and exploration into one policy, from an environment's specs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import (
    InteractionType,
    ProbabilisticTensorDictModule,
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
)
from torch import Tensor
from torchrl.data import Categorical, OneHot
from torchrl.envs import EnvBase
from torchrl.modules import recurrent_mode

from torchrl_amago import keys
from torchrl_amago.modules.actor import Actor
from torchrl_amago.modules.critic import DiscreteCritic
from torchrl_amago.modules.distributions import ClippedCategorical, ClippedOneHotCategorical
from torchrl_amago.modules.exploration import BilevelEpsilonGreedy
from torchrl_amago.modules.timestep import TimestepEncoder, make_timestep_encoder
from torchrl_amago.modules.trajectory import (
    FeedForwardEncoder,
    GatedLinearAttentionEncoder,
    GRUEncoder,
    IdentityEncoder,
    LSTMEncoder,
    MambaEncoder,
    Memory,
    TrajectoryEncoder,
    TransformerEncoder,
)

# AMAGO's training discounts, the one acted with last (arXiv 2310.09971, Appendix).
DISCOUNTS = (0.1, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999)

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


class SelectDiscount(TensorDictModuleBase):
    """Pick the distribution parameters of the discount to act with: ``[*B, G, P] -> [*B, P]``.

    Args:
        index: which discount; may be set anew at any time.
        in_key: parameters for every discount.
        out_key: parameters of the chosen one.

    Example:
        >>> import torch
        >>> from tensordict import TensorDict
        >>> td = TensorDict(action_params=torch.arange(6.0).view(1, 3, 2), batch_size=[1])
        >>> SelectDiscount(index=1)(td)["logits"]
        tensor([[2., 3.]])
    """

    def __init__(
        self,
        index: int = -1,
        in_key: NestedKey = keys.ACTION_PARAMS,
        out_key: NestedKey = keys.LOGITS,
    ) -> None:
        super().__init__()
        self.index, self.in_keys, self.out_keys = index, [in_key], [out_key]

    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the chosen parameters."""
        params = tensordict.get(self.in_keys[0])
        return tensordict.set(self.out_keys[0], params[..., self.index, :])


class Policy(TensorDictSequential):
    """Encoders, actor head, choice of discount, sampling and exploration, in this order.

    The parts stay reachable, since the loss trains :attr:`encoder` and :attr:`actor` directly.

    Attributes:
        encoder: timestep and trajectory encoder, ``obs_keys -> "state"``.
        actor: actor head, ``"state" -> "action_params"``.
        exploration: exploration module or None.
        discounts: G discounts, the one acted with by default last.

    Example:
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> policy = make_policy(env, context_length=45)
        >>> policy.actor(policy.encoder(env.reset()))["action_params"].shape
        torch.Size([2, 7, 5])
        >>> rollout = env.rollout(3, policy.act_with(0.99))
    """

    def __init__(
        self,
        timestep_encoder: TensorDictModuleBase,
        trajectory_encoder: TensorDictModuleBase,
        actor: TensorDictModuleBase,
        sampler: TensorDictModuleBase,
        exploration: TensorDictModuleBase | None = None,
        discounts: Sequence[float] = DISCOUNTS,
    ) -> None:
        encoder = TensorDictSequential(timestep_encoder, trajectory_encoder)
        select = SelectDiscount()
        parts = [encoder, actor, select, sampler]
        out_keys = [*sampler.out_keys, keys.STREAM]
        if exploration is not None:
            parts.append(exploration)
            out_keys += [key for key in exploration.out_keys if key not in out_keys]
        _check_discounts(discounts)
        super().__init__(*parts, selected_out_keys=out_keys)
        self.discounts = tuple(discounts)
        self._acting_keys = list(self.out_keys)
        self._use_eager()

    @property
    def encoder(self) -> TensorDictSequential:
        """Timestep and trajectory encoder."""
        return self.module[0]

    @property
    def actor(self) -> TensorDictModule:
        """Actor head."""
        return self.module[1]

    @property
    def exploration(self) -> TensorDictModuleBase | None:
        """Exploration module, or None."""
        return self.module[4] if len(self.module) > 4 else None

    @property
    def state_size(self) -> int:
        """D, size of ``"state"``."""
        return self.encoder.module[1].output_size

    def forward(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Act: write the action, and what exploration and memory need at the next step."""
        if recurrent_mode() or args or kwargs or not self._can_act_at_once():
            return super().forward(tensordict, *args, **kwargs)
        return self._act(tensordict)

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile the networks' part of a step with :func:`torch.compile`, in place.

        Copies run eagerly until they are compiled themselves. Sequences aren't touched: see
        :meth:`TrajectoryEncoder.compile`.

        Args:
            args: of `torch.compile`, likewise `kwargs`. On CPUs `options={"cpp_wrapper": True}` gives
                the fastest steps, after a longer compilation.
        """
        self._logits = torch.compile(self._compute_logits, *args, **kwargs)

    def _can_act_at_once(self) -> bool:
        timestep, trajectory = self.encoder.module
        return (
            _keeps_forward(timestep, TimestepEncoder)
            and _keeps_forward(trajectory, TrajectoryEncoder)
            and isinstance(self.actor.module, Actor)
            and self.out_keys == self._acting_keys
        )

    @torch.no_grad()
    def _act(self, tensordict: TensorDictBase) -> TensorDictBase:
        # What the modules in a row would do, without writing and reading entries in between: half
        # of a step's time with small networks.
        timestep, trajectory = self.encoder.module
        inputs = timestep.read(tensordict)
        shape = inputs[0].shape[: inputs[0].ndim - timestep.event_dims[0]]
        positions_N, memory = trajectory.begin_step(tensordict, shape, like=inputs[0])
        logits_key = self.module[2].out_keys[0]
        tensordict.set(logits_key, self._logits(inputs, positions_N, memory))
        for module in self.module[3:]:
            module(tensordict)
        return tensordict.exclude(logits_key, inplace=True)

    def _compute_logits(self, inputs: list[Tensor], positions_N: Tensor, memory: Memory) -> Tensor:
        timestep, trajectory = self.encoder.module
        x = timestep.encode(inputs, None)
        state_ND = trajectory._step(x.reshape(-1, x.shape[-1]), positions_N, memory)
        logits_NP = self.actor.module(state_ND)[:, self.module[2].index]
        return logits_NP.reshape(*x.shape[:-1], -1)

    def _use_eager(self) -> None:
        self._logits = self._compute_logits

    def __getstate__(self) -> dict:
        # Compiled code can't be copied, and a bound method would lead back to the original.
        state = super().__getstate__()
        del state["_logits"]
        return state

    def __setstate__(self, state: dict) -> None:
        super().__setstate__(state)
        self._use_eager()

    def act_with(self, discount: float) -> Policy:
        """Act with another of the trained discounts from now on.

        Args:
            discount: one of :attr:`discounts`.

        Raises:
            ValueError: if that discount was not trained.
        """
        if discount not in self.discounts:
            raise ValueError(
                f"can only act with a trained discount, {self.discounts}; got {discount}. "
                "Choose one of them, or build the policy and the loss with more discounts."
            )
        self.module[2].index = self.discounts.index(discount)
        return self


def make_policy(
    env: EnvBase,
    *,
    context_length: int,
    seq_model: str | Callable[..., TrajectoryEncoder] = "transformer",
    seq_model_options: dict[str, Any] | None = None,
    timestep_encoder: str | Callable[..., TimestepEncoder] | TimestepEncoder = "mlp",
    timestep_options: dict[str, Any] | None = None,
    actor_options: dict[str, Any] | None = None,
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
        actor_options: further arguments of :class:`~torchrl_amago.modules.actor.Actor`.
        exploration: arguments of :class:`BilevelEpsilonGreedy` (``horizon`` defaults to
            ``context_length``); None for no exploration beyond sampling.
        discounts: G discounts, each in [0, 1); the last is acted with.
        obs_keys: entries that such an encoder reads besides the previous step; default all
            observations but the trial's bookkeeping.

    Returns:
        A :class:`Policy`; on the environment's device.

    Raises:
        KeyError: if the environment lacks the previous step or one of ``obs_keys``.
        ValueError: if the action space is not supported, or an encoder is unknown or can't
            read the observations.

    Example:
        >>> from torchrl_amago.envs import MetaFrozenLake, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> policy = make_policy(env, context_length=45)
        >>> policy(env.reset())["action"].shape
        torch.Size([2])
    """
    _check_discounts(discounts)
    num_actions, one_hot = discrete_actions(env)
    if isinstance(timestep_encoder, TensorDictModuleBase):
        _check_own_encoder(timestep_encoder, timestep_options, obs_keys)
    else:
        timestep_encoder = make_timestep_encoder(
            env, timestep_encoder, obs_keys=obs_keys, **(timestep_options or {})
        )
    trajectory_encoder = _seq_model(seq_model)(
        timestep_encoder.output_size, context_length=context_length, **(seq_model_options or {})
    )
    actor = TensorDictModule(
        Actor(trajectory_encoder.output_size, num_actions, len(discounts), **(actor_options or {})),
        in_keys=[keys.STATE],
        out_keys=[keys.ACTION_PARAMS],
    )
    sampler = ProbabilisticTensorDictModule(
        in_keys=[keys.LOGITS],
        out_keys=[keys.ACTION],
        distribution_class=ClippedOneHotCategorical if one_hot else ClippedCategorical,
        distribution_kwargs={"dtype": env.action_spec.dtype} if one_hot else {},
        default_interaction_type=InteractionType.RANDOM,
    )
    explore = None
    if exploration is not None:
        options = {"horizon": context_length, **exploration}
        explore = BilevelEpsilonGreedy(num_actions, one_hot=one_hot, **options)
    policy = Policy(timestep_encoder, trajectory_encoder, actor, sampler, explore, discounts)
    return policy if env.device is None else policy.to(env.device)


def _check_discounts(discounts: Sequence[float]) -> None:
    if not discounts or not all(0.0 <= discount < 1.0 for discount in discounts):
        raise ValueError(
            f"discounts must be one or more numbers in [0, 1), got {tuple(discounts)}. The last one is "
            "acted with."
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


def _keeps_forward(module: TensorDictModuleBase, base: type[TensorDictModuleBase]) -> bool:
    """Whether calling the module does nothing but what its base class says."""
    return (
        isinstance(module, base)
        and type(module).forward is base.forward
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )


def make_critic(policy: Policy, env: EnvBase, **options: Any) -> TensorDictModule:
    """Build the critic ensemble that goes with a policy.

    Args:
        policy: gives the state's size and the discounts.
        env: gives the action space.
        options: arguments of :class:`~torchrl_amago.modules.critic.DiscreteCritic`
            (``num_critics``, ``hidden_size``, ...).

    Returns:
        ``"state" [*B, D] -> "action_value" [*B, C, G, A]``, on the environment's device.
    """
    num_actions, _ = discrete_actions(env)
    critic = TensorDictModule(
        DiscreteCritic(policy.state_size, num_actions, len(policy.discounts), **options),
        in_keys=[keys.STATE],
        out_keys=[keys.ACTION_VALUE],
    )
    return critic if env.device is None else critic.to(env.device)


def discrete_actions(env: EnvBase) -> tuple[int, bool]:
    """Number of actions, and whether they are one-hot encoded.

    Raises:
        ValueError: for any action space but a single discrete one.
    """
    spec = env.full_action_spec_unbatched[env.action_key]
    if isinstance(spec, OneHot):
        return spec.space.n, True
    if type(spec) is Categorical and spec.shape == ():
        return spec.space.n, False
    raise ValueError(
        "make_policy supports one discrete action per step (a Categorical spec of shape () or a "
        f"OneHot spec), got {spec}. Discretise the actions, or compose a Policy from your own "
        "actor head and sampler."
    )


def _seq_model(seq_model: str | Callable[..., TrajectoryEncoder]) -> Callable[..., Any]:
    if callable(seq_model):
        return seq_model
    if seq_model not in SEQ_MODELS:
        raise ValueError(
            f"seq_model must be one of {sorted(SEQ_MODELS)} or a class, got {seq_model!r}."
        )
    return SEQ_MODELS[seq_model]
