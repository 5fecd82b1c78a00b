"""Heads, distribution, PopArt and schedules against recorded numbers."""

from __future__ import annotations

import pytest
import torch

from tests.golden_utils import assert_close, cases, load
from tests.golden_weights import actor_weights, critic_weights, popart_buffers
from torchrl_amago.modules import (
    Actor,
    BilevelEpsilonGreedy,
    ClippedCategorical,
    DiscreteCritic,
    PopArt,
)
from torchrl_amago.modules.distributions import clip_probabilities


def _load(module: torch.nn.Module, weights: dict[str, torch.Tensor]) -> None:
    module.load_state_dict({name.removeprefix("module."): v for name, v in weights.items()})


def test_actor():
    case = load("modules/actor_discrete")
    hp = case.hyperparameters
    actor = Actor(hp["state_dim"], hp["action_dim"], len(hp["gammas"]), hidden_size=hp["d_hidden"])
    _load(actor, actor_weights(case, "w/"))
    params = actor(case["in/state"])
    assert_close(params, case["out/dist_params"])
    dist = ClippedCategorical(params)
    assert_close(dist.probs, case["out/probs"])
    assert_close(dist.logits, case["out/logits"])


def test_discrete_critic():
    case = load("modules/ncritics_discrete")
    hp = case.hyperparameters
    critic = DiscreteCritic(
        hp["state_dim"],
        hp["action_dim"],
        len(hp["gammas"]),
        hp["num_critics"],
        hidden_size=hp["d_hidden"],
    )
    _load(critic, critic_weights(case, "w/"))
    state = case["in/state"].requires_grad_()
    action = case["in/action"].squeeze(0).unsqueeze(2).requires_grad_()  # [B, T, 1, G, A]
    value = (critic(state) * action).sum(-1)
    assert_close(value, case["out"].squeeze(0).squeeze(-1))
    value.sum().backward()
    assert_close(state.grad, case["out/grad_state_of_sum_value"])
    assert_close(action.grad.squeeze(2), case["out/grad_action_of_sum_value"].squeeze(0))


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
    """What lets us keep one count for all of them."""
    for case in cases("functional/popart*"):
        mask = case["mask"]
        assert torch.equal(mask, mask[..., :1, :].expand_as(mask))
    assert popart_buffers(load("agents/agent_discrete_train"), "w/popart.")["count"].ndim == 0


def test_bilevel_epsilon():
    """Within the horizon; beyond it the reference goes on falling, below zero, and we are clamped."""
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
