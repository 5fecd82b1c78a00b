"""What AMAGOLoss refuses of batches and arguments, and what leaves a batch and the loss as they were."""

from __future__ import annotations

import pytest
import torch

from tests.objectives.test_amago import DISCOUNTS, A, B, D, T, make_batch, make_loss, run, total
from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
from torchrl_amago.modules import (
    ActionCritic,
    Actor,
    DiscreteCritic,
    HLGauss,
    PopArt,
)
from torchrl_amago.objectives import amago_loss


@pytest.mark.parametrize("compact", [False, True])
def test_refuses_a_real_step_behind_padding(compact):
    loss, batch = make_loss(compact=compact), make_batch()
    left = batch["collector", "mask"].flip(1)
    hole = torch.ones(B, T, dtype=torch.bool)
    hole[1, 2] = False
    for mask in (left, hole):
        batch["collector", "mask"] = mask
        for read in (loss, loss.estimates):
            with pytest.raises(ValueError, match="real steps of a row must come first.*'right'"):
                read(batch)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_a_mask_hook_may_edit_its_argument_in_place(compact, reduction):
    def in_place(batch, term, mask):
        mask[..., -1] = False
        return mask

    def copying(batch, term, mask):
        return in_place(batch, term, mask.clone())

    outs = []
    for hook in (copying, in_place):
        options = {"actor_mask": hook, "critic_mask": hook, "reduction": reduction}
        loss, batch = make_loss(compact=compact, **options), make_batch()
        before = batch["collector", "mask"].clone()
        torch.manual_seed(3)
        outs.append(loss(batch))
        assert torch.equal(batch["collector", "mask"], before)
    for name in ("loss_actor", "loss_qvalue"):
        assert outs[0][name].any()
        assert torch.equal(outs[0][name], outs[1][name]), name


@pytest.mark.parametrize(
    ("part", "message"),
    [
        ({"actor": Actor(D, A, 1, hidden_size=D)}, "the actor has 1"),
        ({"critic": DiscreteCritic(D, A, 1, hidden_size=D)}, "the critics have 1"),
        ({"critic": ActionCritic(D, A, (0.5,), hidden_size=D)}, "the critics have 1"),
        ({"codec": PopArt(1)}, "the value codec has 1"),
        ({"codec": HLGauss(1)}, "the value codec has 1"),
    ],
    ids=["actor", "critic", "action_critic", "popart", "hl_gauss"],
)
def test_refuses_parts_for_another_number_of_discounts(part, message):
    with pytest.raises(ValueError, match=rf"for the same discounts.*\(0.5, 0.9\).*{message}"):
        make_loss(**part)


def test_refuses_critics_that_read_other_discounts():
    make_loss(critic=ActionCritic(D, A, DISCOUNTS, hidden_size=D))
    with pytest.raises(ValueError, match=r"for the same discounts.*the critics read \(0.5, 0.99\)"):
        make_loss(critic=ActionCritic(D, A, (0.5, 0.99), hidden_size=D))


def test_a_preset_refuses_discounts_that_are_not_the_policys():
    env = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=2)
    policy = make_policy(env, context_length=8, discounts=(0.5, 0.9, 0.99))
    with pytest.raises(ValueError, match="for the same discounts.*discounts=policy.discounts"):
        amago_loss(policy, discounts=(0.5,))


def test_refuses_batches_that_are_not_rows_of_steps():
    loss = make_loss()
    for batch in (make_batch()[0], make_batch().unsqueeze(0)):
        for read in (loss, loss.estimates):
            with pytest.raises(ValueError, match=r"batches \[B, T\].*reshape\(-1, "):
                read(batch)


@pytest.mark.parametrize("compact", [False, True])
def test_refuses_a_row_with_the_beginning_of_a_second_trial(compact):
    loss, batch = make_loss(compact=compact), make_batch()
    batch["is_init"][:, 0] = True
    batch["is_init"][2, 3] = True  # padding may hold anything
    batch["next", "is_init"][:, 2] = True
    run(loss, batch)
    batch["is_init"][0, 3] = True
    with pytest.raises(ValueError, match="one row holds one trial.*TrialCollector"):
        loss(batch)


def test_estimates_change_nothing_and_switch_dropout_off():
    loss, batch = make_loss(), make_batch()
    loss.critic_network.module.dropout = 0.5
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    outs = []
    for training in (True, False):
        loss.train(training)
        torch.manual_seed(3)
        outs.append(loss.estimates(batch))
        assert loss.training == training
    for name, value in outs[0].items():
        assert torch.equal(value, outs[1][name]), name
    for name, buffer in loss.named_buffers():
        assert torch.equal(buffer, before[name]), name
    norm = loss.encoder_network_params["module", "0", "input_norm", "mu"]
    moved = norm.clone()
    run(loss.train(), batch)
    assert not torch.equal(norm, moved)


def test_the_spread_of_estimates_is_that_of_the_metrics():
    loss, batch = make_loss().eval(), make_batch(masked=False)
    torch.manual_seed(3)
    out = loss(batch)
    spread = loss.estimates(batch)["q_value_std"].mean((0, 1))
    # The update in between moved the codec's statistics, which decoding outlives.
    metric = out["per_discount", "q_value_std"] * loss.reward_scale
    torch.testing.assert_close(spread, metric)


def test_a_single_critic_has_no_spread():
    single = DiscreteCritic(D, A, len(DISCOUNTS), num_critics=1, hidden_size=D)
    estimates = make_loss(critic=single, num_target_critics=1).estimates(make_batch())
    for name in ("q_value_std", "value_std"):
        assert not estimates[name].any()
        assert make_loss().estimates(make_batch())[name].all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_reduction": "max"}, "target_reduction must be one of 'min', 'mean', got 'max'"),
        (
            {"filter_space": "norm"},
            "filter_space must be one of 'raw', 'normalized', 'value', got 'norm'",
        ),
        ({"reduction": "avg"}, "reduction must be one of 'mean', 'sum', 'none', got 'avg'"),
        (
            {"use_prioritized_weights": "always"},
            "use_prioritized_weights must be True, False or 'auto', got 'always'",
        ),
        ({"online_coeff": -1.0}, "online_coeff must be 0 or more, got -1.0"),
        ({"offline_coeff": -0.1}, "offline_coeff must be 0 or more, got -0.1"),
        ({"critic_coeff": float("nan")}, "critic_coeff must be 0 or more, got nan"),
        ({"reward_scale": 0.0}, "reward_scale must be above 0, got 0.0"),
        ({"reward_scale": -1.0}, "reward_scale must be above 0, got -1.0"),
    ],
)
def test_refuses_words_and_numbers_that_choose_nothing(options, message):
    with pytest.raises(ValueError, match=message):
        make_loss(**options)


def test_estimates_refuse_a_space_that_there_is_not():
    with pytest.raises(ValueError, match="filter_space must be one of .* got 'norm'"):
        make_loss().estimates(make_batch(), filter_space="norm")


@pytest.mark.parametrize(
    ("key", "message"),
    [
        ("action", "reads 'action' .* missing at the root"),
        ("observation", "reads 'observation' .* missing at the root"),
        (("next", "reward"), "reads 'reward' .* missing under next"),
        (("next", "terminated"), "reads 'terminated' .* missing under next"),
        ("next", "missing under next"),
    ],
)
def test_names_whatever_entry_is_missing(key, message):
    with pytest.raises(KeyError, match=message):
        make_loss()(make_batch().exclude(key))


def test_critics_may_read_the_action_by_another_name():
    batch = make_batch(actions="continuous")
    expected = total(run(make_loss("continuous"), batch)[0])
    loss = make_loss("continuous", action_key="my_vector")
    loss.set_keys(action_vector="my_vector")
    assert loss.takes_actions
    assert torch.equal(total(run(loss, batch)[0]), expected)
