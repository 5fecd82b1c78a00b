"""A loss over an encoder, an actor and critics: its keys, networks, calls and reduction.

Legend: B batch, T steps, S = T + 1 states, D features, G discounts, A action size, K samples,
M the computed steps, see :class:`~torchrl_amago._masking.Steps`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import expand_as_right
from torch import Tensor
from torch.distributions import Distribution
from torchrl.objectives import LossModule

from torchrl_amago import keys
from torchrl_amago._validation import check_choice
from torchrl_amago.modules.policy import Policy
from torchrl_amago.modules.value_codec import ValueCodec
from torchrl_amago.objectives._slice_batch import SliceBatch
from torchrl_amago.objectives.functional import masked_mean

HeadInputs = dict[NestedKey, Tensor]
"""The state ``[M, D]``, and observations that the actor reads besides, by their keys."""

MaskHook = Callable[[TensorDictBase, Tensor, Tensor], Tensor]
"""``(batch, unreduced loss [B, T, ...], mask of the same shape) -> mask``."""


class ActorCriticLoss(LossModule):
    """Keys, parameters, calls and reduction of a loss; a subclass writes the equations."""

    @dataclass
    class _AcceptedKeys:
        action: NestedKey = keys.ACTION
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"
        state: NestedKey = keys.STATE
        action_params: NestedKey = keys.ACTION_PARAMS
        action_vector: NestedKey = keys.ACTION_VECTOR
        action_value: NestedKey = keys.ACTION_VALUE
        mask: NestedKey = keys.MASK
        is_init: NestedKey = keys.IS_INIT
        done: NestedKey = "done"
        priority: NestedKey = "td_error"
        priority_weight: NestedKey = "priority_weight"

    default_keys = _AcceptedKeys
    all_reduce = staticmethod(lambda *sums: sums)  # over data-parallel ranks, see Ranks.attach

    encoder_network: TensorDictModule
    encoder_network_params: TensorDictParams
    target_encoder_network_params: TensorDictParams
    actor_network: TensorDictModule
    actor_network_params: TensorDictParams
    target_actor_network_params: TensorDictParams
    critic_network: TensorDictModule
    critic_network_params: TensorDictParams
    target_critic_network_params: TensorDictParams

    def __init__(
        self, policy: Policy, critic: TensorDictModuleBase, value_codec: ValueCodec
    ) -> None:
        super().__init__()
        self.convert_to_functional(policy.encoder, "encoder_network", create_target_params=False)
        self.convert_to_functional(policy.actor, "actor_network", create_target_params=True)
        self.convert_to_functional(critic, "critic_network", create_target_params=True)
        device = next((p.device for p in policy.encoder.parameters()), None)
        self.distribution, self.value_codec = policy.distribution, value_codec.to(device)
        self.register_buffer("discounts", torch.tensor(policy.discounts, device=device).float())
        self._selected_out_keys: list[str] | None = None

    def _check_parts(self) -> None:
        """Raise ValueError for critics or a codec that don't fit the policy or the options."""
        critic, codec = getattr(self.critic_network, "module", None), self.value_codec
        for part, name, expected in (
            (critic, "num_discounts", len(self.discounts)),
            (codec, "num_discounts", len(self.discounts)),
            (critic, "event_shape", codec.event_shape),
        ):
            if (found := getattr(part, name, expected)) != expected:
                raise ValueError(
                    "critics and value codec must fit the policy and one another, got "
                    f"{type(part).__name__} with {name}={found} in place of {expected}. Use "
                    "make_critic(policy, value_codec=codec)."
                )
        kind = self.distribution.space.kind
        if not self.takes_actions and kind != "discrete":
            raise ValueError(
                "critics that list the values of all actions need a single discrete action, got a "
                f"{kind} space. Use make_critic(policy, takes_actions=True)."
            )
        if self.takes_actions and self.online_coeff > 0 and not self.distribution.differentiable:
            raise ValueError(
                "the online actor term needs samples with a gradient, which "
                f"{type(self.distribution).__name__} doesn't have. Set online_coeff=0, or choose "
                "another distribution."
            )

    @property
    def takes_actions(self) -> bool:
        """True if critics take the action as an input, False if they list the values of all."""
        # Not by the action's key: set_keys may name it only after the loss was made.
        return len(self.critic_network.in_keys) > 1

    @property
    def _moves_statistics(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _absorb_scale(self) -> None:
        """Let the codec move changes of its scale into the critics' last layers."""
        params = (self.critic_network_params, self.target_critic_network_params)
        module = getattr(self.critic_network, "module", None)
        if module is not None:
            self.value_codec.absorb_scale(module, *(p["module"] for p in params))

    def reset_parameters_recursive(self) -> None:
        super().reset_parameters_recursive()
        for name in ("actor_network_params", "critic_network_params"):
            self._modules[f"target_{name}"].data.update_(self._modules[name].data)
        self.value_codec.reset_parameters()

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries read from the tensordict; the mask, last, may be missing."""
        inputs = self._observation_keys()
        following = [*inputs, self.tensor_keys.reward, self.tensor_keys.terminated]
        following = [("next", *keys.as_tuple(key)) for key in following]
        return [*inputs, self.tensor_keys.action, *following, self.tensor_keys.mask]

    @property
    def _dispatch_keys(self) -> list[NestedKey]:
        """`in_keys` and the optional entries: marks of trials, importance weights."""
        names = self.tensor_keys
        ends = ("next", *keys.as_tuple(names.done))
        return list(dict.fromkeys([*self.in_keys, names.is_init, ends, names.priority_weight]))

    @property
    def out_keys(self) -> list[str]:
        return self._selected_out_keys or self.out_keys_source

    # Not by TorchRL's hook, which takes a batch without a mask for a call with keywords.
    def select_out_keys(self, *out_keys: str) -> ActorCriticLoss:
        """Write these entries alone from now on; raise ValueError for an unknown one."""
        for key in out_keys:
            check_choice("a selected key", key, self.out_keys)
        self._selected_out_keys = list(out_keys)
        return self

    def reset_out_keys(self) -> ActorCriticLoss:
        """Write all entries again."""
        self._selected_out_keys = None
        return self

    def _observation_keys(self) -> list[NestedKey]:
        return list(dict.fromkeys([*self._encoder_keys(), *self._actor_keys()]))

    def _encoder_keys(self) -> list[NestedKey]:
        read = self.encoder_network.in_keys
        return [key for key in read if not keys.as_tuple(key)[-1].startswith("_")]

    def _actor_keys(self) -> list[NestedKey]:
        return [key for key in self.actor_network.in_keys if key != self._state_key]

    @property
    def _state_key(self) -> NestedKey:
        written = self.encoder_network.out_keys
        shared = [key for key in self.actor_network.in_keys if key in written]
        return _own_name(self.tensor_keys.state, shared)

    def check(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Raise for data that would spoil an update; return the batch with the entry ``checked``.

        Its rows hold one trial each. The loss doesn't look at such a batch again: on a GPU the host
        would wait for it. Call this on a CPU before the batch is sent.
        """
        batch = self._read(tensordict, compact=False, device=torch.device("cpu"))
        batch.action(self.distribution.space)
        return batch.tensordict.set(keys.CHECKED, batch.steps.full_mask)

    def _read(
        self, tensordict: TensorDictBase, compact: bool | None, device: torch.device | None = None
    ) -> SliceBatch:
        dtypes = (self.discounts.dtype, next(self.parameters(), self.discounts).dtype)
        lowest = min(dtypes, key=lambda dtype: dtype.itemsize)
        if lowest.itemsize < 4:
            raise TypeError(
                f"the loss needs weights of float32 or more, got {lowest}. Compute under "
                "torch.autocast(device, torch.bfloat16), as AMAGOTrainer(precision='bf16') does."
            )
        inputs, device = self._observation_keys(), device or self.discounts.device
        return SliceBatch(tensordict, self.tensor_keys, inputs, compact, self.reward_scale, device)

    def _encode(self, batch: SliceBatch) -> Tensor:
        """Compute the states of T + 1 steps, ``[B, S, D]``."""
        mask_BT = batch.steps.full_mask
        mask_BS = torch.cat([mask_BT[:, :1], mask_BT], 1)
        inputs = TensorDict(batch_size=mask_BS.shape, device=batch.tensordict.device)
        for key in self._encoder_keys():
            inputs.set(key, batch.sequence(key))
        inputs.set(keys.MASK, mask_BS).set(keys.CHECKED, mask_BS)
        return self._run(self.encoder_network, self.encoder_network_params, inputs, self._state_key)

    def _encode_states(self, batch: SliceBatch) -> tuple[HeadInputs, HeadInputs]:
        """Return the heads' inputs at each step, and one step on, without gradient."""
        steps, state_BSD = batch.steps, self._encode(batch)
        inputs = {self._state_key: steps.select(state_BSD[:, :-1])}
        next_inputs = {self._state_key: steps.select(state_BSD[:, 1:]).detach()}
        for key in self._actor_keys():
            x_BS = batch.sequence(key)
            # Action masks may be all False on padding and after termination; fill with True.
            fill = 0 if x_BS.is_floating_point() else 1
            inputs[key] = steps.select(x_BS[:, :-1], fill)
            next_M = steps.select(x_BS[:, 1:], fill)
            ended_M = expand_as_right(steps.select(batch.terminated()).squeeze(-1), next_M)
            next_inputs[key] = next_M.masked_fill(ended_M, fill)
        return inputs, next_inputs

    def _policy(self, params: TensorDictBase, inputs: HeadInputs) -> Distribution:
        """Return distributions of action vectors, ``[M, G]``."""
        out_key = _own_name(self.tensor_keys.action_params, self.actor_network.out_keys)
        inputs = TensorDict(inputs)
        return self.distribution(self._run(self.actor_network, params, inputs, out_key))

    def _predict(
        self, params: TensorDictBase, state_MD: Tensor, action_KMGA: Tensor | None = None
    ) -> Tensor:
        """Return the critics' raw predictions, ``[M, C, G, A, *]`` or ``[K, M, C, G, *]``."""
        names, network = self.tensor_keys, self.critic_network
        state_key = _own_name(self._state_key, network.in_keys)
        inputs = TensorDict({state_key: state_MD})
        if action_KMGA is not None:
            others = [key for key in network.in_keys if key != state_key]
            inputs.set(_own_name(names.action_vector, others), action_KMGA)
        return self._run(network, params, inputs, _own_name(names.action_value, network.out_keys))

    def _run(
        self,
        network: TensorDictModuleBase,
        params: TensorDictBase,
        inputs: TensorDictBase,
        out_key: NestedKey,
    ) -> Tensor:
        # train() and eval() of the loss don't reach functional networks, which are no submodules.
        if network.training != self.training:
            network.train(self.training)
        # As they are: to make parameters of detached tensors is what torch.compile can't do.
        with params.to_module(network, preserve_module_state=False):
            return network(inputs).get(out_key)

    def _reduce(
        self, batch: SliceBatch, terms: dict[str, Tensor], metrics: dict[str, Tensor]
    ) -> TensorDict:
        """Reduce unreduced losses over the steps that count, and put the metrics beside them."""
        mask_M, weight_M = batch.steps.mask, batch.importance(self.use_prioritized_weights)
        out = TensorDict(device=mask_M.device)
        for name, hook in (("loss_actor", self.actor_mask), ("loss_qvalue", self.critic_mask)):
            if name not in terms:
                out.set(name, torch.zeros((), device=mask_M.device))
                continue
            term = terms[name]
            mask = expand_as_right(mask_M, term)
            if hook is not None:
                mask = _edited(hook, batch, term, mask)
            weight = None if weight_M is None else expand_as_right(weight_M, term)
            if self.reduction == "mean":
                loss = masked_mean(term, mask, weight)
                if hook is not None or weight is not None:
                    counts = torch.ones_like(term) if weight is None else weight.expand_as(term)
                    loss = loss * self._rank_factor(mask_M, torch.where(mask, counts, 0.0))
                out.set(name, loss)
                continue
            term = torch.where(mask, term if weight is None else weight * term, 0.0)
            is_sum = self.reduction == "sum"
            out.set(name, term.sum() * self._rank_factor(mask_M) if is_sum else batch.restore(term))
        out.update(metrics)
        return out if self._selected_out_keys is None else out.select(*self.out_keys)

    def _rank_factor(self, mask_M: Tensor, counts: Tensor | None = None) -> Tensor:
        """Return a factor for the sum or mean (by counts) of one of several data-parallel ranks."""
        # The optimiser step adds up their losses by each rank's fraction of the real steps.
        own = torch.stack([mask_M.sum(), (mask_M if counts is None else counts).sum()]).float()
        tiny = torch.finfo(own.dtype).tiny
        fraction = own / self.all_reduce(own)[0].clamp_min(tiny)
        return (1.0 if counts is None else fraction[1]) / fraction[0].clamp_min(tiny)


def _edited(hook: MaskHook, batch: SliceBatch, term: Tensor, mask: Tensor) -> Tensor:
    """Return the mask that a user's hook makes of the real steps; padding stays out."""
    steps = batch.steps
    full = steps.restore(mask.expand_as(term))
    # A copy, since a hook may edit it in place, and the mask may be a view of the batch's.
    copy = full.clone(memory_format=torch.contiguous_format)
    return steps.select(hook(batch.tensordict, steps.restore(term.detach()), copy) & full)


def _own_name(name: NestedKey, names: Sequence[NestedKey]) -> NestedKey:
    """Return `name` if it is one of a network's, else the first of them."""
    return name if name in names or not names else names[0]
