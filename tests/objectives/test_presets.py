"""Presets: the published choices by name, and defaults that don't depend on the unit of rewards."""

from __future__ import annotations

import pytest
import torch
from torchrl.objectives import SoftUpdate

from torchrl_amago import MetaFrozenLake, make_policy, make_trainer, make_trial_env
from torchrl_amago.modules import HLGauss, PopArt, RunningScale, TwoHot
from torchrl_amago.modules.trajectory import GRUEncoder
from torchrl_amago.objectives import LOSSES

SMALL = {"d_model": 16, "num_layers": 1}
PARTS = {
    ("amago", "paper"): (PopArt, "none", 0.0),
    ("amago", "robust"): (RunningScale, "first", 0.3),
    ("amago2", "paper"): (TwoHot, "none", 0.0),
    ("amago2", "robust"): (HLGauss, "none", 0.3),
}


def make_env():
    return make_trial_env(MetaFrozenLake(batch_size=(2,), seed=0), episodes=2)


def policy_of(**options):
    return make_policy(make_env(), context_length=18, seq_model_options=SMALL, **options)


@pytest.mark.parametrize(("loss", "preset"), PARTS)
def test_the_parts_of_a_preset(loss, preset, tmp_path):
    policy = policy_of(preset=preset)
    options = dict(trial_length=18, total_updates=1, run_dir=tmp_path, loss=loss, preset=preset)
    trainer = make_trainer(make_env(), policy, **options)
    module = trainer.loss_module
    found = (type(module.value_codec), module.critic_network.module.norm, module.entropy_coeff)
    assert found == PARTS[loss, preset]
    is_robust = preset == "robust"
    assert policy.encoder.trajectory.normalize_states == is_robust
    assert trainer.stepper.clip_each == is_robust
    assert trainer.loss_module.takes_actions == ((loss, preset) == ("amago2", "paper"))


def test_given_parts_win():
    policy = policy_of(seq_model="gru")
    loss = LOSSES["amago"](policy, value_codec=PopArt(7), critic_options={"norm": "none"})
    assert type(loss.value_codec) is PopArt
    assert loss.critic_network.module.norm == "none"
    plain = {**SMALL, "normalize_states": False}
    policy = make_policy(make_env(), context_length=18, seq_model_options=plain)
    assert not policy.encoder.trajectory.normalize_states
    # An encoder's own class gets the arguments that it is given, no others.
    policy = policy_of(seq_model=lambda width, context_length, **given: GRUEncoder(width, **given))
    assert not policy.encoder.trajectory.normalize_states


@pytest.mark.parametrize(("preset", "gain"), [("paper", 1.0), ("robust", 8.0)])
def test_critics_of_amago2_take_or_list_actions_as_asked(preset, gain):
    for takes_actions in (False, True):
        options = dict(preset=preset, critic_options={"takes_actions": takes_actions})
        loss = LOSSES["amago2"](policy_of(), **options)
        assert loss.takes_actions == takes_actions
    assert loss.critic_network.module.action_gain == gain


def test_the_range_of_amago2_follows_rewards_alone_where_slices_are_whole_trials():
    """Predictions can't widen the range that they are counted in, whatever they are."""
    torch.manual_seed(0)
    batch = make_env().rollout(18, policy_of(), break_when_any_done=False)
    batch["mask"] = torch.ones(2, 18, 1, dtype=torch.bool)
    reward = batch["next", "reward"] = torch.randn(2, 18, 1)
    time = torch.arange(18).view(1, 18, 1).repeat(2, 1, 1)
    batch["next", "terminated"] = batch["next", "done"] = time == 17
    batch["is_init"] = time == 0
    found = []
    for seed in (0, 1):
        torch.manual_seed(seed)
        loss = LOSSES["amago2"](policy_of(), reward_scale=1.0)
        SoftUpdate(loss, tau=0.01)
        loss(batch)
        found.append(loss.value_codec.mean_and_scale())
    torch.testing.assert_close(*found, rtol=0, atol=0)
    sums, total = torch.zeros(2, 18, len(loss.discounts)), 0.0
    for t in reversed(range(18)):
        total = sums[:, t] = reward[:, t] + loss.discounts * total
    torch.testing.assert_close(found[0][0], sums.mean((0, 1)))
    torch.testing.assert_close(found[0][1], sums.square().mean((0, 1)).sqrt())


@pytest.mark.parametrize("name", ["amago", "amago2"])
def test_the_unit_of_rewards_does_not_matter(name):
    """Losses and gradients of a first batch are the same with rewards 300 times as large."""
    batch = make_env().rollout(18, policy_of(), break_when_any_done=False)
    batch["mask"] = torch.ones(2, batch.shape[1], 1, dtype=torch.bool)
    batch["next", "reward"] = torch.randn_like(batch["next", "reward"])
    found = []
    for scale in (1.0, 300.0):
        torch.manual_seed(0)
        loss = LOSSES[name](policy_of(), reward_scale=scale)
        SoftUpdate(loss, tau=0.01)
        torch.manual_seed(1)
        out = loss(batch)
        (out["loss_actor"] + out["loss_qvalue"]).backward()
        grads = {k: p.grad.clone() for k, p in loss.named_parameters() if p.grad is not None}
        found.append((out["loss_actor"].detach(), out["loss_qvalue"].detach(), grads))
    torch.testing.assert_close(*found, rtol=1e-2, atol=1e-4)


def test_unknown_presets(tmp_path):
    with pytest.raises(ValueError, match=r"preset must be .*robust.*paper.* got 'tuned'"):
        policy_of(preset="tuned")
    with pytest.raises(ValueError, match="preset must be"):
        LOSSES["amago2"](policy_of(), preset="tuned")
    # With a loss of one's own, too, whose preset is none of the trainer's business.
    options = dict(trial_length=18, total_updates=1, run_dir=tmp_path, loss=LOSSES["amago"])
    with pytest.raises(ValueError, match="preset must be"):
        make_trainer(make_env(), policy_of(), preset="tuned", **options)
