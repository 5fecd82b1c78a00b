"""A loss over three networks: an encoder, an actor and critics, with their keys, parameters and calls.

Legend: B batch, T steps, S = T + 1 states, D features, M the steps that count, see
:class:`~torchrl_amago.objectives._slice_batch.Slices`.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase
from tensordict.utils import expand_as_right
from torch import Tensor
from torch.distributions import Distribution
from torchrl.objectives import LossModule

from torchrl_amago import keys
from torchrl_amago.modules.distributions import PolicyDistribution
from torchrl_amago.modules.value_codec import ValueCodec
from torchrl_amago.objectives._checks import check_precision
from torchrl_amago.objectives._critics import ActionInput, CriticAnswers, ListedActions
from torchrl_amago.objectives._slice_batch import Slices


class ActorCriticLoss(LossModule):
    """Keys, parameters and calls of the networks; a subclass writes the equations.

    Args:
        encoder_network: inputs of a step -> state, in recurrent mode.
        actor_network: state, and whatever observations it reads besides -> action parameters.
        critic_network: state, and actions if it takes them -> values. Actor and critics get targets.
        distribution: what the actor's parameters mean.
        value_codec: how critics write down values.
    """

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
        self,
        encoder_network: TensorDictModuleBase,
        actor_network: TensorDictModuleBase,
        critic_network: TensorDictModuleBase,
        distribution: PolicyDistribution,
        value_codec: ValueCodec,
    ) -> None:
        super().__init__()
        self.convert_to_functional(encoder_network, "encoder_network", create_target_params=False)
        self.convert_to_functional(actor_network, "actor_network", create_target_params=True)
        self.convert_to_functional(critic_network, "critic_network", create_target_params=True)
        self.distribution, self.value_codec = distribution, value_codec
        self._selected_out_keys: list[str] | None = None

    @property
    def takes_actions(self) -> bool:
        """True if critics take the action as an input, False if they list the values of all."""
        # Not by the action's key: set_keys may name it only after the loss was made.
        return len(self.critic_network.in_keys) > 1

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries read from the tensordict, in the order :func:`dispatch` takes them.

        The mask, last, may be missing: all steps are real then.
        """
        inputs = list(dict.fromkeys([*self._input_keys(), *self._actor_keys()]))
        following = [*inputs, self.tensor_keys.reward, self.tensor_keys.terminated]
        following = [("next", *_as_tuple(key)) for key in following]
        return [*inputs, self.tensor_keys.action, *following, self.tensor_keys.mask]

    @property
    def _dispatch_keys(self) -> list[NestedKey]:
        """`in_keys` and the optional entries: marks of trials, importance weights."""
        names = self.tensor_keys
        ends = ("next", *_as_tuple(names.done))
        return list(dict.fromkeys([*self.in_keys, names.is_init, ends, names.priority_weight]))

    @property
    def out_keys(self) -> list[str]:
        """Entries written."""
        return self._selected_out_keys or self.out_keys_source

    # Not by TorchRL's hook, which takes a batch without a mask for a call with keywords.
    def select_out_keys(self, *out_keys: str) -> ActorCriticLoss:
        """Write these entries alone from now on.

        Raises:
            ValueError: if there is no such entry.
        """
        if missing := set(out_keys) - set(self.out_keys):
            raise ValueError(
                f"out_keys to select must be among {self.out_keys}, got {sorted(map(str, missing))}. "
                "reset_out_keys() brings back all."
            )
        self._selected_out_keys = list(out_keys)
        return self

    def reset_out_keys(self) -> ActorCriticLoss:
        """Write all entries again."""
        self._selected_out_keys = None
        return self

    def reset_parameters_recursive(self) -> None:
        """Draw all weights anew; targets begin as their copies, statistics from their start."""
        super().reset_parameters_recursive()
        for name in ("actor_network_params", "critic_network_params"):
            self._modules[f"target_{name}"].data.update_(self._modules[name].data)
        self.value_codec.reset_parameters()

    # --- inputs ---

    def _input_keys(self) -> list[NestedKey]:
        return [key for key in self.encoder_network.in_keys if not _is_private(key)]

    def _actor_keys(self) -> list[NestedKey]:
        """Observations that go straight to the actor."""
        return [key for key in self.actor_network.in_keys if key != self._state_key]

    @property
    def _state_key(self) -> NestedKey:
        written = self.encoder_network.out_keys
        shared = [key for key in self.actor_network.in_keys if key in written]
        return _own_name(self.tensor_keys.state, shared)

    def _read(self, tensordict: TensorDictBase, compact: bool | None) -> Slices:
        if not torch.compiler.is_compiling():
            check_precision(self.discounts, next(self.parameters(), self.discounts))
        inputs = {*self._input_keys(), *self._actor_keys()}
        device = self.discounts.device
        return Slices(tensordict, self.tensor_keys, inputs, compact, self.reward_scale, device)

    @property
    def _moves_statistics(self) -> bool:
        return self.training and torch.is_grad_enabled()

    def _states(self, batch: Slices) -> tuple[dict[NestedKey, Tensor], dict[NestedKey, Tensor]]:
        """Inputs of the heads: at the slice's steps, and one step on, there without gradient."""
        steps = batch.steps
        state_BSD = self._encode(batch)
        current = {self._state_key: steps.select(state_BSD[:, :-1])}
        following = {self._state_key: steps.select(state_BSD[:, 1:]).detach()}
        actor_keys = self._actor_keys()
        if not actor_keys:
            return current, following
        ended_M = steps.select(batch.terminated()).squeeze(-1)
        for key in actor_keys:
            x_BS = batch.sequence(key)
            # Nobody may act in padding or after the end: there an action mask may allow nothing.
            fill = 0 if x_BS.is_floating_point() else 1
            current[key] = steps.select(x_BS[:, :-1], fill)
            next_M = steps.select(x_BS[:, 1:], fill)
            following[key] = next_M.masked_fill(expand_as_right(ended_M, next_M), fill)
        return current, following

    def _encode(self, batch: Slices) -> Tensor:
        """States of T + 1 steps."""
        mask_BT = batch.steps.full_mask
        mask_BS = torch.cat([mask_BT[:, :1], mask_BT], 1)
        inputs = TensorDict(batch_size=mask_BS.shape, device=batch.tensordict.device)
        for key in self._input_keys():
            inputs.set(key, batch.sequence(key))
        inputs.set(keys.MASK, mask_BS)
        return self._run(self.encoder_network, self.encoder_network_params, inputs, self._state_key)

    # --- networks ---

    def _policy(self, inputs: dict[NestedKey, Tensor], params: TensorDictParams) -> Distribution:
        out_key = _own_name(self.tensor_keys.action_params, self.actor_network.out_keys)
        inputs = TensorDict(inputs)
        return self.distribution(self._run(self.actor_network, params, inputs, out_key))

    def _answers(self, params: TensorDictParams, num_samples: int) -> CriticAnswers:
        names, network = self.tensor_keys, self.critic_network
        state_key = _own_name(self._state_key, network.in_keys)
        action_key = _own_name(
            names.action_vector, [key for key in network.in_keys if key != state_key]
        )
        out_key = _own_name(names.action_value, network.out_keys)

        def ask(state: Tensor, action: Tensor | None = None, frozen: bool = False) -> Tensor:
            inputs = TensorDict({state_key: state})
            if action is not None:
                inputs.set(action_key, action)
            used = self._frozen(params) if frozen else params
            return self._run(network, used, inputs, out_key)

        if self.takes_actions:
            return ActionInput(self.value_codec, ask, num_samples)
        return ListedActions(self.value_codec, ask)

    def _frozen(self, params: TensorDictParams) -> TensorDictBase:
        """Detached critic parameters, which score the policy's own actions."""
        return params.detach()

    def _run(
        self,
        network: TensorDictModuleBase,
        params: TensorDictBase,
        inputs: TensorDictBase,
        out_key: NestedKey,
    ) -> Tensor:
        # Functional networks are not submodules, so train() and eval() of the loss do not reach them.
        if network.training != self.training:
            network.train(self.training)
        # As they are: to make parameters of detached tensors is what torch.compile can't do.
        with params.to_module(network, preserve_module_state=False):
            return network(inputs).get(out_key)


@contextmanager
def evaluating(loss: LossModule) -> Iterator[None]:
    """Evaluation mode for as long as this lasts."""
    was_training = loss.training
    loss.eval()
    try:
        yield
    finally:
        loss.train(was_training)


def _own_name(name: NestedKey, names: Sequence[NestedKey]) -> NestedKey:
    """The name under which networks pass something on: `name` if it is theirs, else the first of theirs."""
    return name if name in names or not names else names[0]


def _is_private(key: NestedKey) -> bool:
    return _as_tuple(key)[-1].startswith("_")


def _as_tuple(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)
