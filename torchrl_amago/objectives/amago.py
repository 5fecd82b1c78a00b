"""AMAGO's objective: off-policy actor-critic over long sequences, for many discounts at once.

Legend: B batch, T steps, C critics, G discounts, A action size, D features, K samples,
M the computed steps: all of ``[B, T]``, or the real ones alone in one row (`compact`); `*` is one
raw prediction of the value codec: nothing, or its bins.
"""

from __future__ import annotations

import inspect
from typing import Literal, get_args

import torch
from tensordict import TensorDict, TensorDictBase
from tensordict.nn import TensorDictModuleBase, dispatch
from torch import Tensor
from torch.distributions import Distribution
from torchrl.modules import set_recurrent_mode

from torchrl_amago._cpu import in_chunks
from torchrl_amago._validation import check_choice, check_counts, check_positive, name_of, pick
from torchrl_amago.modules._settings import flatten, plain
from torchrl_amago.modules.policy import Policy
from torchrl_amago.modules.value_codec import PopArt, ValueCodec, ValueSpace
from torchrl_amago.objectives._actor_critic import ActorCriticLoss, HeadInputs, MaskHook
from torchrl_amago.objectives._metrics import (
    POLICY_METRICS,
    VALUE_METRICS,
    policy_metrics,
    value_metrics,
    value_names,
)
from torchrl_amago.objectives._slice_batch import SliceBatch
from torchrl_amago.objectives.functional import (
    FILTERS,
    AdvantageFilter,
    draw_critic_subset,
    ensemble_std,
    expected_value,
    n_step_target,
    reduce_ensemble,
)


class AMAGOLoss(ActorCriticLoss):
    """One update of AMAGO, for any action space (arXiv 2310.09971, Section 4 and Appendix A).

    For every step of every slice, and every discount g at once::

        s_0..s_T    = encoder(inputs of T + 1 steps)                 one sequence-model forward
        V(s)        = average of Q(s, a) over the policy's actions   exact, or over samples
        target      = r + ... + g^n V'(s_{t+n}),    V' = min over a random pair of target critics
                                                         of V under the target actor
        loss_qvalue = critic_coeff * codec.loss(Q_c(s, a), target)   regression or classification
        loss_actor  = - online_coeff  * min_c V_c(s)                 by the policy's actions alone
                      - online_coeff  * entropy_coeff * u * H(pi(s))            not in the papers
                      - offline_coeff * filter(Q(s, a) - V(s)) * log pi(a|s)

    Critics list the values of all actions (``state -> [*B, C, G, A, *]``) or take actions
    (``(state, action) -> [K, *B, C, G, *]``); the codec gives their predictions a meaning. Only
    ``terminated`` stops bootstrapping. Steps under a False mask have no influence. The encoder
    learns from both losses; targets use the online encoder without gradient. Statistics of inputs
    and targets move in training mode with gradient only. :func:`amago_loss` and :func:`amago2_loss`
    build the published choices.

    Batches are rows ``[B, T]`` or flat, ``[N]``, with every next observation. Rows of several
    trials are split (:func:`~torchrl_amago.rows.split_trials`), except under `torch.compile`.

    Args:
        policy: a :class:`~torchrl_amago.modules.Policy`, or any object with its ``encoder``,
            ``actor``, ``distribution`` and ``discounts``.
        critic: see above; reads ``"state"`` and, if it takes actions, ``"action_vector"``.
        value_codec: meaning of the critics' predictions; default :class:`PopArt`.
        num_target_critics: ensemble members drawn for each TD target.
        target_reduction: ``"min"`` or ``"mean"`` over them; default ``"min"`` if there is an online
            actor term, else ``"mean"``.
        n_step: rewards summed in a TD target.
        reward_scale: factor of rewards in the loss only.
        online_coeff: weight of the policy-gradient term, as ``offline_coeff`` of the filtered
            imitation term and ``critic_coeff`` of the critics' loss.
        entropy_coeff: weight of the policy's entropy H, nats, in the policy-gradient term. Its unit
            u is each discount's root mean square of Q(s, a) - V(s) over the batch's steps.
        advantage_filter: ``"binary"``, ``"exponential"``, ``"leaky_relu"``, a function of the
            advantage, or None to imitate everything (with ``online_coeff=0``: behaviour cloning,
            critics are left alone).
        filter_space: space of the filter's advantages: ``"raw"`` critic outputs, the codec's
            ``"normalized"`` values, or ``"value"``, reward units times ``reward_scale``.
        num_target_actions: samples of the target policy for V', of critics that take actions.
        num_policy_actions: samples of the policy for V and the online term, of such critics.
        use_target_actor: choose the TD target's actions by the target actor.
        clip_actions: clip a stored discrete action before critics read it as the policy's
            probabilities are clipped, so that stored and chosen actions are valued alike.
        actor_mask: function that edits the mask ``[B, T, G]`` of the actor's loss.
        critic_mask: function that edits the mask ``[B, T, C, G]`` of the critics' loss.
        compact: run the heads and the equations on real steps alone: the same numbers for less
            work, with shapes that depend on data. Default: on a CPU outside of `torch.compile`.
        use_prioritized_weights: weigh each step's losses by the batch's importance weights,
            ``"priority_weight" [B, T]`` (arXiv 1511.05952, section 3.4); a mean is then one by
            weight. ``"auto"`` does so if a batch has them.
        reduction: ``"mean"``, ``"sum"`` or ``"none"`` over real steps.

    Returns:
        ``loss_actor`` and ``loss_qvalue``, whose sum is the total loss, and detached metrics, all
        scalars (but for ``reduction="none"``), see :mod:`~torchrl_amago.objectives._metrics`. The
        batch gets each step's absolute TD error, the priority.

    Raises:
        ValueError: for arguments out of range, parts that don't fit together, and batches of a
            wrong shape or with data that would spoil the update.
        TypeError: if weights are of half precision.
        KeyError: if the tensordict lacks an entry.

    Example:
        >>> from torchrl.objectives import SoftUpdate
        >>> from torchrl_amago import MetaFrozenLake, make_critic, make_policy, make_trial_env
        >>> env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=5)
        >>> policy = make_policy(env, context_length=45)
        >>> loss = AMAGOLoss(policy, make_critic(policy))
        >>> target_update = SoftUpdate(loss, tau=0.003)  # step it after every optimiser step
        >>> batch = env.rollout(6, policy, break_when_any_done=False)
        >>> sorted(k for k in loss(batch).keys() if k.startswith("loss"))
        ['loss_actor', 'loss_qvalue']
    """

    def __init__(
        self,
        policy: Policy,
        critic: TensorDictModuleBase,
        value_codec: ValueCodec | None = None,
        *,
        num_target_critics: int = 2,
        target_reduction: Literal["min", "mean"] | None = None,
        n_step: int = 1,
        reward_scale: float = 10.0,
        online_coeff: float = 1.0,
        offline_coeff: float = 0.1,
        entropy_coeff: float = 0.0,
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
        codec = value_codec if value_codec is not None else PopArt(len(policy.discounts))
        super().__init__(policy, critic, codec)
        self.num_target_critics = num_target_critics
        self.target_reduction = target_reduction or ("min" if online_coeff > 0 else "mean")
        self.n_step, self.reward_scale = n_step, reward_scale
        self.online_coeff, self.offline_coeff = online_coeff, offline_coeff
        self.entropy_coeff, self.critic_coeff = entropy_coeff, critic_coeff
        remedy = "Use None to imitate every action."
        self.filter = pick("advantage_filter", advantage_filter, FILTERS, remedy)
        self.filter_space = filter_space
        self.num_target_actions = num_target_actions
        self.num_policy_actions = num_policy_actions
        self.use_target_actor, self.clip_actions = use_target_actor, clip_actions
        self.actor_mask, self.critic_mask = actor_mask, critic_mask
        self.compact, self.use_prioritized_weights = compact, use_prioritized_weights
        self.reduction = reduction
        self._value_names = value_names(policy.discounts)
        self._check_options()
        self._check_parts()

    def _check_options(self) -> None:
        check_choice("target_reduction", self.target_reduction, ("min", "mean"))
        check_choice("filter_space", self.filter_space, get_args(ValueSpace))
        check_choice("reduction", self.reduction, ("mean", "sum", "none"))
        check_choice("use_prioritized_weights", self.use_prioritized_weights, ("auto", True, False))
        counts = ("num_target_critics", "n_step", "num_target_actions", "num_policy_actions")
        check_counts("See AMAGOLoss's arguments.", **{x: getattr(self, x) for x in counts})
        check_positive("Use 1 for rewards as they are.", reward_scale=self.reward_scale)
        for name in ("online_coeff", "offline_coeff", "entropy_coeff", "critic_coeff"):
            if (value := getattr(self, name)) != 0:
                check_positive("Use 0 to leave its term out.", **{name: value})

    @property
    def uses_critic(self) -> bool:
        """True if the actor needs the critics, which are trained only then."""
        return self.online_coeff > 0 or self.filter is not None

    @property
    def settings(self) -> dict[str, str | float | bool | list[float] | None]:
        """Options that change the loss but no shape of its weights, flat, as JSON values."""
        options = vars(self).keys() & inspect.getfullargspec(AMAGOLoss.__init__).kwonlyargs
        off = () if self.online_coeff * self.entropy_coeff else ("entropy_coeff",)
        critic = getattr(self.critic_network, "module", None)
        parts = {
            "distribution": self.distribution,
            "value_codec": self.value_codec,
            "critic": getattr(critic, "settings", {}),
        }
        return {
            "discounts": [float(f"{discount:.7g}") for discount in self.discounts.tolist()],
            "advantage_filter": name_of(self.filter),
            # `compact` changes no number, nor does a bonus that is off; older runs don't name it.
            **{name: name_of(getattr(self, name)) for name in sorted(options - {"compact", *off})},
            **flatten(plain(parts)),
        }

    @property
    def out_keys_source(self) -> list[str]:
        """Entries that can be selected."""
        values = (*VALUE_METRICS, *self._value_names) if self.uses_critic else ()
        return list(dict.fromkeys(["loss_actor", "loss_qvalue", *POLICY_METRICS, *values]))

    @dispatch(source="_dispatch_keys")
    def forward(self, tensordict: TensorDictBase) -> TensorDictBase:
        """Compute the losses of a batch of slices.

        Each step's absolute TD error is written into the batch; in training, the codec's
        statistics move.
        """
        batch, codec = self._read(tensordict, self.compact), self.value_codec
        mask_M = batch.steps.mask
        if self._moves_statistics:
            self._absorb_scale()
        inputs, next_inputs = self._encode_states(batch)
        action_MA = batch.action(self.distribution.space)
        policy = self._policy(self.actor_network_params, inputs)
        metrics = policy_metrics(policy, mask_M)
        terms = {"loss_actor": torch.zeros(policy.batch_shape, device=mask_M.device)}
        v_MCG = weight_MG = None

        if self.uses_critic:
            prediction, v_MCG = self._online_values(inputs, action_MA, policy)
            next_v_BTG = self._next_values(batch, next_inputs)
            target_MG = seen_MG = self._td_target(batch, next_v_BTG, self.n_step)
            if self._moves_statistics:
                if codec.follows_rewards:  # and as little predictions as the slice allows
                    seen_MG = self._td_target(batch, next_v_BTG, next_v_BTG.shape[1])
                codec.update(seen_MG, mask_M.unsqueeze(-1))
            terms["loss_qvalue"] = self.critic_coeff * codec.loss(prediction, target_MG)
            q_MCG = codec.raw_value(prediction.detach())
            advantage_MG = self._advantage(q_MCG, v_MCG, self.filter_space)
            weight_MG = self._imitation_weight(advantage_MG)
            terms_MG = (codec.to_space(q_MCG, "value"), target_MG, advantage_MG, weight_MG)
            names, scale = self._value_names, self.reward_scale
            values, td_error_M = value_metrics(codec, *terms_MG, mask_M, scale, names)
            metrics |= values
            tensordict.set(self.tensor_keys.priority, batch.restore(td_error_M))

        if self.online_coeff > 0:
            gain_MG = codec.to_space(v_MCG, "normalized").amin(-2)
            if self.entropy_coeff > 0:
                unit_G = self._advantage_unit(q_MCG, v_MCG, mask_M)
                gain_MG = gain_MG + self.entropy_coeff * unit_G * policy.entropy()
            terms["loss_actor"] = terms["loss_actor"] - self.online_coeff * gain_MG
        if self.offline_coeff > 0:
            log_prob_MG = policy.log_prob(action_MA.unsqueeze(-2))
            imitation_MG = log_prob_MG if weight_MG is None else weight_MG * log_prob_MG
            terms["loss_actor"] = terms["loss_actor"] - self.offline_coeff * imitation_MG
        return self._reduce(batch, terms, metrics)

    def estimates(
        self, tensordict: TensorDictBase, filter_space: ValueSpace | None = None
    ) -> TensorDict:
        """Compute values and advantages of a batch, in evaluation mode; update nothing.

        Returns:
            ``q_value``, ``value``, ``advantage`` in reward units times ``reward_scale`` (ensemble
            means), their ``q_value_std``, ``value_std``, and ``filter``: ``[*batch, G]``.
        """
        space, codec = filter_space or self.filter_space, self.value_codec
        check_choice("filter_space", space, get_args(ValueSpace))
        was_training = self.training
        self.eval()
        try:
            with torch.no_grad(), set_recurrent_mode(True):
                batch = self._read(tensordict, compact=False)
                inputs, _ = self._encode_states(batch)
                policy = self._policy(self.actor_network_params, inputs)
                action_MA = batch.action(self.distribution.space)
                prediction, v_MCG = self._online_values(inputs, action_MA, policy)
                q_MCG = codec.raw_value(prediction)
                weight_MG = self._imitation_weight(self._advantage(q_MCG, v_MCG, space))
                q_MCG, v_MCG = codec.to_space(q_MCG, "value"), codec.to_space(v_MCG, "value")
        finally:
            self.train(was_training)
        estimates = {
            "q_value": q_MCG.mean(-2),
            "value": v_MCG.mean(-2),
            "advantage": q_MCG.mean(-2) - v_MCG.mean(-2),
            "q_value_std": ensemble_std(q_MCG),
            "value_std": ensemble_std(v_MCG),
            "filter": weight_MG,
        }
        restored = {name: batch.restore(x) for name, x in estimates.items()}
        return TensorDict(restored, batch_size=tensordict.shape)

    def _online_values(
        self, inputs: HeadInputs, action_MA: Tensor, policy: Distribution
    ) -> tuple[Tensor, Tensor]:
        """Return Q(s, a) as predictions ``[M, C, G, *]``, and V(s), raw, ``[M, C, G]``.

        Q's gradient goes to critics and states, V's to the policy alone.
        """
        params, state_MD = self.critic_network_params, inputs[self._state_key]
        if self.clip_actions:
            action_MA = self.distribution.clip_action(action_MA, policy)
        needs_grad = self.online_coeff > 0 and torch.is_grad_enabled()
        if not self.takes_actions:  # one pass for both
            listed = self._predict(params, state_MD)
            probs_MGA = policy.probs if needs_grad else policy.probs.detach()
            v_MCG = expected_value(self.value_codec.raw_value(listed.detach()), probs_MGA)
            return self._of_action(listed, action_MA), v_MCG
        prediction = self._predict(params, state_MD, action_MA.unsqueeze(-2))
        with torch.set_grad_enabled(needs_grad):
            params = self._frozen(params) if needs_grad else params
            v_MCG = self._v(params, state_MD.detach(), policy, self.num_policy_actions)
        return prediction, v_MCG

    def _of_action(self, listed: Tensor, action_MA: Tensor) -> Tensor:
        """Pick the predictions of an action, ``[M, C, G, A, *] -> [M, C, G, *]``."""
        if not self.value_codec.event_shape:
            return expected_value(listed, action_MA.unsqueeze(-2))
        # Predictions of classes can't be averaged: a clipped action counts as the one-hot one.
        index = action_MA.argmax(-1).view(*action_MA.shape[:-1], 1, 1, 1, 1)
        return listed.gather(-2, index.expand(*listed.shape[:-2], 1, listed.shape[-1])).squeeze(-2)

    def _frozen(self, params: TensorDictBase) -> TensorDictBase:
        """Return detached critic parameters, which score the policy's own actions."""
        return params.detach()

    def _v(
        self, params: TensorDictBase, state_MD: Tensor, policy: Distribution, num_samples: int
    ) -> Tensor:
        """Return V(s), raw, ``[M, C, G]``: the average of Q(s, a) over the policy's actions."""
        raw_value = self.value_codec.raw_value
        if not self.takes_actions:
            return expected_value(raw_value(self._predict(params, state_MD)), policy.probs)
        draw = policy.rsample if torch.is_grad_enabled() else policy.sample
        return in_chunks(
            lambda state, action: raw_value(self._predict(params, state, action)).mean(0),
            state_MD,
            draw((num_samples,)),
        )

    @torch.no_grad()
    def _next_values(self, batch: SliceBatch, next_inputs: HeadInputs) -> Tensor:
        """Return V' of next states in reward units times ``reward_scale``, ``[B, T, G]``."""
        target = "target_" if self.use_target_actor else ""
        next_policy = self._policy(getattr(self, f"{target}actor_network_params"), next_inputs)
        params, next_state_MD = self.target_critic_network_params, next_inputs[self._state_key]
        next_v_MCG = self._v(params, next_state_MD, next_policy, self.num_target_actions)
        next_v_MCG = self.value_codec.to_space(next_v_MCG, "value")
        *shape_M, C, G = next_v_MCG.shape
        shape = (*shape_M, self.num_target_critics, G)
        subset_MKG = draw_critic_subset(shape, C, next_v_MCG.device)
        next_v_MG = reduce_ensemble(next_v_MCG, subset_MKG, self.target_reduction)
        return batch.steps.restore(next_v_MG)

    @torch.no_grad()
    def _td_target(self, batch: SliceBatch, next_v_BTG: Tensor, n: int) -> Tensor:
        """Return n-step TD targets in reward units times ``reward_scale``, ``[M, G]``."""
        # The sums follow a row's steps, so they are made where rows are whole.
        reward, terminated = self.reward_scale * batch.reward(), batch.terminated()
        discounts, mask_BT1 = self.discounts, batch.mask_BT1
        target_BTG = n_step_target(reward, terminated, next_v_BTG, discounts, mask_BT1, n)
        return batch.steps.select(target_BTG)

    @torch.no_grad()
    def _advantage(self, q_MCG: Tensor, v_MCG: Tensor, space: ValueSpace) -> Tensor:
        """Return A(s, a) = Q(s, a) - V(s), ensemble means, ``[M, G]``, of raw values."""
        to_space = self.value_codec.to_space
        return to_space(q_MCG, space).mean(-2) - to_space(v_MCG, space).mean(-2)

    def _advantage_unit(self, q_MCG: Tensor, v_MCG: Tensor, mask_M: Tensor) -> Tensor:
        """Return the root mean square of normalised advantages over real steps, ``[G]``."""
        a_MG = self._advantage(q_MCG, v_MCG, "normalized").where(mask_M.unsqueeze(-1), 0.0)
        square_sum_G, num_real = self.all_reduce(a_MG.square().flatten(0, -2).sum(0), mask_M.sum())
        return (square_sum_G / num_real.clamp_min(1)).sqrt()

    def _imitation_weight(self, advantage_MG: Tensor) -> Tensor:
        return torch.ones_like(advantage_MG) if self.filter is None else self.filter(advantage_MG)
