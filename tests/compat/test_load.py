"""Strict loading into our own policies: round trips, errors by name, nothing changed on failure."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import Tensor, nn
from torchrl.modules import set_recurrent_mode

from tests.compat.reference_names import agent_state_dict
from torchrl_amago import MetaFrozenLake, make_policy, make_trial_env
from torchrl_amago.compat import load_amago_weights
from torchrl_amago.modules import (
    CNNTimestepEncoder,
    Encoder,
    LSTMEncoder,
    MLPTimestepEncoder,
    Policy,
    TwoHot,
)
from torchrl_amago.objectives import AMAGOLoss, amago2_loss, amago_loss

# No optimiser runs here; TorchRL warns of losses without a target updater.
pytestmark = pytest.mark.filterwarnings("ignore:No target network updater")

ENV = make_trial_env(MetaFrozenLake(batch_size=(2,)), episodes=2, horizon=8)
DISCOUNTS = (0.5, 0.9, 0.99)
SMALL: dict[str, Any] = {
    "seq_model": "gru",
    "seq_model_options": {"d_model": 6, "hidden_size": 5, "num_layers": 1},
    "timestep_options": {"hidden_size": 7, "output_size": 4},
    "actor_options": {"hidden_size": 8},
}
TRANSFORMER = {"d_model": 8, "num_heads": 2, "d_ff": 12, "num_layers": 2}
CRITIC = {"hidden_size": 9}


def policy_of(**options: Any) -> Policy:
    options = {"obs_keys": ["observation"], "discounts": DISCOUNTS, **SMALL, **options}
    return make_policy(ENV, context_length=8, preset="paper", **options)


def transformer_policy(**options: Any) -> Policy:
    return policy_of(seq_model="transformer", seq_model_options={**TRANSFORMER, **options})


def loss_of(policy: Policy, **critic_options: Any) -> AMAGOLoss:
    return amago_loss(policy, preset="paper", critic_options={**CRITIC, **critic_options})


def shuffled(policy: Policy, loss: AMAGOLoss) -> dict[str, Tensor]:
    """Return AMAGO's state dict of an agent of these sizes, with other numbers."""
    weights = agent_state_dict(policy, loss)
    return {
        name: torch.full_like(value, 7.0) if name == "popart._t" else torch.rand_like(value) + 0.1
        for name, value in weights.items()
    }


def everything(policy: Policy, loss: AMAGOLoss | None = None) -> dict[str, Tensor]:
    parts = policy.state_dict() | ({} if loss is None else loss.state_dict(prefix="loss."))
    return {name: value.clone() for name, value in parts.items()}


def assert_untouched(before: dict[str, Tensor], policy: Policy, loss: AMAGOLoss | None = None):
    after = everything(policy, loss)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


# --- round trips ---

width = st.integers(1, 3).map(lambda n: 4 * n)
seq_models = st.one_of(
    st.fixed_dictionaries(
        {"d_model": width, "num_heads": st.sampled_from([1, 2, 4]), "d_ff": width}
        | {"num_layers": st.integers(1, 2), "sigma_reparam": st.booleans()}
        | {"normformer": st.booleans(), "norm": st.sampled_from(["layer", "rms"])}
    ).map(lambda options: ("transformer", options)),
    st.fixed_dictionaries(
        {"d_model": width, "hidden_size": width, "num_layers": st.integers(1, 3)}
        | {"out_norm": st.sampled_from(["layer", "rms"])}
    ).map(lambda options: ("gru", options)),
    st.fixed_dictionaries(
        {"d_model": width, "d_ff": width, "num_layers": st.integers(1, 2)}
        | {"norm": st.sampled_from(["layer", "rms"])}
    ).map(lambda options: ("feedforward", options | {"out_norm": "layer"})),
    st.fixed_dictionaries(
        {"d_model": width, "d_state": st.integers(1, 3), "d_conv": st.integers(2, 4)}
        | {"expand": st.integers(1, 2), "num_layers": st.integers(1, 2)}
    ).map(lambda options: ("mamba", options | {"norm": "layer"})),
    st.just(("identity", {})),
)
actors = st.one_of(
    st.fixed_dictionaries({"hidden_size": width, "num_layers": st.integers(1, 3)}).map(
        lambda options: ("mlp", options)
    ),
    st.fixed_dictionaries(
        {"feature_size": width, "residual_size": width, "num_blocks": st.integers(1, 2)}
        | {"norm": st.sampled_from(["layer", "rms"])}
    ).map(lambda options: ("residual", options)),
)
timesteps = st.fixed_dictionaries(
    {"hidden_size": width, "num_layers": st.integers(1, 3), "output_size": width}
    | {"norm": st.sampled_from(["layer", "rms"]), "out_norm": st.sampled_from(["layer", "rms"])}
)
critics = st.fixed_dictionaries(
    {"num_critics": st.integers(2, 3), "hidden_size": width, "num_layers": st.integers(1, 3)}
)


@given(timesteps, seq_models, actors, critics, st.integers(1, 3), st.sampled_from([None, 5, 16]))
@settings(max_examples=25, deadline=None)
def test_round_trips(timestep, seq_model, actor, critic, num_discounts, num_bins):
    def build() -> tuple[Policy, AMAGOLoss]:
        policy = policy_of(
            discounts=DISCOUNTS[:num_discounts],
            timestep_options=timestep,
            seq_model=seq_model[0],
            seq_model_options=seq_model[1],
            actor=actor[0],
            actor_options=actor[1],
        )
        if num_bins is None:
            return policy, amago_loss(policy, preset="paper", critic_options=critic)
        codec = TwoHot(num_discounts, num_bins=num_bins)
        return policy, amago2_loss(policy, preset="paper", value_codec=codec, critic_options=critic)

    weights = shuffled(*build())
    policy, loss = build()
    load_amago_weights(weights, policy, loss)
    saved = agent_state_dict(policy, loss)
    assert saved.keys() == weights.keys()
    for name, value in weights.items():
        if not name.startswith("maximized_critics."):
            assert torch.equal(saved[name], value), name


# --- changes of a load ---


def test_a_policy_alone_leaves_the_rest_out():
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    report = load_amago_weights(weights, policy)
    parts = {name.partition(".")[0] for name in report.unused}
    assert parts == {
        "critics",
        "target_critics",
        "target_actor",
        "popart",
        "maximized_critics",
    }
    assert "no loss was given" in report.unused["popart.mu"]
    assert "a copy of the critics" in report.unused["maximized_critics.net.inp_layer.bias"]
    text = str(report)
    assert text.startswith(f"{len(report.loaded)} loaded\n")
    assert "    popart.mu" in text


def test_weights_of_a_policy_alone_are_enough():
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    own = {n: v for n, v in weights.items() if n.split(".")[0] in ("tstep_encoder", "traj_encoder")}
    own |= {n: v for n, v in weights.items() if n.startswith("actor.")}
    assert not load_amago_weights(own, policy).unused
    message = assert_unfit("not filled", own, policy, loss_of(policy))
    assert "    critic.out.weight\n" in message


def test_weights_are_copied_not_shared():
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    load_amago_weights(weights, policy)
    before = everything(policy)
    for value in weights.values():
        value.zero_()
    assert_untouched(before, policy)


def test_the_loss_trains_what_was_loaded():
    policy = policy_of()
    loss = loss_of(policy)
    load_amago_weights(shuffled(policy, loss), policy, loss)
    for name, value in policy.actor.named_parameters():
        in_loss = loss.actor_network_params.flatten_keys(".")[name]
        assert in_loss.data_ptr() == value.data_ptr()
        assert value.requires_grad
    target = loss.target_actor_network_params.flatten_keys(".")
    assert not torch.equal(
        target["module.mlp.out.bias"], policy.actor.state_dict()["module.mlp.out.bias"]
    )


def test_half_precision_weights_are_cast():
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    half = {name: value.bfloat16() for name, value in weights.items()}
    load_amago_weights(half, policy)
    assert all(p.dtype == torch.float32 for p in policy.parameters())
    bias = policy.actor.module.mlp.out.bias
    torch.testing.assert_close(bias.data, half["actor.base.out_layer.bias"].float())


def test_input_statistics_are_unused_without_normalised_inputs():
    options = {**SMALL["timestep_options"], "normalize_inputs": False}
    policy = policy_of(timestep_options=options)
    normalising = policy_of()
    report = load_amago_weights(shuffled(normalising, loss_of(normalising)), policy)
    left_out = {n: why for n, why in report.unused.items() if n.startswith("tstep_encoder.")}
    assert left_out.keys() == {f"tstep_encoder.in_norm.{n}" for n in ("mu", "nu", "_t")}
    assert all("normalize_inputs=False" in why for why in left_out.values())


def test_head_scales_of_one_are_unused_without_head_scaling():
    policy, plain = transformer_policy(), transformer_policy(head_scaling=False)
    weights = shuffled(policy, loss_of(policy))
    assert_unfit(r"(?s)no place for:.*head_scaler", weights, plain)
    ones = {n: torch.ones_like(v) if "head_scaler" in n else v for n, v in weights.items()}
    report = load_amago_weights(ones, plain)
    assert sum("head_scaling=False" in why for why in report.unused.values()) == 2
    load_amago_weights(ones, policy)
    x = TensorDict(
        timestep=torch.randn(2, 5, 4),
        time_idx=torch.arange(5).expand(2, 5).unsqueeze(-1),
        is_init=torch.zeros(2, 5, 1, dtype=torch.bool),
        batch_size=[2, 5],
    )
    with set_recurrent_mode(True):
        scaled, unscaled = (p.eval().encoder.module[1](x.clone()) for p in (policy, plain))
    torch.testing.assert_close(scaled["state"], unscaled["state"])


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.", "_orig_mod."])
def test_prefixes_of_wrappers_are_removed(prefix):
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    wrapped = {f"{prefix}{name}": value for name, value in weights.items()}
    report = load_amago_weights(wrapped, policy)
    assert "actor.base.out_layer.bias" in report.loaded


def test_popart_is_unused_by_a_codec_without_it():
    policy = policy_of()
    loss = loss_of(policy)
    weights = shuffled(policy, loss)
    loss.value_codec = nn.Identity()
    report = load_amago_weights(weights, policy, loss)
    assert {n for n, why in report.unused.items() if "no PopArt" in why} == {
        f"popart.{name}" for name in ("mu", "nu", "w", "b", "_t")
    }


# --- errors ---


def assert_unfit(match: str, weights: dict[str, Tensor], policy: Policy, loss=None) -> str:
    """Assert that loading raises and changes nothing; return the message."""
    before = everything(policy, loss)
    with pytest.raises(ValueError, match=match) as error:
        load_amago_weights(weights, policy, loss)
    assert_untouched(before, policy, loss)
    return str(error.value)


def test_a_missing_weight():
    policy = policy_of()
    loss = loss_of(policy)
    weights = shuffled(policy, loss)
    del weights["critics.net.output_layer.bias"]
    assert_unfit(r"changed\.\nnot filled:\n    critic\.out\.bias\nBuild", weights, policy, loss)


@pytest.mark.parametrize(
    "name",
    [
        "frozen_reference_actor.base.out_layer.bias",
        "actor.base.activation.numerator",
        "actor.base.out_layer.rotation",
        "popart.sigma",
        "loose",
    ],
)
def test_an_unknown_weight(name):
    policy = policy_of()
    loss = loss_of(policy)
    weights = shuffled(policy, loss) | {name: torch.zeros(2)}
    message = assert_unfit("nothing was changed", weights, policy, loss)
    assert f"no place for:\n    {name} (2,)\n" in message


@pytest.mark.parametrize(
    ("build", "problems"),
    [
        (
            {"timestep_options": {"hidden_size": 10, "num_layers": 3, "output_size": 4}},
            [
                "base.in_layer.bias (7,) -> timestep_encoder.mlp.hidden.0.bias (10,)",
                "not filled:\n    timestep_encoder.mlp.hidden.2.weight\n",
            ],
        ),
        (
            {"seq_model_options": {"d_model": 8, "hidden_size": 5, "num_layers": 2}},
            [
                "traj_encoder.out.bias (6,) -> seq_model.out.bias (8,)",
                "    seq_model.rnn.weight_hh_l1\n",
            ],
        ),
        (
            {"actor_options": {"hidden_size": 12}},
            ["actor.base.in_layer.bias (8,) -> actor.mlp.hidden.0.bias (12,)"],
        ),
        (
            {"obs_keys": ["observation", "trial_progress"]},
            ["base.in_layer.weight (7, 8) -> timestep_encoder.mlp.hidden.0.weight (7, 9)"],
        ),
        ({"discounts": (0.9, 0.99)}, ["numbers of discounts that differ:\n    3 -> 2\n"]),
        (
            {"timestep_options": {"hidden_size": 7, "output_size": 4, "out_norm": "none"}},
            ["no place for:\n    tstep_encoder.out_norm.norm.weight (4,)\n"],
        ),
    ],
)
def test_sizes_that_differ(build, problems):
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    message = assert_unfit("nothing was changed", weights, policy_of(**build))
    assert [problem for problem in problems if problem not in message] == []


def test_critics_of_other_sizes():
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    bins = amago2_loss(
        policy, preset="paper", value_codec=TwoHot(3, num_bins=9), critic_options=CRITIC
    )
    message = assert_unfit("shapes that differ", weights, policy, bins)
    assert "critics.net.inp_layer.weight (4, 6, 9) -> critic.hidden.0.weight (4, 12, 9)" in message
    assert "critics.net.output_layer.bias (4, 15) -> critic.out.bias (4, 9)" in message
    message = assert_unfit("shapes that differ", weights, policy, loss_of(policy, num_critics=3))
    assert "target_critics.net.inp_layer.bias (4, 9) -> target_critic.hidden.0.bias" in message


def test_critics_with_a_norm():
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    message = assert_unfit("critics with a norm", weights, policy, loss_of(policy, norm="layer"))
    assert "norm='layer'" in message
    assert "preset='paper'" in message


def test_numbers_of_heads_that_differ():
    policy = transformer_policy()
    ones = {
        name: torch.ones_like(value) if "head_scaler" in name else value
        for name, value in shuffled(policy, loss_of(policy)).items()
    }
    assert_unfit(r"head_scaler \(2, 1\) -> .*\(4, 1\)", ones, transformer_policy(num_heads=4))
    # Only the scales show the number of heads.
    unscaled = transformer_policy(num_heads=4, head_scaling=False)
    assert_unfit(r"(?s)no place for:.*head_scaler \(2, 1\)", ones, unscaled)


def test_numbers_of_discounts_that_no_shape_shows():
    policy = policy_of(discounts=DISCOUNTS[:1])
    weights = shuffled(policy, loss_of(policy))
    weights["popart.mu"] = torch.zeros(5, 1)  # five discounts of one parameter would fit
    assert_unfit(r"numbers of discounts that differ:\n    5 -> 1", weights, policy)


@pytest.mark.parametrize(
    ("theirs", "ours", "problems"),
    [
        (
            {},
            {"seq_model": "feedforward", "seq_model_options": {}},
            ["traj_encoder.rnn.weight_hh_l0", "seq_model.embed.weight"],
        ),
        ({}, {"seq_model": LSTMEncoder}, ["traj_encoder.rnn.weight_hh_l0", "seq_model.rnn."]),
        ({}, {"seq_model": "identity", "seq_model_options": {}}, ["traj_encoder.out.bias"]),
        ({"seq_model": "identity", "seq_model_options": {}}, {}, ["seq_model.out.bias"]),
        ({}, {"actor": "residual", "actor_options": {}}, ["actor.base.in_layer.bias"]),
        (
            {},
            {"timestep_encoder": "combined", "timestep_options": {}},
            ["tstep_encoder.base.in_layer.bias", "timestep_encoder.vectors.weight"],
        ),
    ],
)
def test_another_class_of_network(theirs, ours, problems):
    policy = policy_of(**theirs)
    weights = shuffled(policy, loss_of(policy))
    message = assert_unfit("nothing was changed", weights, policy_of(**ours))
    assert [problem for problem in problems if f"    {problem}" not in message] == []


def test_a_loss_around_another_policy():
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    assert_unfit("the loss must train this policy", weights, policy, loss_of(policy_of()))


def test_a_projection_that_no_number_of_heads_divides():
    policy = transformer_policy()
    weights = shuffled(policy, loss_of(policy))
    name = "traj_encoder.tformer.layers.0.attention_layer.qkv_projection.weight"
    weights[name] = torch.zeros(23, 8)
    assert f"{name} (23, 8) -> " in assert_unfit("shapes that differ", weights, policy)


def test_a_transformer_without_head_scales():
    policy = transformer_policy()
    weights = shuffled(policy, loss_of(policy))
    cut = {name: value for name, value in weights.items() if "head_scaler" not in name}
    assert_unfit(r"not filled:\n    seq_model.blocks.0.head_scale\n", cut, policy)


# --- order and scale of inputs ---


class _Reading(Policy):
    """Policy with a given timestep encoder."""

    def __init__(self, encoder: nn.Module) -> None:
        template = policy_of()
        super().__init__(
            Encoder(encoder, template.encoder.trajectory),
            template.actor,
            template.distribution,
            discounts=DISCOUNTS,
        )


@pytest.mark.parametrize(
    "order",
    [
        ["prev_reward", "observation", "prev_action"],
        ["observation", "prev_action", "prev_reward"],
        ["b", "a", "prev_reward", "prev_action"],
    ],
)
def test_another_order_of_inputs(order):
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    sizes = {"prev_reward": 1, "prev_action": 5}
    shapes = {key: (sizes.get(key, 16),) for key in order}
    encoder = MLPTimestepEncoder(shapes, hidden_size=7, output_size=4)
    assert_unfit("inputs in another order than AMAGO's", weights, _Reading(encoder))


def test_vectors_beside_an_image_on_another_scale():
    shapes = {"pixels": (48, 48, 3), "prev_reward": (1,), "prev_action": (5,)}
    encoder = CNNTimestepEncoder(shapes, output_size=4, vector_scale="none")
    policy = _Reading(encoder)
    weights = shuffled(policy_of(), loss_of(policy_of()))
    assert_unfit("vector_scale='none'", weights, policy)
