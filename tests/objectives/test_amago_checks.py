"""Errors of AMAGOLoss, and calls that leave a batch and the loss unchanged."""

from __future__ import annotations

import warnings

import pytest
import torch
from torchrl.data import Categorical

from tests.objectives.test_amago import (
    DISCOUNTS,
    FORMS,
    A,
    B,
    D,
    T,
    make_batch,
    make_loss,
    run,
    total,
)
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules import (
    ActionCritic,
    DiscreteCritic,
    HLGauss,
    PopArt,
    ValueCodec,
)
from torchrl_amago.modules.distributions import Discrete


@pytest.mark.parametrize("compact", [False, True])
def test_a_real_step_behind_padding_raises(compact):
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
        ({"critic": DiscreteCritic(D, A, 1, hidden_size=D)}, "DiscreteCritic with num_discounts=1"),
        ({"critic": ActionCritic(D, A, (0.5,), hidden_size=D)}, "ActionCritic with num_discounts="),
        ({"codec": PopArt(1)}, "PopArt with num_discounts=1 in place of 2"),
        ({"codec": HLGauss(1)}, "HLGauss with num_discounts=1 in place of 2"),
        (
            {"critic": DiscreteCritic(D, A, 2, num_outputs=5, hidden_size=D)},
            r"DiscreteCritic with event_shape=torch.Size\(\[5\]\) in place of torch.Size\(\[\]\)",
        ),
    ],
    ids=["critic", "action_critic", "popart", "hl_gauss", "outputs"],
)
def test_parts_that_do_not_fit(part, message):
    with pytest.raises(ValueError, match=f"must fit the policy and one another, got {message}"):
        make_loss(**part)


def test_batches_must_be_rows_of_steps():
    loss = make_loss()
    for batch in (make_batch()[0, 0], make_batch().unsqueeze(0)):
        for read in (loss, loss.estimates):
            with pytest.raises(ValueError, match=r"batches \[B, T\].*reshape\(-1, T"):
                read(batch)


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
    metric = out["q_value_std"] * loss.reward_scale
    torch.testing.assert_close(spread[-1], metric)


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
            "use_prioritized_weights must be one of 'auto', True, False, got 'always'",
        ),
        ({"online_coeff": -1.0}, "online_coeff must be positive.*, got -1.0"),
        ({"offline_coeff": -0.1}, "offline_coeff must be positive.*, got -0.1"),
        ({"entropy_coeff": -0.1}, "entropy_coeff must be positive.*, got -0.1"),
        ({"critic_coeff": float("nan")}, "critic_coeff must be positive.*, got nan"),
        ({"reward_scale": 0.0}, "reward_scale must be positive, got 0.0"),
        ({"reward_scale": -1.0}, "reward_scale must be positive, got -1.0"),
        (
            {"reward_scale": float("inf")},
            "reward_scale must be positive and finite, got inf. Use 1",
        ),
        (
            {"online_coeff": float("inf")},
            "online_coeff must be positive.*, got inf. Use 0 to leave",
        ),
        ({"n_step": float("nan")}, "n_step must be an integer of at least 1, got nan"),
        ({"n_step": 2.5}, "n_step must be an integer of at least 1, got 2.5"),
    ],
)
def test_options_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make_loss(**options)


def test_estimates_of_an_unknown_space():
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
def test_missing_entries_are_named(key, message):
    with pytest.raises(KeyError, match=message):
        make_loss()(make_batch().exclude(key))


def test_critics_may_read_the_action_by_another_name():
    batch = make_batch(actions="continuous")
    expected = total(run(make_loss("continuous"), batch)[0])
    loss = make_loss("continuous", action_key="my_vector")
    loss.set_keys(action_vector="my_vector")
    assert loss.takes_actions
    assert torch.equal(total(run(loss, batch)[0]), expected)


def test_batches_without_steps_raise():
    for batch in (make_batch()[:, :0], make_batch().reshape(-1)[:0]):
        with pytest.raises(ValueError, match=r"at least one step, got the batch size \["):
            make_loss()(batch)


@pytest.mark.parametrize("compact", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_masks_must_be_bool(compact, dtype):
    loss, batch = make_loss(compact=compact), make_batch()
    batch["collector", "mask"] = batch["collector", "mask"].to(dtype)
    for read in (loss, loss.estimates):
        with pytest.raises(ValueError, match=f"a mask must be bool, got {dtype}"):
            read(batch)


@pytest.mark.parametrize("reward", [1e19, -1e30, float("inf"), float("nan")])
def test_rewards_whose_squares_overflow(reward):
    loss, batch = make_loss(), make_batch()
    batch["next", "reward"][2, 5] = reward  # padding
    assert total(loss(batch)).isfinite()
    batch["next", "reward"][0, 2] = reward
    before = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    with pytest.raises(
        ValueError, match=r"rewards times reward_scale=10 must be finite and within"
    ):
        loss(batch)
    assert all(torch.equal(buffer, before[name]) for name, buffer in loss.named_buffers())


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_the_largest_rewards_give_finite_losses(form):
    loss, batch = make_loss(**form), make_batch(actions=form.get("actions", "discrete"))
    batch["next", "reward"].fill_(1e11)
    for _ in range(3):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of targets outside of the bins
            out, grads = run(loss, batch)
        assert total(out).isfinite()
        assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("part", ["loss", "policy"])
def test_weights_of_half_precision_raise(part, dtype):
    loss, batch = make_loss(), make_batch()
    (loss if part == "loss" else loss.encoder_network).to(dtype)
    for read in (loss, loss.estimates):
        with pytest.raises(TypeError, match=f"weights of float32 or more, got {dtype}.*autocast"):
            read(batch)


def test_a_plain_categorical_policy():
    unclipped = Discrete(ActionSpace.from_spec(Categorical(A)), clip_low=0.0, clip_high=1.0)
    logits = torch.randn(7, A)
    expected = torch.distributions.Categorical(logits=logits).probs
    torch.testing.assert_close(unclipped(logits).probs, expected)


def test_a_codec_of_a_users_own_needs_no_statistics():
    class Plain(ValueCodec):
        def update(self, target, mask):
            pass

        def encode(self, target):
            return target

        decode = normalize = encode

        def loss(self, prediction, target):
            return (prediction - target.unsqueeze(-2)).square()

    loss = make_loss(codec=Plain())
    out, _ = run(loss, make_batch())
    assert (out["target_mean"], out["target_scale"]) == (0.0, 0.1)  # over reward_scale=10
    loss.reset_parameters_recursive()
