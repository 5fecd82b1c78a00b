"""The points of TorchRL's `LossModuleTestBase` (pytorch/rl, test/objectives), for AMAGOLoss.

Unknown and renamed keys, keywords, selected outputs, resets, state dicts, garbage collection,
reductions, which loss moves which network, exploration, target updates; logging by a stock
trainer's loggers.
"""

from __future__ import annotations

import gc
import json
import weakref
from copy import deepcopy
from dataclasses import fields
from types import SimpleNamespace

import pytest
import torch
from tensordict import TensorDict
from tensordict.nn import TensorDictModule, TensorDictSequential
from torch import nn
from torchrl.envs.utils import ExplorationType, exploration_type, set_exploration_type
from torchrl.modules import recurrent_mode
from torchrl.objectives import HardUpdate, SoftUpdate
from torchrl.record.loggers.csv import CSVLogger
from torchrl.record.loggers.tensorboard import TensorboardLogger
from torchrl.trainers import Trainer
from torchrl.trainers.trainers import DefaultOptimizationStepper

from tests.modules.timestep.entries import MAKERS
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
from torchrl_amago.modules import (
    ActionCritic,
    Actor,
    DiscreteCritic,
    PopArt,
    ResidualActor,
    TwoHot,
)
from torchrl_amago.modules.build import SEQ_MODELS
from torchrl_amago.objectives import AMAGOLoss, exponential_filter

KEYS = {field.name: field.default for field in fields(AMAGOLoss.default_keys)}
# What networks pass on inside the loss; all others name entries of a batch.
INSIDE = {"state", "action_params", "action_vector", "action_value"}
UNDER_NEXT = {"reward", "terminated", "done"}


# --- keys ---


def test_unknown_keys_raise():
    with pytest.raises(ValueError, match="unknown_key is not an accepted tensordict key"):
        make_loss().set_keys(unknown_key="test2")


def test_keys_are_set_one_by_one_and_together():
    loss = make_loss()
    assert {name: getattr(loss.tensor_keys, name) for name in KEYS} == KEYS
    for name in KEYS:
        loss.set_keys(**{name: "test1"})
        assert getattr(loss.tensor_keys, name) == "test1"
    loss.set_keys(**dict.fromkeys(KEYS))  # None brings the default back
    assert {name: getattr(loss.tensor_keys, name) for name in KEYS} == KEYS


@pytest.mark.parametrize("takes_actions", [False, True])
@pytest.mark.parametrize("name", KEYS)
def test_each_key_works_alone(name, takes_actions):
    expected, _ = run(make_loss(takes_actions=takes_actions), split_batch())
    loss, batch = make_loss(takes_actions=takes_actions), split_batch()
    loss.set_keys(**{name: "mine"})
    if name not in INSIDE and name != "priority":
        place = batch["next"] if name in UNDER_NEXT else batch
        place.rename_key_(KEYS[name], "mine")
        if name == "is_init":  # which the encoder reads by its own name
            batch["is_init"] = torch.zeros(B, T, 1, dtype=torch.bool)
    out, _ = run(loss, batch)
    assert torch.equal(total(out), total(expected))
    assert ("mine" in batch) == (name not in INSIDE | UNDER_NEXT)


def split_batch() -> TensorDict:
    """A batch with an entry of every key, in which one row holds two trials."""
    batch = make_batch()
    batch["priority_weight"] = torch.rand(B, T, generator=torch.Generator().manual_seed(0))
    batch["next", "done"] = torch.zeros(B, T, 1, dtype=torch.bool)
    batch["next", "done"][0, 3] = True
    return batch


@pytest.mark.parametrize("set_them", [False, True])
def test_networks_may_use_other_names(set_them):
    expected, _ = run(make_loss("continuous"), make_batch(actions="continuous"))
    other = make_loss("continuous")
    parts, critic = other.parts, other.critic_network.module
    parts["encoder"].module[1].out_keys[0] = "my_state"
    parts["encoder"] = TensorDictSequential(*parts["encoder"].module)
    parts["actor"] = TensorDictModule(parts["actor"].module, in_keys=["my_state"], out_keys=["p"])
    names = {"state": "my_state", "action_params": "p", "action_vector": "v", "action_value": "q"}
    critic = TensorDictModule(critic, in_keys=["my_state", "v"], out_keys=["q"])
    loss = AMAGOLoss(SimpleNamespace(**parts), critic)
    loss.target_update = SoftUpdate(loss, tau=0.1)
    if set_them:
        loss.set_keys(**names)
    assert "my_state" not in loss.in_keys
    out, _ = run(loss, make_batch(actions="continuous"))
    assert torch.equal(total(out), total(expected))


# --- keywords and outputs ---


def keywords(loss: AMAGOLoss, batch: TensorDict) -> dict[str, torch.Tensor]:
    there = [key for key in loss.in_keys if key in batch.keys(True)]
    return {"_".join(key) if isinstance(key, tuple) else key: batch[key] for key in there}


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("masked", [True, False])
def test_keywords_give_what_the_tensordict_does(form, masked):
    batch = make_batch(masked, form.get("actions", "discrete"))
    expected, _ = run(make_loss(**form), batch.clone())
    loss = make_loss(**form)
    given = keywords(loss, batch)
    assert ("collector_mask" in given) == masked
    torch.manual_seed(3)
    by_name = dict(zip(loss.out_keys, loss(**given), strict=True))
    assert by_name.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(by_name[name], value), name


def test_the_mask_by_keyword_counts():
    batch = make_batch()
    given = keywords(make_loss(), batch)
    full = {**given, "collector_mask": torch.ones(B, T, dtype=torch.bool)}
    effective = [make_loss().select_out_keys("effective_batch")(**x) for x in (given, full)]
    assert [x.item() for x in effective] == [11, 18]
    del given["collector_mask"]
    assert make_loss().select_out_keys("effective_batch")(**given) == 18
    batch["priority_weight"] = torch.rand(B, T)
    expected, _ = run(make_loss(), batch.clone())
    loss = make_loss().select_out_keys("loss_actor")
    torch.manual_seed(3)
    weighted = loss(**keywords(loss, batch), priority_weight=batch["priority_weight"])
    assert torch.equal(weighted, expected["loss_actor"])


@pytest.mark.parametrize("masked", [True, False])
def test_selected_outputs(masked):
    loss, batch = make_loss(), make_batch(masked)
    names = loss.out_keys
    assert list(loss(batch).keys()) == names
    assert loss.select_out_keys("loss_qvalue", "entropy") is loss
    assert loss.out_keys == ["loss_qvalue", "entropy"]
    assert loss.out_keys_source == names
    assert list(loss(batch).keys()) == loss.out_keys
    one, other = loss(**keywords(loss, batch))
    assert one.requires_grad
    assert not other.requires_grad
    loss.select_out_keys("loss_qvalue")
    assert isinstance(loss(**keywords(loss, batch)), torch.Tensor)
    with pytest.raises(ValueError, match="a selected key must be one of .*, got 'nothing'"):
        loss.select_out_keys("nothing")
    assert loss.reset_out_keys().out_keys == names
    assert list(loss(batch).keys()) == names


@pytest.mark.parametrize("form", [*FORMS, {"advantage_filter": None, "online_coeff": 0.0}], ids=str)
@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_outputs_are_flat_and_complete(form, reduction):
    loss = make_loss(**form, reduction=reduction)
    out = loss(make_batch(actions=form.get("actions", "discrete")))
    assert list(out.keys()) == list(out.keys(True, True)) == loss.out_keys
    for name, value in out.items():
        is_loss = name.startswith("loss")
        assert value.requires_grad == (is_loss and (loss.uses_critic or name == "loss_actor"))
        if reduction != "none" or not is_loss:
            assert value.shape == ()
        elif value.requires_grad:
            assert value.shape[:2] == (B, T)


# TorchRL's own steppers give losses to the logger as they are.
@pytest.mark.filterwarnings("ignore:Converting a tensor with requires_grad=True to a scalar")
@pytest.mark.parametrize("make_logger", [CSVLogger, TensorboardLogger])
def test_a_stock_trainer_logs_the_outputs(make_logger, tmp_path):
    """The trainer's own step and log on a collector that gives one batch twice."""

    class Twice:
        requested_frames_per_batch, init_random_frames = B * T, 0

        def __iter__(self):
            return iter([make_batch(masked=False), make_batch(masked=False)])

        def shutdown(self):
            pass

        def set_seed(self, seed):
            return seed

        def state_dict(self):
            return {}

    loss = make_loss()
    options = {"exp_name": "run", "log_dir": str(tmp_path)}
    trainer = Trainer(
        collector=Twice(),
        total_frames=2 * B * T,
        frame_skip=1,
        optim_steps_per_batch=2,
        loss_module=loss,
        optimizer=torch.optim.Adam(loss.parameters(), lr=1e-3),
        optimization_stepper=DefaultOptimizationStepper(),
        logger=make_logger(**options),
        progress_bar=False,
        log_interval=1,
        save_trainer_interval=10**9,
    )
    trainer.train()
    logged = {str(file.relative_to(tmp_path)) for file in tmp_path.rglob("*") if file.is_file()}
    if make_logger is CSVLogger:
        for name in ("loss_actor", "td_error", "q_value/0.9"):
            (file,) = [tmp_path / file for file in logged if file.endswith(f"scalars/{name}.csv")]
            assert all(float(row.split(",")[1]) < 1e6 for row in file.read_text().split())
    assert logged


# --- state ---


def tensors_of(module: nn.Module) -> dict[str, torch.Tensor]:
    """Floats of a state dict, but for those that never change."""
    constants = ("discounts", "bins")
    return {
        name: x
        for name, x in module.state_dict().items()
        if isinstance(x, torch.Tensor)
        and x.is_floating_point()
        and name.rpartition(".")[2] not in constants
    }


def spoil(module: nn.Module) -> dict[str, torch.Tensor]:
    """Make every number one that no initialisation gives."""
    with torch.no_grad():
        return {name: x.add_(1000.0).clone() for name, x in tensors_of(module).items()}


def check_reset(build) -> None:
    """Every number is drawn anew, or is what it always begins with."""
    fresh, again = tensors_of(build(1)), tensors_of(build(2))
    module = build(3)
    spoilt = spoil(module)
    module.reset_parameters_recursive()
    for name, value in tensors_of(module).items():
        assert not torch.equal(value, spoilt[name]), name
        if torch.equal(fresh[name], again[name]):
            torch.testing.assert_close(value, fresh[name], msg=name)
        else:
            assert value.abs().max() < 3 * fresh[name].abs().max() + 1.0, name
            assert not torch.equal(value, fresh[name]), name


@pytest.mark.parametrize(
    "form", [*FORMS, {"codec": TwoHot(2, init_value=1.0, init_slope=10.0)}], ids=str
)
def test_reset_parameters_recursive(form):
    def build(seed):
        loss = make_loss(**form)
        torch.manual_seed(seed)
        # make_loss always draws the same
        policy = SimpleNamespace(**loss.parts)
        codec = deepcopy(loss.value_codec)
        return AMAGOLoss(policy, loss.critic_network, codec, online_coeff=loss.online_coeff)

    loss = build(1)
    spoilt = spoil(loss)
    loss.reset_parameters_recursive()
    reset = tensors_of(loss)
    for name, value in reset.items():
        assert value.abs().max() < 500, name
        assert not torch.equal(value, spoilt[name]), name
    for name, value in reset.items():
        if name.startswith("target_"):
            assert torch.equal(value, reset[name.removeprefix("target_")]), name
    loss.target_update = SoftUpdate(loss, tau=0.1)
    out, grads = run(loss, make_batch(actions=form.get("actions", "discrete")))
    assert total(out).isfinite()
    assert all(grad.isfinite().all() for grad in grads)


@pytest.mark.parametrize("name", SEQ_MODELS)
def test_reset_of_trajectory_encoders(name):
    options = {"transformer": {"positions": "learned", "max_positions": 9, "norm": "rms"}}
    sizes = {} if name in ("identity", "feedforward") else {"d_model": 16}

    def build(seed):
        torch.manual_seed(seed)
        encoder = SEQ_MODELS[name](16, context_length=T, **sizes, **options.get(name, {}))
        return TensorDictSequential(encoder, TensorDictModule(nn.Linear(1, 1), ["x"], ["y"]))

    check_reset(build)


@pytest.mark.parametrize("name", MAKERS)
@pytest.mark.parametrize("norm", ["layer", "rms"])
def test_reset_of_timestep_encoders(name, norm):
    def build(seed):
        torch.manual_seed(seed)
        return TensorDictSequential(MAKERS[name](norm=norm, out_norm=norm))

    check_reset(build)


@pytest.mark.parametrize(
    "head",
    [
        lambda: Actor(D, A, 2),
        lambda: ResidualActor(D, A, 2),
        lambda: DiscreteCritic(D, A, 2),
        lambda: ActionCritic(D, A, DISCOUNTS, action_gain=50.0),
    ],
)
def test_reset_of_heads(head):
    def build(seed):
        torch.manual_seed(seed)
        return TensorDictModule(head(), in_keys=["a"], out_keys=["b"])

    check_reset(build)
    critic = build(1)
    if isinstance(critic.module, ActionCritic):
        critic.reset_parameters_recursive()
        assert critic.module.hidden[0].weight[:, -A:].abs().max() > 5.0


@pytest.mark.parametrize("form", [FORMS[0], FORMS[3]], ids=str)
def test_state_dict_there_and_back(form):
    actions = form.get("actions", "discrete")
    loss = make_loss(**form)
    run(loss, make_batch(actions=actions))
    with torch.no_grad():
        for p in loss.parameters():
            p += 0.01
    loss.target_update.step()
    state = deepcopy(loss.state_dict())
    expected = loss.estimates(make_batch(actions=actions))
    other = make_loss(**form)
    assert not torch.equal(
        other.estimates(make_batch(actions=actions))["q_value"], expected["q_value"]
    )
    other.load_state_dict(state)
    assert {name for name in state if "target_" in name}
    for name, value in other.state_dict().items():
        if isinstance(value, torch.Tensor):
            assert torch.equal(value, state[name]), name
    for x in (loss, other):
        torch.manual_seed(4)
        x.out = total(x(make_batch(actions=actions)))
    assert torch.equal(loss.out, other.out)


def test_a_copy_is_independent():
    loss = make_loss()
    copy = deepcopy(loss)
    before = total(run(copy, make_batch())[0])
    with torch.no_grad():
        for p in loss.parameters():
            p += 1.0
    copy.load_state_dict(make_loss().state_dict())
    assert torch.equal(total(run(copy, make_batch())[0]), before)


def test_nothing_keeps_a_loss_alive():
    loss = make_loss()
    del loss.target_update
    run_without_targets = loss.estimates(make_batch())
    reference = weakref.ref(loss)
    del loss
    gc.collect()
    assert reference() is None
    assert run_without_targets["q_value"].isfinite().all()


def test_settings_hold_every_option():
    loss = make_loss()
    settings = loss.settings
    assert json.loads(json.dumps(settings)) == settings
    assert settings["discounts"] == [*DISCOUNTS]
    assert "entropy_coeff" not in settings  # as in runs from before there was one
    without_term = make_loss(online_coeff=0.0)
    assert make_loss(online_coeff=0.0, entropy_coeff=0.5).settings == without_term.settings
    assert settings["advantage_filter"] == "binary_filter"
    changes = [
        {"discounts": (0.5, 0.95)},
        {"n_step": 3},
        {"reward_scale": 1.0},
        {"online_coeff": 0.5},
        {"offline_coeff": 0.5},
        {"entropy_coeff": 0.5},
        {"critic_coeff": 0.5},
        {"advantage_filter": "exponential"},
        {"filter_space": "value"},
        {"target_reduction": "mean"},
        {"num_target_critics": 1},
        {"num_target_actions": 2},
        {"num_policy_actions": 2},
        {"use_target_actor": False},
        {"clip_actions": False},
        {"use_prioritized_weights": False},
        {"reduction": "sum"},
        {"actor_mask": lambda batch, term, mask: mask},
        {"critic_mask": lambda batch, term, mask: mask},
        {"codec": "two_hot"},
        {"codec": PopArt(2, beta=0.01)},
        {"codec": PopArt(2, enabled=False)},
    ]
    for change in changes:
        other = make_loss(**change).settings
        assert other != settings, change
        assert json.loads(json.dumps(other)) == other, change
    bins = {name: TwoHot(2, **{name: 50.0}) for name in ("max_return",)}
    bins |= {"symlog": TwoHot(2, symlog=False), "popart": TwoHot(2, popart=PopArt(2, beta=0.1))}
    plain = make_loss(codec="two_hot").settings
    for codec in [*bins.values(), "hl_gauss"]:
        assert make_loss(codec=codec).settings != plain
    dropout = DiscreteCritic(D, A, 2, hidden_size=D, dropout=0.1)
    assert make_loss(critic=dropout).settings["critic.dropout"] == 0.1
    assert make_loss(compact=True).settings == make_loss(compact=False).settings
    with_range = make_loss(advantage_filter=exponential_filter).settings
    assert with_range["advantage_filter"] == "exponential_filter"


# --- statistics ---


@pytest.mark.parametrize("codec", ["popart", "two_hot"])
@pytest.mark.parametrize("compact", [False, True])
def test_statistics_move_in_training_with_gradient_alone(codec, compact):
    def moved(training, grad):
        loss = make_loss(codec=codec, compact=compact).train(training)
        before = {name: x.clone() for name, x in loss.named_buffers()}
        with torch.set_grad_enabled(grad):
            loss(make_batch())
        return {name for name, x in loss.named_buffers() if not torch.equal(x, before[name])}

    statistics = ("value_codec", "encoder_network_params.module.0.input_norm")
    for training, grad in ((False, True), (True, False), (False, False)):
        names = moved(training, grad)
        assert not [name for name in names if name.startswith(statistics)], (training, grad)
    for part in statistics:
        assert any(name.startswith(part) for name in moved(True, True))


# --- gradients, modes, targets ---


@pytest.mark.parametrize("takes_actions", [False, True])
@pytest.mark.parametrize(
    "form",
    [{}, {"online_coeff": 0.0}, {"offline_coeff": 0.0}, {"entropy_coeff": 0.1}],
    ids=str,
)
def test_which_loss_moves_which_network(form, takes_actions):
    moves = {
        "loss_actor": {"encoder_network", "actor_network"},
        "loss_qvalue": {"encoder_network", "critic_network"},
    }
    for name, expected in moves.items():
        loss = make_loss(takes_actions=takes_actions, **form)
        loss(make_batch())[name].backward()
        moved = {
            key.partition("_params")[0]
            for key, p in loss.named_parameters()
            if p.grad is not None and p.grad.any()
        }
        assert moved == expected
        assert not any("target" in key for key, _ in loss.named_parameters())


def test_forward_is_in_recurrent_mode_without_exploration():
    loss, seen = make_loss(), []

    def look(*_):
        seen.append((recurrent_mode(), exploration_type()))

    loss.encoder_network.module[1].register_forward_hook(look)
    with set_exploration_type(ExplorationType.RANDOM):
        loss(make_batch())
        assert exploration_type() == ExplorationType.RANDOM
    assert seen == [(True, ExplorationType.DETERMINISTIC)]
    assert not recurrent_mode()


def test_dropout_needs_no_vmap():
    loss = make_loss()
    assert loss.vmap_randomness in ("error", "different")
    loss.critic_network.module.dropout = 0.5
    assert total(run(loss, make_batch())[0]).isfinite()


@pytest.mark.parametrize("updater", [lambda x: SoftUpdate(x, tau=0.25), lambda x: HardUpdate(x)])
def test_targets_change_by_the_updater_alone(updater):
    loss = make_loss()
    update = updater(loss)
    optimizer = torch.optim.SGD(loss.parameters(), lr=0.1)
    run(loss, make_batch())
    before = {k: x.clone() for k, x in loss.state_dict().items() if k.startswith("target_")}
    optimizer.step()
    assert all(torch.equal(loss.state_dict()[name], x) for name, x in before.items())
    online = {k: x for k, x in tensors_of(loss).items() if not k.startswith("target_")}
    rate = 0.25 if isinstance(update, SoftUpdate) else 1.0
    for _ in range(1 if isinstance(update, SoftUpdate) else 1001):
        update.step()
    for name, x in before.items():
        expected = torch.lerp(x, online[name.removeprefix("target_")], rate)
        torch.testing.assert_close(loss.state_dict()[name], expected)


def test_warns_without_an_updater():
    loss = make_loss()
    del loss.target_update
    loss._has_update_associated = dict.fromkeys(loss._has_update_associated, False)
    with pytest.warns(UserWarning, match="No target network updater has been associated"):
        loss(make_batch())


def test_the_batch_keeps_its_entries():
    batch = make_batch()
    before = batch.clone()
    make_loss()(batch)
    assert (batch.exclude("td_error") == before).all()
    assert set(batch.keys(True)) == {*before.keys(True), "td_error"}


@pytest.mark.parametrize("reduction", ["mean", "sum", "none"])
def test_reductions(reduction):
    torch.manual_seed(3)
    out = make_loss(reduction=reduction)(make_batch())
    shapes = {"loss_actor": (B, T, 2), "loss_qvalue": (B, T, 4, 2)}
    for name, shape in shapes.items():
        assert out[name].shape == (shape if reduction == "none" else ())
