"""AMAGO's objective: off-policy actor-critic over long sequences, for many discounts at once.

Legend: B batch, T steps, S = T + 1 states, C critics, G discounts, A action size, D features,
M the steps that count: all of ``[B, T]``, or the real ones alone in one row (`compact`); `*` is one
raw prediction of the value codec: nothing, or its bins.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Literal

import torch
from tensordict import NestedKey, TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from tensordict.utils import expand_as_right
from torch import Tensor
from torch.distributions import Distribution
from torchrl.modules import set_recurrent_mode

from torchrl_amago._validation import check_counts, name_of, pick
from torchrl_amago.modules.distributions import PolicyDistribution
from torchrl_amago.modules.policy import DISCOUNTS, check_discounts
from torchrl_amago.modules.value_codec import PopArt, ValueCodec
from torchrl_amago.objectives._checks import (
    check_critics,
    check_distribution,
    check_mask,
    check_same_discounts,
    check_scales,
    check_words,
)
from torchrl_amago.objectives._critics import (
    PolicyValue,
    ValueSpace,
    to_space,
)
from torchrl_amago.objectives._metrics import (
    POLICY_METRICS,
    VALUE_METRICS,
    policy_metrics,
    value_metrics,
    value_names,
)
from torchrl_amago.objectives._networks import ActorCriticLoss, evaluating
from torchrl_amago.objectives._slice_batch import Slices
from torchrl_amago.objectives.functional import (
    FILTERS,
    AdvantageFilter,
    draw_critic_subset,
    ensemble_std,
    masked_mean,
    n_step_target,
    reduce_ensemble,
)

MaskHook = Callable[[TensorDictBase, Tensor, Tensor], Tensor]
"""``(batch, unreduced loss [B, T, ...], mask of the same shape) -> mask``."""


class AMAGOLoss(ActorCriticLoss):
    """One update of AMAGO, for any action space (arXiv 2310.09971, Section 4 and Appendix A).

    For every step of every slice, and every discount g at once:

        s_0..s_T   = encoder(inputs of T + 1 steps)                 one sequence-model forward
        V(s)       = average of Q(s, a) over the policy's actions    exact, or over samples
        target     = r + ... + g^n V'(s_{t+n}),  V' = min over a random pair of target critics
                                                      of V under the target actor
        loss_qvalue = critic_coeff * codec.loss(Q_c(s, a), target)   (Q - target)^2, or classification
        loss_actor  = - online_coeff  * min_c V_c(s), through the policy's actions alone
                      - offline_coeff * filter(Q(s, a) - V(s)) * log pi(a|s)

    Critics may list the values of all actions (``state -> [*B, C, G, A, *]``) or take actions
    (``(state, action) -> [K, *B, C, G, *]``); how they write values down is the codec's affair.
    Only ``terminated`` stops bootstrapping. Steps under a False mask count for nothing, whatever
    they hold. The encoder learns from both losses; targets use the online encoder without gradient.
    :func:`amago_loss` and :func:`amago2_loss` build it with the published choices.

    Batches are rows ``[B, T]`` or flat, ``[N]``. Where a row holds several trials or slices, it is cut
    (:func:`~torchrl_amago.rows.split_trials`), except under `torch.compile`. Every next observation is
    read: `compact_obs=True` of TorchRL's collectors drops those at the ends of slices, and is refused.
    Statistics of inputs and targets move in training mode alone, and not under `torch.no_grad`.

    Args:
        encoder_network: inputs of a step -> ``"state" [B, T, D]``, in recurrent mode.
        actor_network: ``"state"``, and whatever observations it reads besides, ->
            ``"action_params" [B, T, G, P]``.
        critic_network: see above; reads ``"state"`` and, if it takes actions, ``"action_vector"``.
        distribution: what the actor's parameters mean; the policy's own.
        value_codec: how critics write down values; default :class:`PopArt`.
        discounts: G discounts in (0, 1), those that the actor and the critics were built for.
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
        num_target_actions: samples of the target policy for V' where critics take actions.
        num_policy_actions: samples of the policy for V and the online term, likewise.
        use_target_actor: let the target actor choose the TD target's actions.
        clip_actions: show critics a stored discrete action as the policy's probabilities are
            clipped (0.996 and four times 0.001 of five actions), as the public AMAGO code does, so
            that stored and chosen actions are valued alike.
        actor_mask: a function that edits which ``[B, T, G]`` count in the actor's loss; of a batch that
            was split, it is shown the rows made of it.
        critic_mask: likewise ``[B, T, C, G]`` in the critics' loss.
        compact: run the heads and the equations on real steps alone, in one row, instead of on all of
            ``[B, T]``: the same numbers for less work where trials differ in length. Shapes then
            depend on the data; default only on CPU and outside of `torch.compile`.
        use_prioritized_weights: weigh each step's losses by the batch's importance weights,
            ``"priority_weight" [B, T]``, which correct for prioritised draws (arXiv 1511.05952, section
            3.4); a mean is then one by weight. ``"auto"`` does so where a batch has them.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over real steps.

    Returns:
        ``loss_actor`` and ``loss_qvalue``, whose sum is the total loss, and detached metrics, all
        scalars (but for ``reduction="none"``), see :mod:`~torchrl_amago.objectives._metrics`. The batch
        gets each step's absolute TD error, the priority.

    Raises:
        ValueError: for arguments out of range, or parts for other discounts; for batches of more
            dimensions, padding before real steps of a row, a mask that isn't bool, rewards that aren't
            scalar or too large, NaN in next observations, or actions outside of their space.
        TypeError: if `distribution` isn't a policy's, or weights are of half precision.
        KeyError: if the tensordict lacks an entry.

    Example:
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_amago import MetaFrozenLake, make_critic, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> policy = make_policy(env, context_length=45)
        >>> critic = make_critic(policy)
        >>> loss = AMAGOLoss(
        ...     policy.encoder, policy.actor, critic, policy.distribution, discounts=policy.discounts
        ... )
        >>> target_update = SoftUpdate(loss, tau=0.003)  # step it after every optimiser step
        >>> batch = env.rollout(6, policy, break_when_any_done=False)
        >>> sorted(k for k in loss(batch).keys() if k.startswith("loss"))
        ['loss_actor', 'loss_qvalue']
    """

    def __init__(
        self,
        encoder_network: TensorDictModuleBase,
        actor_network: TensorDictModuleBase,
        critic_network: TensorDictModuleBase,
        distribution: PolicyDistribution,
        *,
        value_codec: ValueCodec | None = None,
        discounts: Sequence[float] = DISCOUNTS,
        num_target_critics: int = 2,
        target_reduction: Literal["min", "mean"] | None = None,
        n_step: int = 1,
        reward_scale: float = 10.0,
        online_coeff: float = 1.0,
        offline_coeff: float = 0.1,
        critic_coeff: float = 10.0,
        advantage_filter: str | AdvantageFilter | None = "binary",
        filter_space: ValueSpace = "raw",
        num_target_actions: int = 1,
        num_policy_actions: int = 1,
        use_target_actor: bool = True,
        clip_actions: bool = True,
        actor_mask: MaskHook | None = None,
        critic_mask: MaskHook | None = None,
        compact: bool | None = None,
        use_prioritized_weights: bool | Literal["auto"] = "auto",
        reduction: Literal["mean", "sum", "none"] = "mean",
    ) -> None:
        check_discounts(discounts)
        check_words(
            target_reduction=target_reduction or "min",
            filter_space=filter_space,
            reduction=reduction,
            compact=compact,
            use_prioritized_weights=use_prioritized_weights,
            use_target_actor=use_target_actor,
            clip_actions=clip_actions,
        )
        check_distribution(distribution)
        check_scales(
            reward_scale,
            online_coeff=online_coeff,
            offline_coeff=offline_coeff,
            critic_coeff=critic_coeff,
        )
        check_counts(
            "See AMAGOLoss's arguments.",
            num_target_critics=num_target_critics,
            n_step=n_step,
            num_target_actions=num_target_actions,
            num_policy_actions=num_policy_actions,
        )
        codec = value_codec if value_codec is not None else PopArt(len(discounts))
        check_same_discounts(discounts, actor_network, critic_network, codec)
        super().__init__(encoder_network, actor_network, critic_network, distribution, codec)
        check_critics(
            critic_network, num_target_critics, distribution, self.takes_actions, online_coeff > 0
        )
        self.register_buffer("discounts", torch.tensor(discounts, dtype=torch.float32))
        self._value_names = value_names(discounts)
        self.num_target_critics = num_target_critics
        self.target_reduction = target_reduction or ("min" if online_coeff > 0 else "mean")
        self.n_step, self.reward_scale = n_step, reward_scale
        self.online_coeff, self.offline_coeff = online_coeff, offline_coeff
        self.critic_coeff = critic_coeff
        self.filter = pick(
            "advantage_filter", advantage_filter, FILTERS, "Use None to imitate every action."
        )
        self.filter_space = filter_space
        self.num_target_actions = num_target_actions
        self.num_policy_actions = num_policy_actions
        self.use_target_actor, self.clip_actions = use_target_actor, clip_actions
        self.actor_mask, self.critic_mask = actor_mask, critic_mask
        self.compact = compact
        self.use_prioritized_weights = use_prioritized_weights
        self.reduction = reduction

    @property
    def uses_critic(self) -> bool:
        """True if the actor needs the critics, which are trained only then."""
        return self.online_coeff > 0 or self.filter is not None

    @property
    def settings(self) -> dict[str, str | float | bool | list[float] | None]:
        """Options that change the loss but no shape of its weights, flat, as JSON values.

        Functions appear by name. `compact`, which changes no number, is left out.
        """
        arguments = inspect.signature(AMAGOLoss.__init__).parameters.values()
        options = {x.name for x in arguments if x.kind is x.KEYWORD_ONLY} - {"compact"}
        own = sorted(options & self.__dict__.keys())
        parts = {
            "distribution": self.distribution.settings,
            "value_codec": self.value_codec.settings,
            "critic": getattr(getattr(self.critic_network, "module", None), "settings", {}),
        }
        return {
            "discounts": [float(f"{discount:.7g}") for discount in self.discounts.tolist()],
            "advantage_filter": name_of(self.filter),
            **{name: name_of(getattr(self, name)) for name in own},
            **{f"{part}.{k}": v for part, settings in parts.items() for k, v in settings.items()},
        }

    @property
    def out_keys_source(self) -> list[str]:
        """Entries that can be selected."""
        metrics = [*POLICY_METRICS]
        if self.uses_critic:
            metrics += [*VALUE_METRICS, *self._value_names]
        return list(dict.fromkeys(["loss_actor", "loss_qvalue", *metrics]))

    @dispatch(source="_dispatch_keys")
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the losses of a batch of slices, and update the codec's statistics."""
        batch = self._read(tensordict, self.compact)
        steps = batch.steps
        current, following = self._states(batch)
        action_MA = batch.action(self.distribution.space)
        policy = self._policy(current, self.actor_network_params)
        terms, metrics = {}, policy_metrics(policy, steps.mask)
        value = weight_MG = None
        if self.uses_critic:
            prediction, value = self._online_answers(current, action_MA, policy)
            target_MG = self._td_target(batch, following)
            if self._moves_statistics:
                self.value_codec.update(target_MG, steps.mask.unsqueeze(-1))
            terms["loss_qvalue"] = self.critic_coeff * self.value_codec.loss(prediction, target_MG)
            q_MCG = self.value_codec.decode(prediction.detach())
            advantage_MG = self._advantage(prediction, q_MCG, value, self.filter_space)
            weight_MG = self._imitation_weight(advantage_MG)
            values, td_error_M = value_metrics(
                self.value_codec,
                q_MCG,
                target_MG,
                advantage_MG,
                weight_MG,
                steps.mask,
                self.reward_scale,
                self._value_names,
            )
            metrics |= values
            tensordict.set(self.tensor_keys.priority, batch.restore(td_error_M))
        terms["loss_actor"] = self._actor_term(policy, action_MA, value, weight_MG)
        return self._reduce(batch, terms, metrics)

    def estimates(
        self, tensordict: TensorDictBase, filter_space: ValueSpace | None = None
    ) -> TensorDict:
        """Values and advantages of a batch, by the same functions as the loss; nothing is updated.

        Networks are in evaluation mode, without dropout, also where the loss is in training.

        Args:
            tensordict: slices ``[B, T]``, or flat, ``[N]``.
            filter_space: as the constructor's; default that of training.

        Returns:
            ``q_value``, ``value``, ``advantage`` in reward units times ``reward_scale`` (ensemble
            means), ``q_value_std``, ``value_std`` over the ensemble, and ``filter``: ``[*batch, G]``.
        """
        space = filter_space or self.filter_space
        check_words(filter_space=space)
        with torch.no_grad(), set_recurrent_mode(True), evaluating(self):
            batch = self._read(tensordict, compact=False)
            current, _ = self._states(batch)
            policy = self._policy(current, self.actor_network_params)
            action_BTA = batch.action(self.distribution.space)
            prediction, policy_value = self._online_answers(current, action_BTA, policy)
            q, value = self.value_codec.decode(prediction), policy_value.to("value")
            weight_BTG = self._imitation_weight(self._advantage(prediction, q, policy_value, space))
        estimates = {
            "q_value": q.mean(-2),
            "value": value.mean(-2),
            "advantage": q.mean(-2) - value.mean(-2),
            "q_value_std": ensemble_std(q),
            "value_std": ensemble_std(value),
            "filter": weight_BTG,
        }
        return TensorDict(
            {name: batch.restore(x) for name, x in estimates.items()}, batch_size=tensordict.shape
        )

    # --- equations ---

    def _online_answers(
        self, current: dict[NestedKey, Tensor], action_MA: Tensor, policy: Distribution
    ) -> tuple[Tensor, PolicyValue]:
        """Raw predictions for the actions taken ``[M, C, G, *]``, and V of the policy."""
        shown_MA = (
            self.distribution.clip_action(action_MA, policy) if self.clip_actions else action_MA
        )
        return self._answers(self.critic_network_params, self.num_policy_actions).online(
            current[self._state_key], shown_MA, policy, self.online_coeff > 0
        )

    @torch.no_grad()
    def _td_target(self, batch: Slices, following: dict[NestedKey, Tensor]) -> Tensor:
        actor = self.target_actor_network_params
        if not self.use_target_actor:
            actor = self.actor_network_params
        answers = self._answers(self.target_critic_network_params, self.num_target_actions)
        next_value_MCG = answers.of_policy(
            following[self._state_key], self._policy(following, actor)
        ).to("value")
        *shape_M, C, G = next_value_MCG.shape
        subset_MKG = draw_critic_subset(
            (*shape_M, self.num_target_critics, G), C, next_value_MCG.device
        )
        next_value_MG = reduce_ensemble(next_value_MCG, subset_MKG, self.target_reduction)
        # n-step sums follow a row's steps, so they are made where rows are whole.
        target_BTG = n_step_target(
            self.reward_scale * batch.reward(),
            batch.terminated(),
            batch.steps.restore(next_value_MG),
            self.discounts,
            batch.mask_BT1,
            self.n_step,
        )
        return batch.steps.select(target_BTG)

    @torch.no_grad()
    def _advantage(
        self, prediction: Tensor, decoded_MCG: Tensor, value: PolicyValue, space: ValueSpace
    ) -> Tensor:
        """A(s, a) = Q(s, a) - V(s), ensemble means, without gradient: ``[M, G]``."""
        is_decoded = space == "value" or (space == "raw" and self.value_codec.event_shape)
        q_MCG = decoded_MCG if is_decoded else to_space(self.value_codec, prediction, space)
        return q_MCG.mean(-2) - value.to(space).mean(-2)

    def _imitation_weight(self, advantage_MG: Tensor) -> Tensor:
        if self.filter is None:
            return torch.ones_like(advantage_MG)
        return self.filter(advantage_MG)

    def _actor_term(
        self,
        policy: Distribution,
        action_MA: Tensor,
        value: PolicyValue | None,
        weight_MG: Tensor | None,
    ) -> Tensor:
        loss_MG = torch.zeros(policy.batch_shape, device=action_MA.device)
        if self.online_coeff > 0:
            worst_MG = value.to("normalized").amin(-2)
            loss_MG = loss_MG - self.online_coeff * worst_MG
        if self.offline_coeff > 0:
            log_prob_MG = policy.log_prob(action_MA.unsqueeze(-2))
            imitation_MG = log_prob_MG if weight_MG is None else weight_MG * log_prob_MG
            loss_MG = loss_MG - self.offline_coeff * imitation_MG
        return loss_MG

    # --- outputs ---

    def _importance(self, batch: Slices) -> Tensor | None:
        """Weights of the steps ``[M]``; None where all count alike."""
        if not self.use_prioritized_weights:
            return None
        return batch.importance(required=self.use_prioritized_weights is True)

    def _reduce(
        self, batch: Slices, terms: dict[str, Tensor], metrics: dict[str, Tensor]
    ) -> TensorDict:
        steps = batch.steps
        out = TensorDict(device=steps.mask.device)
        hooks = {"loss_actor": self.actor_mask, "loss_qvalue": self.critic_mask}
        weight_M = self._importance(batch)
        for name, hook in hooks.items():
            term = terms.get(name)
            if term is None:
                out.set(name, torch.zeros((), device=steps.mask.device))
                continue
            mask = expand_as_right(steps.mask, term)
            if hook is not None:
                mask = _edited(hook, batch, term, mask)
            weight = None if weight_M is None else expand_as_right(weight_M, term)
            if self.reduction == "mean":
                out.set(name, masked_mean(term, mask, weight))
                continue
            term = torch.where(mask, term if weight is None else weight * term, 0.0)
            out.set(name, term.sum() if self.reduction == "sum" else batch.restore(term))
        out.update(metrics)
        return out if self._selected_out_keys is None else out.select(*self.out_keys)


def _edited(hook: MaskHook, batch: Slices, term: Tensor, mask: Tensor) -> Tensor:
    """The mask that a user's hook makes of the real steps; padding stays out."""
    steps = batch.steps
    full = steps.restore(mask.expand_as(term))
    # A copy, since a hook may edit it in place, and the mask may be a view of the batch's.
    copy = full.clone(memory_format=torch.contiguous_format)
    edited = hook(batch.tensordict, steps.restore(term.detach()), copy)
    check_mask(edited, full)
    return steps.select(edited & full)
