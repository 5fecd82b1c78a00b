"""Heads, distribution, PopArt and schedules against recorded numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torchrl.modules.functional import symexp

from tests.golden_utils import GoldenCase, assert_close, cases, load
from tests.golden_weights import (
    actor_weights,
    critic_weights,
    popart_buffers,
    residual_actor_weights,
)
from torchrl_amago import _cpu
from torchrl_amago.modules import BilevelEpsilonGreedy, ClippedCategorical, PopArt
from torchrl_amago.modules.actor import Actor, ResidualActor
from torchrl_amago.modules.critic import ActionCritic, DiscreteCritic, discount_feature
from torchrl_amago.modules.distributions.discrete import clip_probabilities


def _load(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    named = {name.removeprefix("module."): v for name, v in weights.items()}
    buffers = {name: b for name, b in module.named_buffers() if name not in named}
    module.load_state_dict(named | buffers)


# Sizes under the reference's names, and ours.
SIZES = {
    "d_hidden": "hidden_size",
    "n_layers": "num_layers",
    "activation": "activation",
    "feature_dim": "feature_size",
    "residual_ff_dim": "residual_size",
    "residual_blocks": "num_blocks",
    "num_critics": "num_critics",
    "output_bins": "num_outputs",
}


def _options(case: GoldenCase) -> dict[str, Any]:
    hp = case.hyperparameters
    options = {ours: hp[theirs] for theirs, ours in SIZES.items() if theirs in hp}
    if "normalization" in hp:
        options["norm"] = {"rmsnorm": "rms"}[hp["normalization"]]
    return options


@pytest.mark.parametrize("case", cases("modules/actor_*", "modules/residual_actor_*"), ids=str)
def test_actor(case):
    hp = case.hyperparameters
    num_params = hp["action_dim"] * (1 if hp["discrete"] else 2)
    cls, weights = Actor, actor_weights
    if "residual" in case.name:
        cls, weights = ResidualActor, residual_actor_weights
    actor = cls(hp["state_dim"], num_params, len(hp["gammas"]), **_options(case))
    _load(actor, weights(case, "w/"))
    params = actor(case["in/state"])
    assert_close(params, case["out/dist_params"])
    if hp["discrete"]:
        dist = ClippedCategorical(params)
        assert_close(dist.probs, case["out/probs"])
        assert_close(dist.logits, case["out/logits"])


def test_discrete_critic():
    case = load("modules/ncritics_discrete")
    hp = case.hyperparameters
    critic = DiscreteCritic(hp["state_dim"], hp["action_dim"], len(hp["gammas"]), **_options(case))
    _load(critic, critic_weights(case, "w/"))
    state = case["in/state"].requires_grad_()
    action = case["in/action"].squeeze(0).unsqueeze(2).requires_grad_()  # [B, T, 1, G, A]
    value = (critic(state) * action).sum(-1)
    assert_close(value, case["out"].squeeze(0).squeeze(-1))
    value.sum().backward()
    assert_close(state.grad, case["out/grad_state_of_sum_value"])
    assert_close(action.grad.squeeze(2), case["out/grad_action_of_sum_value"].squeeze(0))


@pytest.mark.parametrize(
    "case", cases("modules/ncritics_continuous", "modules/ncritics_twohot_*"), ids=str
)
@pytest.mark.parametrize("rows_at_once", [1, 2048])
def test_action_critic(case, rows_at_once, monkeypatch):
    hp = case.hyperparameters
    critic = ActionCritic(hp["state_dim"], hp["action_dim"], hp["gammas"], **_options(case))
    monkeypatch.setattr(_cpu, "CHUNK_ROWS", rows_at_once)
    _load(critic, critic_weights(case, "w/"))
    state, action = case["in/state"].requires_grad_(), case["in/action"].requires_grad_()
    value = critic(state, action)  # [K, B, T, C, G] and perhaps bins
    if "output_bins" in hp:
        assert_close(value.log_softmax(-1), case["out/logits"])
        value = (value.softmax(-1) * case["bin_vals"]).sum(-1)
        value = symexp(value) if hp.get("use_symlog", True) else value
        assert_close(value, case["out/raw_vals"].squeeze(-1))
    else:
        assert_close(value, case["out"].squeeze(-1))
    value.sum().backward()
    assert_close(state.grad, case["out/grad_state_of_sum_value"])
    assert_close(action.grad, case["out/grad_action_of_sum_value"])


def test_discount_feature():
    case = load("functional/gammas_as_input_seq")
    batch, length = case.hyperparameters["batch_size"], case.hyperparameters["length"]
    feature_G = discount_feature(case["gammas"])
    assert_close(feature_G.repeat(batch)[:, None, None].expand(-1, length, -1), case["out"])


@pytest.mark.parametrize("case", cases("functional/dist_discrete*"), ids=str)
def test_clipped_categorical(case):
    low, high = case.hyperparameters["clip_prob_low"], case.hyperparameters["clip_prob_high"]
    logits = case["vec"].requires_grad_()
    dist = ClippedCategorical(logits, low, high)
    assert_close(dist.probs, case["out/probs"])
    assert_close(dist.logits, case["out/logits"])
    assert_close(dist.entropy(), case["out/entropy"])
    assert torch.equal(dist.mode, case["out/argmax"])
    assert torch.equal(dist.deterministic_sample, case["out/argmax"])
    log_prob = dist.log_prob(case["action_index"])
    assert_close(log_prob, case["out/log_prob"])
    softened = clip_probabilities(case["one_hot"], low, high)
    assert_close(softened, case["out/action_from_buffer"])
    (grad,) = torch.autograd.grad(log_prob.sum(), logits, retain_graph=True)
    assert_close(grad, case["out/grad_vec_of_sum_log_prob"])
    (grad,) = torch.autograd.grad((dist.probs * case["probs_weight"]).sum(), logits)
    assert_close(grad, case["out/grad_vec_of_weighted_probs"])


@pytest.mark.parametrize("case", cases("functional/popart*"), ids=str)
def test_popart(case):
    hp = case.hyperparameters
    codec = PopArt(hp["gammas"], beta=hp["beta"], initial_nu=hp["init_nu"])
    x = case["x"].squeeze(-1)
    recorded = dict(case.starting("out/").items())
    for i in range(5):
        target, mask = case["val"][i].squeeze(2, -1), case["mask"][i].squeeze(2, -1)
        codec.update(target, mask[..., :1])
        states = {"mu": "mu", "nu": "nu", "w": "weight", "b": "bias"}
        for theirs, ours in states.items():
            assert_close(codec.get_buffer(ours), recorded[theirs][i].squeeze(-1), msg=ours)
        assert_close(codec.sigma, recorded["sigma"][i].squeeze(-1))
        assert_close(codec.count.expand(3), recorded["_t"][i].squeeze(-1))
        assert_close(codec.normalized(x), recorded["normalized"][i].squeeze(-1))
        assert_close(codec.decode(x), recorded["denormalized"][i].squeeze(-1))
        assert_close(codec.encode(target), recorded["normalize_values"][i].squeeze(2, -1))


def test_popart_masks_are_the_same_for_every_discount():
    """One count serves all of them."""
    for case in cases("functional/popart*"):
        mask = case["mask"]
        assert torch.equal(mask, mask[..., :1, :].expand_as(mask))
    assert popart_buffers(load("agents/agent_discrete_3_updates"), "w/popart.")["count"].ndim == 0


def test_bilevel_epsilon():
    """Beyond the horizon the reference goes on falling, below zero; ours is clamped."""
    case = load("functional/exploration_eps")
    hp = case.hyperparameters["bilevel"]
    local = case["local_step"]
    within = local <= hp["rollout_horizon"]
    assert within.any()
    assert not within.all()
    for step, *expected in zip(case["global_step"], *case["out/bilevel"], strict=True):
        explore = BilevelEpsilonGreedy(
            5,
            horizon=hp["rollout_horizon"],
            anneal_frames=hp["steps_anneal"],
            start_of_trial=(hp["eps_start_start"], hp["eps_start_end"]),
            end_of_trial=(hp["eps_end_start"], hp["eps_end_end"]),
        )
        explore.step(int(step))
        for scale, row in zip(case.hyperparameters["global_multiplier"], expected, strict=True):
            epsilon = scale * explore.epsilon(local)
            assert_close(epsilon[within], row[within])
            assert (epsilon[~within] >= row[~within].clamp_min(0)).all()
