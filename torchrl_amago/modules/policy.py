"""The policy: encoder, actor head, sampler and exploration, called in this order."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from tensordict import NestedKey, TensorDictBase
from tensordict.nn import TensorDictModuleBase, TensorDictSequential, dispatch
from tensordict.nn.probabilistic import InteractionType, interaction_type
from torch import Tensor
from torchrl.modules import recurrent_mode

from torchrl_amago import keys
from torchrl_amago._cpu import reads_are_free
from torchrl_amago._validation import check_choice
from torchrl_amago.modules._settings import flatten, plain
from torchrl_amago.modules.distributions import PolicyDistribution
from torchrl_amago.modules.export import PolicyStep, parts_with_own_forward, step_outputs

# AMAGO's training discounts, the one acted with last (arXiv 2310.09971, Appendix).
DISCOUNTS = (0.1, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999)


class Encoder(TensorDictSequential):
    """A timestep encoder, then a trajectory encoder: observations to ``"state"``.

    Example:
        >>> from torchrl_amago.modules import GRUEncoder, MLPTimestepEncoder
        >>> timestep = MLPTimestepEncoder({"observation": (3,)}, output_size=8)
        >>> Encoder(timestep, GRUEncoder(8, d_model=16)).in_keys
        ['observation', 'time_idx', 'is_init']
    """

    @property
    def timestep(self) -> TensorDictModuleBase:
        """The encoder of single timesteps."""
        return self.module[0]

    @property
    def trajectory(self) -> TensorDictModuleBase:
        """The encoder of sequences, with the memory of rollouts."""
        return self.module[1]

    @property
    def output_size(self) -> int:
        """D, size of ``"state"``."""
        return self.trajectory.output_size

    @property
    def settings(self) -> dict[str, Any]:
        """Classes and arguments of both encoders, JSON-able."""
        # A dictionary's order is lost on the way through a file, but that of inputs counts.
        in_keys = {"timestep.in_keys": plain(self.timestep.in_keys)}
        return in_keys | plain({"timestep": self.timestep, "trajectory": self.trajectory})

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile both encoders in place; see :meth:`TrajectoryEncoder.compile`."""
        self.timestep.compile(*args, **kwargs)
        self.trajectory.compile(*args, **kwargs)


class ActionSampler(TensorDictModuleBase):
    """Draw an action from the parameters ``[*B, G, P]`` of the discount acted with.

    Under other exploration types than ``RANDOM`` it writes the greedy action. The chosen parameters
    are written as ``"logits"``. ``index``, the discount's position, may be set anew at any time.

    Example:
        >>> from torchrl_amago.action_space import ActionSpace
        >>> from torchrl_amago.modules import make_distribution
        >>> space = ActionSpace("discrete", (), torch.int64, sizes=(3,))
        >>> ActionSampler(make_distribution(space))(action_params=torch.zeros(4, 7, 3))[1].shape
        torch.Size([4])
    """

    def __init__(
        self,
        distribution: PolicyDistribution,
        params_key: NestedKey = keys.ACTION_PARAMS,
        index: int = -1,
    ) -> None:
        super().__init__()
        self.distribution, self.index = distribution, index
        self.in_keys, self.out_keys = [params_key], [keys.LOGITS, keys.ACTION]

    def chosen(self, tensordict: TensorDictBase) -> Tensor:
        """Return the parameters to draw from, ``[*B, P]``."""
        return tensordict.get(self.in_keys[0])[..., self.index, :]

    @dispatch(auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action and its parameters."""
        params = self.chosen(tensordict)
        actions = self.distribution.stored(params)
        is_random = interaction_type() in (None, InteractionType.RANDOM)
        action = actions.sample() if is_random else actions.deterministic_sample
        return tensordict.set(keys.LOGITS, params).set(keys.ACTION, action)


class Policy(TensorDictModuleBase):
    """Encoder, actor head, sampler and exploration, called in this order.

    A single step has no gradient; sequences (:class:`torchrl.modules.set_recurrent_mode`) have.
    Only :attr:`out_keys` are written: the action, and entries that parts need at the next step.

    Args:
        encoder: inputs to ``"state"``: an :class:`Encoder`, or any TensorDict module. Entries that
            its last module writes besides the actor's inputs travel with the rollout.
        actor: ``"state"``, and whatever else it reads, to ``"action_params"`` ``[*B, G, P]``.
        distribution: meaning of those parameters; the sampler is made from it.
        exploration: module that changes the action, or None.
        discounts: G discounts, each in (0, 1). The last is acted with, see :meth:`act_with`.

    Raises:
        ValueError: for other discounts; when called, if the distribution's parameters are NaN.

    Example:
        >>> from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> policy = make_policy(env, context_length=45)
        >>> rollout = env.rollout(3, policy.act_with(0.99))
    """

    def __init__(
        self,
        encoder: TensorDictModuleBase,
        actor: TensorDictModuleBase,
        distribution: PolicyDistribution,
        exploration: TensorDictModuleBase | None = None,
        discounts: Sequence[float] = DISCOUNTS,
    ) -> None:
        super().__init__()
        check_discounts(discounts)
        self.encoder, self.actor = encoder, actor
        self.sampler = ActionSampler(distribution, actor.out_keys[0])
        self.exploration = exploration
        self.distribution, self.discounts = distribution, tuple(discounts)
        parts = TensorDictSequential(*self.children())
        last = encoder[-1] if isinstance(encoder, TensorDictSequential) else encoder
        carried = [key for key in last.out_keys if key not in actor.in_keys]
        explored = [] if exploration is None else exploration.out_keys
        self.in_keys, self._all_keys = parts.in_keys, parts.out_keys
        self.out_keys = list(dict.fromkeys([keys.ACTION, *carried, *explored]))
        self.compiled_step: Callable[..., tuple[Tensor, ...]] | None = None

    @property
    def state_size(self) -> int:
        """D, size of ``"state"``: the encoder's `output_size`, or the actor head's `state_size`."""
        size = getattr(self.encoder, "output_size", None)
        return self.actor.module.state_size if size is None else size

    @property
    def settings(self) -> dict[str, Any]:
        """Discounts, the one acted with, each part's class and arguments, by name; JSON-able."""
        encoder = self.encoder
        encoder = encoder.settings if isinstance(encoder, Encoder) else {"encoder": encoder}
        parts = {
            "discounts": self.discounts,
            "discount": self.discounts[self.sampler.index],
            "actor.in_keys": self.actor.in_keys,
            "actor": getattr(self.actor, "module", self.actor),
            "distribution": self.distribution,
            "exploration": self.exploration,
        }
        return flatten(plain({**encoder, **parts}))

    @property
    def keyword_keys(self) -> list[NestedKey]:
        """Entries that may be given as keywords: the inputs, and those that the last step wrote."""
        return [*self.in_keys, *(key for key in self.out_keys if key not in self.sampler.out_keys)]

    @dispatch(source="keyword_keys", auto_batch_size=False)
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Write the action, and the entries that exploration and memory need at the next step."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and bool(recurrent_mode())):
            if self.compiled_step is None or recurrent_mode():
                step = self.actor(self.encoder(tensordict.copy()))
            else:
                step = self._compiled_step(tensordict.copy())
            check_not_nan(self.sampler.chosen(step).detach(), tensordict)
            step = self.sampler(step)
            if self.exploration is not None:
                step = self.exploration(step)
        for key in self.out_keys:
            if (value := step.get(key, None)) is not None:  # sequences hand no memory on
                tensordict.set(key, value)
        return tensordict

    def select_out_keys(self, *out_keys: NestedKey) -> Policy:
        """Write these entries from now on, any of those that a part writes."""
        self.out_keys = out_keys
        return self

    def reset_out_keys(self) -> Policy:
        """Write all that the parts write, ``"state"`` and ``"logits"`` too."""
        return self.select_out_keys(*self._all_keys)

    def act_with(self, discount: float) -> Policy:
        """Act with another of :attr:`discounts` from now on; raise ValueError for others."""
        check_choice("the discount to act with", discount, self.discounts)
        self.sampler.index = self.discounts.index(discount)
        return self

    def compile(self, *args: Any, **kwargs: Any) -> None:
        """Compile encoder and actor in place, with the arguments of :func:`torch.compile`.

        Copies run eagerly. On CPUs `options={"cpp_wrapper": True}` gives the fastest steps. Hooks
        of the parts are called on steps if they were registered before.
        """
        self.encoder.compile(*args, **kwargs)
        self.actor.module.compile(*args, **kwargs)
        if not parts_with_own_forward(self):
            self.compiled_step = torch.compile(partial(step_outputs, self), *args, **kwargs)

    def _compiled_step(self, step: TensorDictBase) -> TensorDictBase:
        # One compiled function in place of three, each of which costs a fixed time.
        timestep, trajectory = self.encoder.module
        inputs, observations = timestep.read(step), [step[key] for key in self.actor.in_keys[1:]]
        like = next(self.actor.parameters())
        positions_N, memory = trajectory.begin_step(step, timestep.batch_shape(inputs), like)
        outputs = self.compiled_step(inputs, positions_N, memory, observations)
        for part, x in zip((timestep, trajectory, self.actor), outputs, strict=True):
            step.set(part.out_keys[0], x)
        return step

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "compiled_step": None}  # compiled code can't be copied

    def step_module(self) -> PolicyStep:
        """Return the greedy step for :func:`torch.export.export`, see :class:`PolicyStep`."""
        return PolicyStep(self)


def check_not_nan(params: Tensor, step: TensorDictBase) -> None:
    """Raise if actions would be drawn from NaN, and name the rows and the entries it comes from."""
    # A sum costs a quarter of `isnan`. Infinities may become NaN in it, hence the second look.
    if not reads_are_free(params) or not math.isnan(params.sum()) or not params.isnan().any():
        return
    entries = step.items(True, True)
    seen = [key for key, x in entries if x.is_floating_point() and not x.isfinite().all()]
    source = (
        f"the step's entries {seen} hold NaN or infinity"
        if seen
        else "all entries of the step are finite, so the weights or the rollout's memory aren't"
    )
    rows = params.isnan().any(-1).nonzero().tolist()
    raise ValueError(f"actions can't be drawn from NaN, got it in rows {rows}: {source}.")


def check_discounts(discounts: Sequence[float]) -> None:
    """Raise if there are no discounts, or some outside of (0, 1)."""
    if not discounts or not all(0.0 < discount < 1.0 for discount in discounts):
        raise ValueError(
            f"discounts must be one or more numbers in (0, 1), got {tuple(discounts)}. The last is "
            "acted with."
        )
