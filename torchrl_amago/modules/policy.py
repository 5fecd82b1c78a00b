"""The policy: encoders, actor head, choice of discount, sampling and exploration as one object."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import (
    TensorDictModule,
    TensorDictModuleBase,
    TensorDictSequential,
    dispatch,
)
from torch import Tensor
from torchrl.modules import recurrent_mode

from torchrl_amago import keys
from torchrl_amago._masking import is_traced
from torchrl_amago.modules._settings import flatten, plain
from torchrl_amago.modules.actor import ActorHead
from torchrl_amago.modules.distributions import PolicyDistribution
from torchrl_amago.modules.export import PolicyStep
from torchrl_amago.modules.timestep import TimestepEncoder
from torchrl_amago.modules.trajectory import Memory, TrajectoryEncoder

# AMAGO's training discounts, the one acted with last (arXiv 2310.09971, Appendix).
DISCOUNTS = (0.1, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999)


class SelectDiscount(TensorDictModuleBase):
    """Pick the distribution parameters of the discount to act with: ``[*B, G, P] -> [*B, P]``.

    Args:
        index: which discount; may be set anew at any time.
        in_key: parameters for every discount.
        out_key: parameters of the chosen one.

    Raises:
        ValueError: when called, if a parameter is NaN (which isn't looked for in compiled code).

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

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the chosen parameters."""
        params = tensordict.get(self.in_keys[0])[..., self.index, :]
        if not is_traced(params):
            check_not_nan(params.detach(), tensordict.exclude(self.in_keys[0]))
        return tensordict.set(self.out_keys[0], params)


class Policy(TensorDictSequential):
    """Encoders, actor head, choice of discount, sampling and exploration, in this order.

    The parts stay reachable, since the loss trains :attr:`encoder` and :attr:`actor` directly.

    Attributes:
        encoder: timestep and trajectory encoder, ``obs_keys -> "state"``.
        actor: actor head, ``"state"`` and whatever observations it reads besides ->
            ``"action_params"``.
        distribution: what those parameters mean.
        exploration: exploration module or None.
        discounts: G discounts, the one acted with by default last.

    Example:
        >>> from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
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
        distribution: PolicyDistribution,
        exploration: TensorDictModuleBase | None = None,
        discounts: Sequence[float] = DISCOUNTS,
    ) -> None:
        encoder = TensorDictSequential(timestep_encoder, trajectory_encoder)
        select = SelectDiscount()
        parts = [encoder, actor, select, sampler]
        # What memory and exploration need at the next step travels with the rollout.
        out_keys = [*sampler.out_keys, *trajectory_encoder.out_keys[1:]]
        if exploration is not None:
            parts.append(exploration)
            out_keys += [key for key in exploration.out_keys if key not in out_keys]
        check_discounts(discounts)
        super().__init__(*parts, selected_out_keys=out_keys)
        self.distribution, self.discounts = distribution, tuple(discounts)
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

    @property
    def settings(self) -> dict[str, Any]:
        """All that decides what the policy does with its weights, by dotted name; JSON-able.

        What shapes of weights don't tell is here: discounts, the one acted with, and for each part its
        class and arguments (``"trajectory.window"``). Two policies with equal settings and weights act
        alike.
        """
        timestep, trajectory = self.encoder.module
        parts = {
            "timestep": timestep,
            "trajectory": trajectory,
            "actor": self.actor.module,
            "distribution": self.distribution,
            "exploration": self.exploration,
        }
        # A dictionary's order is lost on the way through a file, but that of inputs counts.
        read = {"timestep.in_keys": timestep.in_keys, "actor.in_keys": self.actor.in_keys}
        acting = self.discounts[self.module[2].index]
        return flatten(plain({"discounts": self.discounts, "discount": acting, **read, **parts}))

    @property
    def keyword_keys(self) -> list[NestedKey]:
        """Entries that may be given as keywords: the inputs, and what the last step handed on."""
        handed_on = [key for key in self.out_keys if key not in self.module[3].out_keys]
        return [*self.in_keys, *handed_on]

    @dispatch(source="keyword_keys", auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase, *args: Any, **kwargs: Any) -> TensorDictBase:
        """Act: write the action, and what exploration and memory need at the next step."""
        if recurrent_mode() or args or kwargs or not self.has_usual_parts():
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
        self._logits = torch.compile(self.compute_logits, *args, **kwargs)

    def step_module(self) -> PolicyStep:
        """The greedy step as a function of tensors, for :func:`torch.export.export`; see :class:`PolicyStep`.

        Raises:
            ValueError: for encoders whose memory grows.
        """
        return PolicyStep(self)

    def has_usual_parts(self) -> bool:
        """Whether calling the parts does nothing but what their base classes say."""
        timestep, trajectory = self.encoder.module
        return (
            _keeps_forward(timestep, TimestepEncoder)
            and _keeps_forward(trajectory, TrajectoryEncoder)
            and _keeps_forward(self.encoder, TensorDictSequential)
            and _keeps_forward(self.actor, TensorDictModule)
            and _keeps_forward(self.module[2], SelectDiscount)
            and isinstance(self.actor.module, ActorHead)
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
        extra = [tensordict.get(key) for key in self.actor.in_keys[1:]]
        logits_key = self.module[2].out_keys[0]
        logits = self._logits(inputs, extra, positions_N, memory)
        check_not_nan(logits, tensordict)
        tensordict.set(logits_key, logits)
        for module in self.module[3:]:
            module(tensordict)
        return tensordict.exclude(logits_key, inplace=True)

    def compute_logits(
        self, inputs: list[Tensor], extra: list[Tensor], positions_N: Tensor, memory: Memory
    ) -> Tensor:
        """Parameters of the action, ``[*B, P]``, from what encoders and actor read."""
        timestep, trajectory = self.encoder.module
        x = timestep.encode(inputs, None)
        batch = x.shape[:-1]
        state_ND = trajectory._step(x.reshape(-1, x.shape[-1]), positions_N, memory)
        extra = [value.flatten(0, len(batch) - 1) if batch else value[None] for value in extra]
        logits_NP = self.actor.module(state_ND, *extra)[:, self.module[2].index]
        return logits_NP.reshape(*batch, -1)

    def _use_eager(self) -> None:
        self._logits = self.compute_logits

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


def check_not_nan(params: Tensor, step: TensorDictBase) -> None:
    """Refuse to draw an action from NaN, which would be any action, and tell where it comes from.

    Raises:
        ValueError: naming rows and entries.
    """
    # A sum costs a quarter of what `isnan` does. Infinities may become NaN in it, hence the second look.
    if not math.isnan(params.sum()) or not params.isnan().any():
        return
    entries = step.items(True, True)
    seen = [key for key, x in entries if x.is_floating_point() and not x.isfinite().all()]
    source = (
        f"the step's entries {seen} hold NaN or infinity"
        if seen
        else (
            "all entries of the step are finite, so that the weights, or what is remembered of earlier steps, "
            "aren't"
        )
    )
    raise ValueError(
        f"actions can't be drawn from NaN, got it in rows {params.isnan().any(-1).nonzero().tolist()}: "
        f"{source}. Mend the environment, or go back to weights from before."
    )


def check_discounts(discounts: Sequence[float]) -> None:
    """Refuse discounts outside of (0, 1)."""
    if not discounts or not all(0.0 < discount < 1.0 for discount in discounts):
        raise ValueError(
            f"discounts must be one or more numbers in (0, 1), got {tuple(discounts)}. The last one is "
            "acted with."
        )


def _keeps_forward(module: TensorDictModuleBase, base: type[TensorDictModuleBase]) -> bool:
    """Whether calling the module does nothing but what its base class says."""
    return (
        isinstance(module, base)
        and type(module).forward is base.forward
        and not module._forward_hooks
        and not module._forward_pre_hooks
    )
