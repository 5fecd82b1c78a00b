"""AMAGO's objective: off-policy actor-critic over long sequences, for many discounts at once.

Legend: B batch, T steps, S = T + 1 states, C critics, G discounts, A action size, D features,
M the steps that count: all of ``[B, T]``, or the real ones alone in one row (`compact`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase, TensorDictParams
from tensordict.nn import TensorDictModule, TensorDictModuleBase, dispatch
from torch import Tensor
from torch.nn.functional import one_hot
from torchrl.modules import set_recurrent_mode
from torchrl.objectives import LossModule

from torchrl_amago import keys
from torchrl_amago.modules.distributions import (
    CLIP_HIGH,
    CLIP_LOW,
    ClippedCategorical,
    clip_probabilities,
)
from torchrl_amago.modules.policy import DISCOUNTS
from torchrl_amago.modules.value_codec import PopArt, ValueCodec
from torchrl_amago.objectives.functional import (
    FILTERS,
    AdvantageFilter,
    draw_critic_subset,
    expected_value,
    masked_mean,
    n_step_target,
    reduce_ensemble,
    value_of_action,
)
from torchrl_amago.steps import Steps

FilterSpace = Literal["raw", "normalized", "value"]


class AMAGOLoss(LossModule):
    """One update of AMAGO for discrete actions (arXiv 2310.09971, Section 4 and Appendix A).

    For every step of every slice, and every discount g at once:

        s_0..s_T   = encoder(inputs of T + 1 steps)                 one sequence-model forward
        Q_c(s, .)  = critic_c(s)                                    one online, one target pass
        target     = r + ... + g^n V'(s_{t+n}),  V' = min over a random pair of target critics
                                                      of  sum_a pi'(a|s) Q'_c(s, a)
        loss_qvalue = critic_coeff * (Q_c(s, a) - target)^2          in the value codec's space
        loss_actor  = - online_coeff  * min_c sum_a pi(a|s) Q_c(s, a).detach()
                      - offline_coeff * filter(A(s, a)) * log pi(a|s)

    Only ``terminated`` stops bootstrapping. Steps under a False mask count for nothing, whatever
    they hold. The encoder learns from both losses; targets use the online encoder without gradient.

    Args:
        encoder_network: inputs of a step -> ``"state" [B, T, D]``, in recurrent mode.
        actor_network: ``"state" -> "action_params" [B, T, G, A]`` (logits).
        critic_network: ``"state" -> "action_value" [B, T, C, G, A]``.
        value_codec: how critics write down values; default :class:`PopArt`.
        discounts: G discounts in [0, 1).
        action_space: how actions are stored, ``"categorical"`` (``[B, T]``) or ``"one_hot"``
            (``[B, T, A]``).
        num_target_critics: how many members are drawn for each TD target.
        target_reduction: ``"min"`` or ``"mean"`` over them; default ``"min"`` if there is an online
            actor term, else ``"mean"`` (the minimum underestimates without it).
        n_step: rewards summed in a TD target.
        reward_scale: factor of rewards in the loss only.
        online_coeff: weight of the policy-gradient term.
        offline_coeff: weight of the filtered imitation term.
        critic_coeff: weight of the critics' loss.
        advantage_filter: ``"binary"``, ``"exponential"``, ``"leaky_relu"``, a function of the
            advantage, or None to imitate everything (with ``online_coeff=0``: behaviour cloning,
            critics are left alone).
        filter_space: what the filter sees: raw critic outputs, the codec's normalised values, or
            values in reward units times ``reward_scale``.
        use_target_actor: let the target actor choose the TD target's actions.
        clip_probs: bounds of action probabilities.
        soften_actions: clip the one-hot of a stored action as the policy's probabilities are before
            it selects Q(s, a) (0.996 and four times 0.001 of five actions), as the public AMAGO
            code does, so that stored and chosen actions are valued alike.
        compact: run the heads and the equations on real steps alone, in one row, instead of on all of
            ``[B, T]``: the same numbers for less work where trials differ in length. Shapes then
            depend on the data; default only on CPU and outside of `torch.compile`.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over real steps.

    Returns:
        ``loss_actor`` and ``loss_qvalue``, whose sum is the total loss, and detached metrics of the
        last discount in environment reward units: ``q_value``, ``td_target``, ``td_error``,
        ``advantage``, ``filter``, ``entropy`` (nats).

    Raises:
        ValueError: for arguments out of range.
        KeyError: if the tensordict lacks an entry.

    Example:
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_amago import MetaFrozenLake, make_critic, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> policy = make_policy(env, context_length=45)
        >>> loss = AMAGOLoss(policy.encoder, policy.actor, make_critic(policy, env))
        >>> target_update = SoftUpdate(loss, tau=0.003)  # step it after every optimiser step
        >>> batch = env.rollout(6, policy, break_when_any_done=False)
        >>> sorted(k for k in loss(batch).keys() if k.startswith("loss"))
        ['loss_actor', 'loss_qvalue']
    """

    @dataclass
    class _AcceptedKeys:
        action: NestedKey = keys.ACTION
        reward: NestedKey = "reward"
        terminated: NestedKey = "terminated"
        state: NestedKey = keys.STATE
        action_params: NestedKey = keys.ACTION_PARAMS
        action_value: NestedKey = keys.ACTION_VALUE
        mask: NestedKey = keys.MASK
        priority: NestedKey = "td_error"

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

    METRICS = ("q_value", "td_target", "td_error", "advantage", "filter", "entropy")

    def __init__(
        self,
        encoder_network: TensorDictModuleBase,
        actor_network: TensorDictModuleBase,
        critic_network: TensorDictModuleBase,
        *,
        value_codec: ValueCodec | None = None,
        discounts: Sequence[float] = DISCOUNTS,
        action_space: Literal["categorical", "one_hot"] = "categorical",
        num_target_critics: int = 2,
        target_reduction: Literal["min", "mean"] | None = None,
        n_step: int = 1,
        reward_scale: float = 10.0,
        online_coeff: float = 1.0,
        offline_coeff: float = 0.1,
        critic_coeff: float = 10.0,
        advantage_filter: str | AdvantageFilter | None = "binary",
        filter_space: FilterSpace = "raw",
        use_target_actor: bool = True,
        clip_probs: tuple[float, float] = (CLIP_LOW, CLIP_HIGH),
        soften_actions: bool = True,
        compact: bool | None = None,
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        super().__init__()
        _check_arguments(discounts, action_space, num_target_critics, n_step, advantage_filter)
        self.convert_to_functional(encoder_network, "encoder_network", create_target_params=False)
        self.convert_to_functional(actor_network, "actor_network", create_target_params=True)
        self.convert_to_functional(critic_network, "critic_network", create_target_params=True)
        self.value_codec = value_codec if value_codec is not None else PopArt(len(discounts))
        self.register_buffer("discounts", torch.tensor(discounts, dtype=torch.float32))
        self.action_space = action_space
        self.num_target_critics = num_target_critics
        self.target_reduction = target_reduction or ("min" if online_coeff > 0 else "mean")
        self.n_step, self.reward_scale = n_step, reward_scale
        self.online_coeff, self.offline_coeff = online_coeff, offline_coeff
        self.critic_coeff = critic_coeff
        self.filter = FILTERS.get(advantage_filter, advantage_filter)
        self.filter_space = filter_space
        self.use_target_actor = use_target_actor
        self.clip_probs, self.soften_actions = clip_probs, soften_actions
        self.compact = compact
        self.reduction = reduction

    @property
    def uses_critic(self) -> bool:
        """Whether the actor needs the critics, and so whether they are trained."""
        return self.online_coeff > 0 or self.filter is not None

    @property
    def in_keys(self) -> list[NestedKey]:
        """Entries read from the tensordict, in the order :func:`dispatch` takes them."""
        inputs = [*self._input_keys(), self.tensor_keys.action]
        following = [*self._input_keys(), self.tensor_keys.reward, self.tensor_keys.terminated]
        return inputs + [("next", *_as_tuple(key)) for key in following]

    @property
    def out_keys(self) -> list[NestedKey]:
        """Entries written."""
        metrics = self.METRICS if self.uses_critic else ("entropy",)
        return ["loss_actor", "loss_qvalue", *metrics]

    @dispatch
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the losses of a batch of slices ``[B, T]``, and update the codec's statistics."""
        mask_BT = self._mask(tensordict)
        steps = Steps(mask_BT, self.compact)
        state_BSD = self._encode(tensordict, mask_BT)
        state_MD = steps.select(state_BSD[:, :-1])
        next_state_MD = steps.select(state_BSD[:, 1:]).detach()
        action_M = steps.select(self._action_index(tensordict))
        policy_MG, next_policy_MG = self._policies(state_MD, next_state_MD)
        terms, metrics = {}, {"entropy": policy_MG.entropy()[..., -1]}
        value_MCG = weight_MG = None
        if self.uses_critic:
            q_MCGA = self._action_values(state_MD, self.critic_network_params)
            q_MCG = self._of_stored_action(q_MCGA, action_M)
            value_MCG = expected_value(q_MCGA.detach(), policy_MG.probs)
            target_MG = self._td_target(tensordict, next_state_MD, next_policy_MG, steps)
            self.value_codec.update(target_MG, steps.mask.unsqueeze(-1))
            terms["loss_qvalue"] = self.critic_coeff * self.value_codec.loss(q_MCG, target_MG)
            advantage_MG = self._advantage(q_MCG, value_MCG, self.filter_space)
            weight_MG = self._imitation_weight(advantage_MG)
            metrics |= self._value_metrics(q_MCG, target_MG, advantage_MG, weight_MG)
            priority_BT = steps.restore(metrics["td_error"].detach())
            tensordict.set(self.tensor_keys.priority, priority_BT)
        terms["loss_actor"] = self._actor_term(policy_MG, action_M, value_MCG, weight_MG)
        return self._reduce(terms, metrics, steps)

    def estimates(
        self, tensordict: TensorDictBase, filter_space: FilterSpace | None = None
    ) -> TensorDict:
        """What critics think of a batch, by the same functions as the loss; nothing is updated.

        Args:
            tensordict: slices ``[B, T]``.
            filter_space: as the constructor's; default that of training.

        Returns:
            ``q_value``, ``value``, ``advantage`` in reward units times ``reward_scale`` (ensemble
            means), ``q_value_std``, ``value_std`` over the ensemble, and ``filter``: ``[B, T, G]``.
        """
        with torch.no_grad(), set_recurrent_mode(True):
            mask_BT = self._mask(tensordict)
            state_BTD = self._encode(tensordict, mask_BT)[:, :-1]
            policy_BTG = self._policy(state_BTD, self.actor_network_params)
            q_BTCGA = self._action_values(state_BTD, self.critic_network_params)
            q_BTCG = self._of_stored_action(q_BTCGA, self._action_index(tensordict))
            value_BTCG = expected_value(q_BTCGA, policy_BTG.probs)
            space = filter_space or self.filter_space
            weight_BTG = self._imitation_weight(self._advantage(q_BTCG, value_BTCG, space))
            q, value = self.value_codec.decode(q_BTCG), self.value_codec.decode(value_BTCG)
        return TensorDict(
            q_value=q.mean(-2),
            value=value.mean(-2),
            advantage=q.mean(-2) - value.mean(-2),
            q_value_std=q.std(-2),
            value_std=value.std(-2),
            filter=weight_BTG,
            batch_size=mask_BT.shape,
        )

    # --- inputs ---

    def _input_keys(self) -> list[NestedKey]:
        return [key for key in self.encoder_network.in_keys if not _is_private(key)]

    def _mask(self, tensordict: TensorDictBase) -> Tensor:
        mask_BT = tensordict.get(self.tensor_keys.mask, None)
        if mask_BT is None:
            return torch.ones(tensordict.shape, dtype=torch.bool, device=self.discounts.device)
        mask_BT = mask_BT.reshape(tensordict.shape)
        if not torch.compiler.is_compiling() and not mask_BT.any():
            warnings.warn(
                "every step of the batch is masked: the loss is zero and no statistic moves. "
                "Check the replay buffer's sampler.",
                stacklevel=2,
            )
        return mask_BT

    def _encode(self, tensordict: TensorDictBase, mask_BT: Tensor) -> Tensor:
        """States of T + 1 steps: the first root entry, then what every step led to."""
        following = tensordict.get("next")
        mask_BS = torch.cat([mask_BT[:, :1], mask_BT], 1)
        inputs = TensorDict(batch_size=mask_BS.shape, device=tensordict.device)
        for key in self._input_keys():
            first, rest = tensordict.get(key, None), following.get(key, None)
            if first is None or rest is None:
                raise KeyError(
                    f"the loss reads {key!r} at the root and under 'next', but it is missing "
                    f"{'at the root' if first is None else 'under next'}. Collect with the same "
                    "transforms as the policy was built for."
                )
            inputs.set(key, torch.cat([first[:, :1], rest], 1))
        inputs.set(keys.MASK, mask_BS)
        _follow_mode(self.encoder_network, self.training)
        with self.encoder_network_params.to_module(self.encoder_network):
            return self.encoder_network(inputs).get(self.tensor_keys.state)

    def _action_index(self, tensordict: TensorDictBase) -> Tensor:
        action = tensordict.get(self.tensor_keys.action)
        index_BT = action.argmax(-1) if self.action_space == "one_hot" else action
        if index_BT.shape != tensordict.shape:
            raise ValueError(
                f"actions must be [B, T] indices (action_space='categorical') or [B, T, A] "
                f"(action_space='one_hot'); got {tuple(action.shape)} for a batch of "
                f"{tuple(tensordict.shape)} with action_space={self.action_space!r}."
            )
        return index_BT.long()

    # --- networks ---

    def _policy(self, state: Tensor, params: TensorDictParams) -> ClippedCategorical:
        logits = self._run_head(self.actor_network, params, state, self.tensor_keys.action_params)
        return ClippedCategorical(logits, *self.clip_probs)

    def _action_values(self, state: Tensor, params: TensorDictParams) -> Tensor:
        return self._run_head(self.critic_network, params, state, self.tensor_keys.action_value)

    def _run_head(
        self,
        network: TensorDictModuleBase,
        params: TensorDictParams,
        state: Tensor,
        out_key: NestedKey,
    ) -> Tensor:
        _follow_mode(network, self.training)
        td = TensorDict({self.tensor_keys.state: state}, batch_size=state.shape[:-1])
        with params.to_module(network):
            return network(td).get(out_key)

    def _policies(
        self, state_MD: Tensor, next_state_MD: Tensor
    ) -> tuple[ClippedCategorical, ClippedCategorical]:
        """Action distributions at the slice's steps, and those the TD target asks one step on."""
        online, target = self.actor_network_params, self.target_actor_network_params
        policy_MG = self._policy(state_MD, online)
        if not self.uses_critic:
            return policy_MG, policy_MG
        with torch.no_grad():
            params = target if self.use_target_actor else online
            return policy_MG, self._policy(next_state_MD, params)

    # --- equations ---

    @torch.no_grad()
    def _td_target(
        self,
        tensordict: TensorDictBase,
        next_state_MD: Tensor,
        next_policy_MG: ClippedCategorical,
        steps: Steps,
    ) -> Tensor:
        next_q_MCGA = self._action_values(next_state_MD, self.target_critic_network_params)
        next_value_MCG = self.value_codec.decode(expected_value(next_q_MCGA, next_policy_MG.probs))
        *shape_M, C, G = next_value_MCG.shape
        subset_MKG = draw_critic_subset(
            (*shape_M, self.num_target_critics, G), C, next_value_MCG.device
        )
        next_value_MG = reduce_ensemble(next_value_MCG, subset_MKG, self.target_reduction)
        # n-step sums follow a row's steps, so they are made where rows are whole.
        following, mask_BT1 = tensordict.get("next"), steps.full_mask.unsqueeze(-1)
        reward_BT1 = following.get(self.tensor_keys.reward).reshape(mask_BT1.shape)
        terminated_BT1 = following.get(self.tensor_keys.terminated).reshape(mask_BT1.shape)
        target_BTG = n_step_target(
            torch.where(mask_BT1, self.reward_scale * reward_BT1, 0.0),
            terminated_BT1 & mask_BT1,
            steps.restore(next_value_MG),
            self.discounts,
            mask_BT1,
            self.n_step,
        )
        return steps.select(target_BTG)

    def _of_stored_action(self, q_MCGA: Tensor, action_M: Tensor) -> Tensor:
        """Q(s, a) of the action taken: ``[M, C, G]``."""
        if not self.soften_actions:
            return value_of_action(q_MCGA, action_M)
        num_actions = q_MCGA.shape[-1]
        one_hot_MA = one_hot(action_M.clamp(0, num_actions - 1), num_actions).to(q_MCGA.dtype)
        return expected_value(
            q_MCGA, clip_probabilities(one_hot_MA, *self.clip_probs).unsqueeze(-2)
        )

    def _advantage(self, q_MCG: Tensor, value_MCG: Tensor, space: FilterSpace) -> Tensor:
        """A(s, a) = Q(s, a) - V(s), ensemble means, without gradient."""
        to_space = {
            "raw": lambda x: x,
            "normalized": self.value_codec.normalized,
            "value": self.value_codec.decode,
        }[space]
        return to_space(q_MCG.detach()).mean(-2) - to_space(value_MCG.detach()).mean(-2)

    def _imitation_weight(self, advantage_MG: Tensor) -> Tensor:
        if self.filter is None:
            return torch.ones_like(advantage_MG)
        return self.filter(advantage_MG)

    def _actor_term(
        self,
        policy_MG: ClippedCategorical,
        action_M: Tensor,
        value_MCG: Tensor | None,
        weight_MG: Tensor | None,
    ) -> Tensor:
        loss_MG = torch.zeros_like(policy_MG.logits[..., 0])
        if self.online_coeff > 0:
            worst_MG = self.value_codec.normalized(value_MCG.amin(-2))
            loss_MG = loss_MG - self.online_coeff * worst_MG
        if self.offline_coeff > 0:
            log_prob_MG = value_of_action(policy_MG.logits, action_M)
            imitation_MG = log_prob_MG if weight_MG is None else weight_MG * log_prob_MG
            loss_MG = loss_MG - self.offline_coeff * imitation_MG
        return loss_MG

    # --- outputs ---

    @torch.no_grad()
    def _value_metrics(
        self, q_MCG: Tensor, target_MG: Tensor, advantage_MG: Tensor, weight_MG: Tensor
    ) -> dict[str, Tensor]:
        """Of the last discount, ensemble means, values in environment reward units: ``[M]`` each."""
        q_M = self.value_codec.decode(q_MCG).mean(-2)[..., -1] / self.reward_scale
        target_M = target_MG[..., -1] / self.reward_scale
        return {
            "q_value": q_M,
            "td_target": target_M,
            "td_error": (q_M - target_M).abs(),
            "advantage": advantage_MG[..., -1],
            "filter": weight_MG[..., -1],
        }

    def _reduce(
        self, terms: dict[str, Tensor], metrics: dict[str, Tensor], steps: Steps
    ) -> TensorDict:
        out = TensorDict(device=steps.mask.device)
        for name in ("loss_actor", "loss_qvalue"):
            term = terms.get(name)
            if term is None:
                term = torch.zeros(steps.mask.shape, device=steps.mask.device)
            mask = steps.mask.reshape(steps.mask.shape + (1,) * (term.ndim - steps.mask.ndim))
            if self.reduction == "none":
                out.set(name, steps.restore(torch.where(mask, term, 0.0)))
            elif self.reduction == "sum":
                out.set(name, torch.where(mask, term, 0.0).sum())
            else:
                out.set(name, masked_mean(term, mask))
        for name, value_M in metrics.items():
            out.set(name, masked_mean(value_M.detach(), steps.mask))
        return out


def _follow_mode(network: TensorDictModuleBase, training: bool) -> None:
    # Functional networks are not submodules, so train() and eval() of the loss do not reach them.
    if network.training != training:
        network.train(training)


def _is_private(key: NestedKey) -> bool:
    return _as_tuple(key)[-1].startswith("_")


def _as_tuple(key: NestedKey) -> tuple[str, ...]:
    return (key,) if isinstance(key, str) else tuple(key)


def _check_arguments(
    discounts: Sequence[float],
    action_space: str,
    num_target_critics: int,
    n_step: int,
    advantage_filter: object,
) -> None:
    if not discounts or not all(0.0 <= discount < 1.0 for discount in discounts):
        raise ValueError(f"discounts must be numbers in [0, 1), got {discounts}.")
    if action_space not in ("categorical", "one_hot"):
        raise ValueError(
            f"action_space must be 'categorical' or 'one_hot', got {action_space!r}. Other spaces "
            "are not supported yet; discretise the actions."
        )
    if num_target_critics < 1:
        raise ValueError(
            f"num_target_critics must be at least 1, got {num_target_critics}. It is how many "
            "critics are drawn for each TD target; use 2 for clipped double Q."
        )
    if n_step < 1:
        raise ValueError(f"n_step must be at least 1, got {n_step}. Use 1 for the usual TD target.")
    if isinstance(advantage_filter, str) and advantage_filter not in FILTERS:
        raise ValueError(
            f"advantage_filter must be one of {sorted(FILTERS)}, a function or None, got "
            f"{advantage_filter!r}."
        )
