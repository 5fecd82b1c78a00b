"""AMAGOLoss as a TorchRL citizen: keys, dispatch, masks, targets, refusals, cost."""

from __future__ import annotations

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical, OneHot
from torchrl.objectives import SoftUpdate

from torchrl_amago import _cpu
from torchrl_amago._cpu import cpu_paths
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules import (
    ActionCritic,
    Actor,
    DiscreteCritic,
    HLGauss,
    MLPTimestepEncoder,
    PopArt,
    TransformerEncoder,
    TwoHot,
    ValueCodec,
)
from torchrl_amago.modules.critic import CriticEnsemble
from torchrl_amago.modules.distributions import make_distribution
from torchrl_amago.objectives import AMAGOLoss, amago

B, T, A, D = 3, 6, 4, 16
DISCOUNTS = (0.5, 0.9)
LENGTHS = torch.tensor([6, 4, 1])


SPECS = {
    "discrete": Categorical(A),
    "one_hot": OneHot(A),
    "multi_discrete": MultiCategorical([2, 2]),
    "multi_binary": Binary(A),
    "continuous": Bounded(-1.0, 1.0, shape=(A,)),
}
CODECS = {"popart": PopArt, "two_hot": TwoHot, "hl_gauss": HLGauss}


def make_loss(
    actions: str = "discrete",
    codec: str | ValueCodec = "popart",
    takes_actions: bool | None = None,
    distribution: str | None = None,
    masks_actions: bool = False,
    actor: Actor | None = None,
    critic: CriticEnsemble | None = None,
    action_key: str = "action_vector",
    discounts: tuple[float, ...] = DISCOUNTS,
    num_layers: int = 2,
    **options,
) -> AMAGOLoss:
    torch.manual_seed(1)
    shapes = {"observation": (5,), "prev_reward": (1,), "prev_action": (A,)}
    timestep = MLPTimestepEncoder(shapes, hidden_size=D, output_size=D)
    sizes = {"d_model": D, "num_heads": 2, "num_layers": num_layers}
    trajectory = TransformerEncoder(D, context_length=T, dropout_ff=0.0, dropout_emb=0.0, **sizes)
    space = ActionSpace.from_spec(SPECS[actions])
    policy = make_distribution(space, distribution)
    actor = actor or Actor(
        D, policy.num_params, len(DISCOUNTS), hidden_size=D, masks_actions=masks_actions
    )
    actor_keys = ["state", "action_mask"] if masks_actions else ["state"]
    codec = CODECS[codec](len(DISCOUNTS)) if isinstance(codec, str) else codec
    bins = codec.event_shape.numel() if codec.event_shape else None
    takes_actions = space.kind != "discrete" if takes_actions is None else takes_actions
    if critic is not None:
        takes_actions = isinstance(critic, ActionCritic)
    elif takes_actions:
        critic = ActionCritic(D, A, DISCOUNTS, num_outputs=bins, hidden_size=D)
    else:
        critic = DiscreteCritic(D, A, len(DISCOUNTS), num_outputs=bins, hidden_size=D)
    if actions == "multi_binary":
        options = {"online_coeff": 0.0, **options}
    parts = SimpleNamespace(
        encoder=TensorDictSequential(timestep, trajectory),
        actor=TensorDictModule(actor, in_keys=actor_keys, out_keys=["action_params"]),
        distribution=policy,
        discounts=discounts,
    )
    critic_keys = ["state", action_key] if takes_actions else ["state"]
    critic = TensorDictModule(critic, in_keys=critic_keys, out_keys=["action_value"])
    loss = AMAGOLoss(parts, critic, codec, **options)
    loss.parts = vars(parts)
    loss.target_update = SoftUpdate(loss, tau=0.1)
    return loss


def make_batch(masked: bool = True, actions: str = "discrete") -> TensorDict:
    torch.manual_seed(2)

    def steps(**more):
        return TensorDict(
            observation=torch.randn(B, T, 5),
            prev_reward=torch.randn(B, T, 1),
            prev_action=torch.randn(B, T, A),
            time_idx=torch.arange(T).view(1, T, 1).repeat(B, 1, 1) + 3,
            is_init=torch.zeros(B, T, 1, dtype=torch.bool),
            batch_size=[B, T],
            **more,
        )

    batch = steps(
        action=SPECS[actions].rand((B, T)) if actions != "discrete" else torch.randint(A, (B, T))
    )
    terminated = torch.zeros(B, T, 1, dtype=torch.bool)
    terminated[1, 3] = True
    batch["next"] = steps(reward=torch.randn(B, T, 1), terminated=terminated)
    for key in ("observation", "prev_reward", "prev_action", "time_idx"):
        batch["next", key][:, :-1] = batch[key][:, 1:]
    if masked:
        batch["collector", "mask"] = torch.arange(T) < LENGTHS[:, None]
    return batch


def total(out: TensorDict) -> torch.Tensor:
    return out["loss_actor"] + out["loss_qvalue"]


def run(loss: AMAGOLoss, batch: TensorDict) -> tuple[TensorDict, list[torch.Tensor]]:
    torch.manual_seed(3)
    out = loss(batch)
    total(out).backward()
    return out, [p.grad for p in loss.parameters() if p.requires_grad]


FORMS = [
    {},
    {"n_step": 3},
    {"actions": "continuous"},
    {"actions": "continuous", "codec": "hl_gauss", "online_coeff": 0.0, "num_policy_actions": 3},
    {"actions": "discrete", "codec": "two_hot", "takes_actions": True},
    {"actions": "multi_discrete"},
    {"actions": "multi_binary", "codec": "two_hot"},
    {"entropy_coeff": 0.3},
]


@pytest.mark.parametrize(
    ("form", "poison"),
    [*((form, math.nan) for form in FORMS), *itertools.product(FORMS[::3], (math.inf, 1e30))],
    ids=str,
)
@pytest.mark.parametrize("compact", [False, True])
def test_padding_has_no_influence(form, poison, compact):
    actions = form.get("actions", "discrete")
    loss = make_loss(**form, compact=compact)
    clean, clean_grads = run(loss, make_batch(actions=actions))
    state = {name: buffer.clone() for name, buffer in loss.named_buffers()}
    other = make_loss(**form, compact=compact)
    batch = make_batch(actions=actions)
    padding = ~batch["collector", "mask"]
    for key in batch.keys(True, True):
        if batch[key].is_floating_point():
            batch[key][padding] = poison
    batch["action"][padding] = 99 if actions != "continuous" else poison
    batch["time_idx"][padding] = 10**6
    batch["next", "terminated"][padding] = True
    out, grads = run(other, batch)
    for name, value in clean.items(True, True):
        assert torch.equal(out[name], value), name
    for grad, clean_grad in zip(grads, clean_grads, strict=True):
        assert torch.equal(grad, clean_grad)
    for name, buffer in other.named_buffers():
        assert torch.equal(buffer, state[name]), name


@pytest.mark.parametrize("actions", SPECS)
@pytest.mark.parametrize("codec", CODECS)
def test_every_action_space_with_every_codec(actions, codec):
    loss, batch = make_loss(actions, codec), make_batch(actions=actions)
    out, grads = run(loss, batch)
    assert total(out).isfinite()
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    assert list(out.keys()) == loss.out_keys
    assert torch.equal(out["q_value/0.9"], out["q_value"])
    estimates = loss.estimates(batch)
    assert all(value.shape == (B, T, len(DISCOUNTS)) for value in estimates.values())


@pytest.mark.parametrize("compact", [False, True])
def test_an_all_masked_batch_warns_gives_zero_and_moves_no_statistic(compact):
    loss = make_loss(compact=compact)
    batch = make_batch()
    batch["collector", "mask"].zero_()
    codec = {name: buffer.clone() for name, buffer in loss.value_codec.named_buffers()}
    norm = loss.encoder_network_params["module", "0", "input_norm", "mu"].clone()
    with pytest.warns(UserWarning, match="every step of the batch is masked"):
        out, grads = run(loss, batch)
    assert total(out).item() == 0.0
    assert all(grad is None or not grad.any() for grad in grads)
    for name, buffer in loss.value_codec.named_buffers():
        assert torch.equal(buffer, codec[name]), name
    assert torch.equal(loss.encoder_network_params["module", "0", "input_norm", "mu"], norm)


@pytest.mark.parametrize("form", [FORMS[2], FORMS[3], FORMS[4]], ids=str)
def test_chunks_of_steps_change_no_number(form, monkeypatch):
    """The CPU's few steps at a time, and the GPU's whole batch."""
    batch = make_batch(actions=form["actions"])
    with cpu_paths(False):
        whole, whole_grads = run(make_loss(**form, compact=False), batch.clone())
    monkeypatch.setattr(_cpu, "CHUNK_ROWS", 5)
    chunked, grads = run(make_loss(**form, compact=False), batch.clone())
    for name, value in whole.items():
        torch.testing.assert_close(chunked[name], value, msg=name)
    for one, other in zip(grads, whole_grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("form", [{}, {"n_step": 4}, {"entropy_coeff": 0.3}], ids=str)
def test_compact_changes_the_work_and_not_the_numbers(form, monkeypatch):
    subset = torch.randint(4, (B, T, 2, len(DISCOUNTS)))
    mask = make_batch()["collector", "mask"]
    outs, grads = [], []
    for compact, drawn in ((False, subset), (True, subset[mask])):
        monkeypatch.setattr(amago, "draw_critic_subset", lambda *_, drawn=drawn: drawn)
        loss, batch = make_loss(**form, compact=compact), make_batch()
        rows = []
        loss.critic_network.module.register_forward_hook(
            lambda _, args, __, rows=rows: rows.append(args[0].shape[:-1].numel())
        )
        out, grad = run(loss, batch)
        outs.append(out)
        grads.append(grad)
        assert rows == [int(mask.sum()) if compact else B * T] * 2
        assert batch["td_error"].shape == (B, T)
    for name, value in outs[0].items(True, True):
        torch.testing.assert_close(outs[1][name], value, msg=str(name))
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("compact", [False, True])
def test_without_a_mask_every_step_is_real(compact):
    batch = make_batch(masked=False)
    full = make_batch()
    full["collector", "mask"].fill_(True)
    one, other = (total(run(make_loss(compact=compact), td)[0]) for td in (batch, full))
    assert torch.equal(one, other)


def test_only_terminated_stops_bootstrapping():
    batch = make_batch()
    reference = total(run(make_loss(), batch.clone())[0])
    batch["next", "truncated"] = torch.ones(B, T, 1, dtype=torch.bool)
    batch["next", "done"] = torch.zeros(B, T, 1, dtype=torch.bool)
    batch["next", "done"][range(B), LENGTHS - 1] = True  # as samplers mark the ends of slices
    assert torch.equal(total(run(make_loss(), batch.clone())[0]), reference)
    batch["next", "terminated"].fill_(True)
    assert not torch.equal(total(run(make_loss(), batch)[0]), reference)


def test_one_hot_and_categorical_actions_agree():
    batch = make_batch()
    reference = total(run(make_loss(), batch.clone())[0])
    batch["action"] = torch.nn.functional.one_hot(batch["action"], A)
    assert torch.equal(total(run(make_loss("one_hot"), batch.clone())[0]), reference)
    with pytest.raises(ValueError, match="an action must have the shape"):
        make_loss("continuous")(make_batch())


def test_dispatch_takes_tensors_and_gives_tensors():
    batch = make_batch()
    for masked in (True, False):
        loss = make_loss()
        keys = loss.in_keys if masked else loss.in_keys[:-1]  # the mask comes last
        torch.manual_seed(3)
        out = loss(**{"_".join(k) if isinstance(k, tuple) else k: batch[k] for k in keys})
        expected = run(make_loss(), make_batch(masked=masked))[0]
        assert torch.equal(torch.stack(out), torch.stack([*expected.values()]))
        assert list(expected.keys()) == loss.out_keys


def test_set_keys_renames_entries():
    loss, batch = make_loss(), make_batch()
    reference = total(run(make_loss(), batch.clone())[0])
    loss.set_keys(action="my_action", reward="my_reward", terminated="my_end", priority="prio")
    batch.rename_key_("action", "my_action")
    batch["next"].rename_key_("reward", "my_reward")
    batch["next"].rename_key_("terminated", "my_end")
    assert torch.equal(total(run(loss, batch)[0]), reference)
    assert batch["prio"].shape == (B, T)


def test_targets_follow_after_soft_update_and_encoder_has_none():
    loss = make_loss()
    names = {name for name, _ in loss.named_buffers() if name.startswith("target_")}
    assert names
    assert not any(name.startswith("target_encoder") for name in names)
    key = ("module", "mlp", "out", "weight")
    before = loss.target_actor_network_params[key].clone()
    with torch.no_grad():
        loss.actor_network_params[key].data += 1.0
    loss.target_update.step()
    torch.testing.assert_close(loss.target_actor_network_params[key], before + 0.1)


def test_one_encoder_pass_and_one_critic_pass_of_each_kind():
    loss = make_loss()
    counts = {"encoder": 0, "critic": 0, "actor": 0}

    def counting(name, module):
        def hook(*_):
            counts[name] += 1

        module.register_forward_hook(hook)

    counting("encoder", loss.encoder_network.module[1])
    counting("critic", loss.critic_network.module)
    counting("actor", loss.actor_network.module)
    loss(make_batch())
    assert counts == {"encoder": 1, "critic": 2, "actor": 2}


def test_behaviour_cloning_leaves_critics_alone():
    loss = make_loss(online_coeff=0.0, offline_coeff=1.0, advantage_filter=None)
    loss.critic_network.module.register_forward_hook(lambda *_: pytest.fail("critic was called"))
    out, _ = run(loss, make_batch())
    assert out["loss_qvalue"].item() == 0.0
    assert all(p.grad is None for p in loss.critic_network_params.parameters())


def test_an_entropy_bonus_is_in_units_of_the_advantage():
    batch, losses = make_batch(), []
    for entropy_coeff in (0.0, 0.3):
        loss = make_loss(entropy_coeff=entropy_coeff, online_coeff=2.0).eval()
        loss.actor_network_params.data.zero_()  # uniform actions
        losses.append(loss(batch)["loss_actor"])
    advantage = loss.estimates(batch)["advantage"][batch["collector", "mask"]]
    unit = (advantage / loss.value_codec.sigma).square().mean(0).sqrt()
    assert (unit > 0.01).all()
    torch.testing.assert_close(losses[0] - losses[1], 2.0 * 0.3 * unit.mean() * math.log(A))


@pytest.mark.parametrize("actions", ["discrete", "continuous"])
def test_an_entropy_bonus_widens_the_policy(actions):
    loss = make_loss(actions=actions, offline_coeff=0.0, entropy_coeff=1000.0)
    loss.actor_network_params.data.mul_(3.0)  # far from uniform
    optimizer, entropies = torch.optim.SGD(loss.actor_network_params.parameters(), 1e-3), []
    for _ in range(10):
        out, _ = run(loss, make_batch(actions=actions))
        entropies.append(out["entropy"].item())
        optimizer.step()
        optimizer.zero_grad()
    assert entropies[-1] > entropies[0] + 0.02, entropies


@pytest.mark.parametrize("codec", ["popart", "two_hot"])
def test_critics_of_both_kinds_agree(codec):
    """Equal predictions of both kinds give equal losses."""
    form = {"codec": codec, "online_coeff": 0.0, "advantage_filter": "binary"}
    losses = []
    for takes_actions in (False, True):
        loss = make_loss(takes_actions=takes_actions, **form)
        for params in (loss.critic_network_params, loss.target_critic_network_params):
            for p in params.values(True, True):
                p.data.mul_(0.0)  # the same value for every action
        losses.append(run(loss, make_batch())[0])
    for name in ("loss_qvalue", "td_target", "q_value"):
        torch.testing.assert_close(losses[0][name], losses[1][name])


@pytest.mark.parametrize(
    "form", [{}, {"takes_actions": True}, {"actions": "multi_discrete"}], ids=str
)
@pytest.mark.parametrize("compact", [False, True])
def test_action_masks(form, compact):
    actions = form.get("actions", "discrete")

    def masked_batch(allowed: torch.Tensor) -> TensorDict:
        batch = make_batch(actions=actions)
        for td in (batch, batch["next"]):
            td["action_mask"] = allowed.expand(B, T, A).clone()
        return batch

    everything, batch = torch.ones(A, dtype=torch.bool), make_batch(actions=actions)
    plain, _ = run(make_loss(**form, compact=compact), batch)
    free, _ = run(make_loss(**form, compact=compact, masks_actions=True), masked_batch(everything))
    for name, value in plain.items(True, True):
        torch.testing.assert_close(free[name], value, msg=str(name))

    allowed = torch.tensor([True, False, True, True])
    batch = masked_batch(allowed)
    batch["action"].zero_()
    # Action masks may be all False on padding and after the end.
    padding = ~batch["collector", "mask"]
    for td in (batch, batch["next"]):
        td["action_mask"][padding] = False
    batch["next", "action_mask"][1, 3] = False
    loss = make_loss(**form, compact=compact, masks_actions=True)
    out, grads = run(loss, batch)
    assert total(out).isfinite()
    assert all(grad.isfinite().all() for grad in grads)
    last = loss.actor_network_params["module", "mlp", "out", "bias"].grad.view(-1, A)
    assert not last[:, 1].any()
    assert last[:, [0, 2]].any()
    batch["action_mask"][0, 0] = False
    with pytest.raises(ValueError, match="must allow at least one action in each row"):
        loss(batch)


def test_mask_hooks_edit_what_counts():
    def first_step_only(batch, term, mask):
        assert term.shape == mask.shape
        assert not term.requires_grad
        edited = mask.clone()
        edited[:, 1:] = False
        return edited

    for compact in (False, True):
        loss = make_loss(reduction="none", compact=compact)
        batch = make_batch()
        torch.manual_seed(3)
        whole = loss(batch)
        edited = make_loss(actor_mask=first_step_only, critic_mask=first_step_only, compact=compact)
        out, _ = run(edited, make_batch())
        for name in ("loss_actor", "loss_qvalue"):
            torch.testing.assert_close(out[name], whole[name][:, 0].mean())


def test_metrics_against_numbers_by_hand():
    loss, batch = make_loss(compact=False), make_batch()
    seen = {}
    original = loss.value_codec.loss
    loss.value_codec.loss = lambda q, target: seen.update(q=q, target=target) or original(q, target)
    torch.manual_seed(3)
    out = loss(batch)
    mask = batch["collector", "mask"]
    q = (loss.value_codec.decode(seen["q"]) / loss.reward_scale)[mask]
    target = (seen["target"] / loss.reward_scale)[mask]
    expected = {
        "q_value": q.mean(1).mean(0),
        "q_value_std": q.std(1, correction=0).mean(0),
        "td_target": target.mean(0),
        "td_target_min": target.min(0).values,
        "td_target_max": target.max(0).values,
        "td_error": (q.mean(1) - target).abs().mean(0),
        "target_mean": loss.value_codec.mu / loss.reward_scale,
        "target_scale": loss.value_codec.sigma / loss.reward_scale,
    }
    for name, value in expected.items():
        torch.testing.assert_close(out[name], value[-1], msg=name)
    for discount, value in zip(DISCOUNTS, expected["q_value"], strict=True):
        torch.testing.assert_close(out[f"q_value/{discount}"], value)
    assert out["effective_batch"] == mask.sum() == 11


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_reductions_agree_with_the_mean(reduction):
    mask = make_batch()["collector", "mask"]
    mean, _ = run(make_loss(), make_batch())
    loss, batch = make_loss(reduction=reduction), make_batch()
    torch.manual_seed(3)
    out = loss(batch)
    per_step = {"loss_actor": len(DISCOUNTS), "loss_qvalue": 4 * len(DISCOUNTS)}
    for name, entries in per_step.items():
        if reduction == "none":
            assert out[name].shape[:2] == (B, T)
            assert not out[name][~mask].any()
        torch.testing.assert_close(out[name].sum() / (mask.sum() * entries), mean[name])


@pytest.mark.parametrize("compact", [True, False])
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_importance_weights_of_a_batch(reduction, compact):
    def losses(**options):
        torch.manual_seed(3)
        return make_loss(compact=compact, **options)(batch.clone())

    batch = make_batch()
    mask = batch["collector", "mask"]
    plain = losses(reduction="none")
    weight = torch.rand(B, generator=torch.Generator().manual_seed(0)).unsqueeze(-1).expand(B, T)
    batch["priority_weight"] = torch.where(mask, weight, float("nan"))
    out = losses(reduction=reduction)
    for name in ("loss_actor", "loss_qvalue"):
        weight_BT = weight.reshape(B, T, *[1] * (plain[name].ndim - 2)).expand_as(plain[name])
        expected = weight_BT * plain[name]  # zero on padding
        if reduction != "none":
            expected = expected.sum()
        if reduction == "mean":
            expected = expected / weight_BT[mask].sum()
        torch.testing.assert_close(out[name], expected)
    ignoring = losses(reduction="none", use_prioritized_weights=False)
    assert torch.equal(ignoring["loss_qvalue"], plain["loss_qvalue"])


def test_importance_weights_that_are_missing():
    loss = make_loss(use_prioritized_weights=True)
    with pytest.raises(KeyError, match="reads 'priority_weight' of a batch, but it is missing at"):
        loss(make_batch())


def test_the_policy_shares_its_weights_and_statistics_with_the_loss():
    loss = make_loss()
    encoder = loss.encoder_network
    before = encoder.module[0].input_norm.mu.clone()
    run(loss, make_batch())
    assert not torch.equal(encoder.module[0].input_norm.mu, before)
    params = {p.data_ptr() for p in loss.parameters()}
    assert all(p.data_ptr() in params for p in encoder.parameters())


def test_eval_mode_updates_no_input_statistics():
    loss = make_loss().eval()
    before = loss.encoder_network_params["module", "0", "input_norm", "mu"].clone()
    run(loss, make_batch())
    assert torch.equal(loss.encoder_network_params["module", "0", "input_norm", "mu"], before)


def test_bfloat16_autocast_stays_close():
    exact = total(run(make_loss(), make_batch())[0])
    with torch.autocast("cpu", torch.bfloat16):
        low = total(run(make_loss(), make_batch())[0])
    assert low.item() == pytest.approx(exact.item(), rel=3e-2)


def test_learns_a_value_it_can_read_off():
    """Reward 1 at every step, discount 0.5: every value tends to 2, times the reward scale."""
    loss = make_loss(online_coeff=0.0, n_step=1)
    optimizer = torch.optim.Adam([p for p in loss.parameters() if p.requires_grad], lr=5e-3)
    batch = make_batch(masked=False)
    batch["next", "reward"].fill_(1.0)
    batch["next", "terminated"].zero_()
    target_update = SoftUpdate(loss, tau=0.2)
    for _ in range(120):
        total(loss(batch)).backward()
        optimizer.step()
        optimizer.zero_grad()
        target_update.step()
    values = loss.estimates(batch)["q_value"][..., 0] / loss.reward_scale
    torch.testing.assert_close(values, torch.full((B, T), 2.0), atol=0.15, rtol=0.0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_target_critics": 0}, "num_target_critics must be at least 1, got 0"),
        ({"n_step": 0}, "n_step must be at least 1, got 0"),
        ({"num_policy_actions": 0}, "num_policy_actions must be at least 1, got 0"),
        (
            {"actions": "multi_binary", "online_coeff": 1.0},
            "needs samples with a gradient, which Bernoulli doesn't have",
        ),
        (
            {"actions": "continuous", "distribution": "tanh_mixture"},
            "needs samples with a gradient, which TanhMixture doesn't have",
        ),
        (
            {"actions": "continuous", "takes_actions": False},
            "need a single discrete action, got a continuous space",
        ),
        ({"advantage_filter": "soft"}, "advantage_filter must be one of .*'binary'.* got 'soft'"),
    ],
)
def test_arguments_out_of_range(options, message):
    with pytest.raises(ValueError, match=message):
        make_loss(**options)


def test_names_the_missing_entry():
    batch = make_batch().exclude(("next", "prev_action"))
    with pytest.raises(KeyError, match="reads 'prev_action' .* missing under next"):
        make_loss()(batch)


@pytest.mark.parametrize(
    ("actions", "bad"),
    [("discrete", A), ("discrete", -1), ("continuous", 1.5), ("multi_binary", 2)],
)
def test_actions_outside_of_their_space(actions, bad):
    loss, batch = make_loss(actions), make_batch(actions=actions)
    batch["action"][0, 0] = bad
    with pytest.raises(ValueError, match="1 stored actions of the batch are outside of their"):
        loss(batch)


def test_rewards_of_several_numbers():
    batch = make_batch()
    batch["next", "reward"] = torch.zeros(B, T, 2)
    with pytest.raises(RuntimeError, match=r"'\[3, 6\]' is invalid for input of size 36"):
        make_loss()(batch)


def test_moves_between_dtypes_and_devices_as_any_module():
    loss = make_loss().double()
    assert {p.dtype for p in loss.parameters()} == {torch.float64}
    assert loss.discounts.dtype == torch.float64
    loss.to("cpu").float()
    assert total(run(loss, make_batch())[0]).isfinite()
