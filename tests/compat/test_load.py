"""Loading into policies of our own: what comes back, what is refused, what stays untouched."""

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
from torchrl_amago.compat import describe_amago_weights, load_amago_weights
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
    return make_policy(ENV, context_length=8, **options)


def transformer_policy(**options: Any) -> Policy:
    return policy_of(seq_model="transformer", seq_model_options={**TRANSFORMER, **options})


def loss_of(policy: Policy, **critic_options: Any) -> AMAGOLoss:
    return amago_loss(policy, critic_options={**CRITIC, **critic_options})


def shuffled(policy: Policy, loss: AMAGOLoss) -> dict[str, Tensor]:
    """AMAGO's state dict of an agent like this one, none of whose numbers are where they began."""
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
def test_what_amago_would_save_comes_back(
    timestep, seq_model, actor, critic, num_discounts, num_bins
):
    def build(**options: Any) -> tuple[Policy, AMAGOLoss]:
        policy = policy_of(discounts=DISCOUNTS[:num_discounts], **options)
        if num_bins is None:
            return policy, amago_loss(policy, critic_options=critic)
        codec = TwoHot(num_discounts, num_bins=num_bins)
        return policy, amago2_loss(policy, value_codec=codec, critic_options=critic)

    policy, loss = build(
        timestep_options=timestep,
        seq_model=seq_model[0],
        seq_model_options=seq_model[1],
        actor=actor[0],
        actor_options=actor[1],
    )
    weights = shuffled(policy, loss)
    description = describe_amago_weights(weights)
    options = description.policy_options()
    assert options["timestep_options"] == timestep
    assert (options["seq_model"], options["seq_model_options"]) == seq_model
    assert (options["actor"], options["actor_options"]) == actor
    assert description.critic_options() == {"takes_actions": num_bins is not None, **critic}
    assert (description.num_discounts, description.num_bins) == (num_discounts, num_bins)
    assert description.action_size == 5
    again, loss_again = build(**options)
    load_amago_weights(weights, again, loss_again)
    saved = agent_state_dict(again, loss_again)
    assert saved.keys() == weights.keys()
    for name, value in weights.items():
        if not name.startswith("maximized_critics."):
            assert torch.equal(saved[name], value), name


# --- what a load changes ---


def test_a_policy_alone_leaves_the_rest_out():
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    report = load_amago_weights(weights, policy)
    parts = {name.partition(".")[0] for name in report.not_mapped}
    assert parts == {
        "critics",
        "target_critics",
        "target_actor",
        "popart",
        "maximized_critics",
    }
    assert "no loss was given" in report.not_mapped["popart.mu"]
    assert "a copy of the critics" in report.not_mapped["maximized_critics.net.inp_layer.bias"]
    text = str(report)
    assert text.startswith(f"{len(report.loaded)} loaded\n")
    assert "    popart.mu" in text


def test_weights_of_a_policy_alone_are_enough():
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    own = {n: v for n, v in weights.items() if n.split(".")[0] in ("tstep_encoder", "traj_encoder")}
    own |= {n: v for n, v in weights.items() if n.startswith("actor.")}
    assert not load_amago_weights(own, policy).not_mapped
    description = describe_amago_weights(own)
    assert description.critic is description.num_discounts is None
    assert description.critic_options() == {}
    with pytest.raises(ValueError, match="no weights of AMAGO's critics.*leave out the loss"):
        load_amago_weights(own, policy, loss_of(policy))


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


def test_statistics_are_left_out_where_inputs_are_not_normalised():
    options = {**SMALL["timestep_options"], "normalize_inputs": False}
    policy = policy_of(timestep_options=options)
    normalising = policy_of()
    report = load_amago_weights(shuffled(normalising, loss_of(normalising)), policy)
    left_out = {n: why for n, why in report.not_mapped.items() if n.startswith("tstep_encoder.")}
    assert left_out.keys() == {f"tstep_encoder.in_norm.{n}" for n in ("mu", "nu", "_t")}
    assert all("normalize_inputs=False" in why for why in left_out.values())


def test_scales_of_heads_that_are_all_ones_are_left_out_without_scaling():
    policy, plain = transformer_policy(), transformer_policy(head_scaling=False)
    weights = shuffled(policy, loss_of(policy))
    with pytest.raises(ValueError, match=r"(?s)no place for:.*head_scaler.*head_scaling=True"):
        load_amago_weights(weights, plain)
    ones = {n: torch.ones_like(v) if "head_scaler" in n else v for n, v in weights.items()}
    report = load_amago_weights(ones, plain)
    assert sum("head_scaling=False" in why for why in report.not_mapped.values()) == 2
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
def test_prefixes_of_wrappers_are_taken_off(prefix):
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    wrapped = {f"{prefix}{name}": value for name, value in weights.items()}
    report = load_amago_weights(wrapped, policy)
    assert "actor.base.out_layer.bias" in report.loaded


def test_a_codec_without_popart_leaves_its_statistics_out():
    policy = policy_of()
    loss = loss_of(policy)
    weights = shuffled(policy, loss)
    loss.value_codec = nn.Identity()
    report = load_amago_weights(weights, policy, loss)
    assert {n for n, why in report.not_mapped.items() if "no PopArt" in why} == {
        f"popart.{name}" for name in ("mu", "nu", "w", "b", "_t")
    }


# --- what is refused ---


def refuse(match: str, weights: dict[str, Tensor], policy: Policy, loss=None) -> str:
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
    refuse(r"(?s)not filled:\n    critic\.out\.bias\n.*look at where", weights, policy, loss)


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
    message = refuse("nothing was changed", weights, policy, loss)
    assert f"no place for:\n    {name}\n" in message


@pytest.mark.parametrize(
    ("build", "remedies"),
    [
        (
            {"timestep_options": {"hidden_size": 10, "num_layers": 3, "output_size": 4}},
            ["timestep_options: hidden_size=7 (it is 10)", "num_layers=2 (it is 3)"],
        ),
        (
            {"seq_model_options": {"d_model": 8, "hidden_size": 5, "num_layers": 2}},
            ["seq_model_options: d_model=6 (it is 8)", "seq_model_options: num_layers=1 (it is 2)"],
        ),
        ({"actor_options": {"hidden_size": 12}}, ["actor_options: hidden_size=8 (it is 12)"]),
        ({"obs_keys": ["observation", "trial_progress"]}, ["timestep_encoder reads", "obs_keys"]),
        ({"discounts": (0.9, 0.99)}, ["discounts: 3 of them (there are 2)", "actor writes 15"]),
        (
            {"timestep_options": {"hidden_size": 7, "output_size": 4, "out_norm": "none"}},
            ["timestep_options: out_norm='layer' (it is without weights)"],
        ),
    ],
)
def test_sizes_that_differ_name_the_argument(build, remedies):
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    message = refuse("nothing was changed", weights, policy_of(**build))
    assert [remedy for remedy in remedies if remedy not in message] == []


def test_a_wrong_shape_is_listed_with_both_shapes():
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    weights["actor.base.out_layer.bias"] = torch.zeros(14)
    message = refuse("shapes that differ", weights, policy)
    assert "actor.base.out_layer.bias -> actor.mlp.out.bias: (14,) -> (15,)" in message


def test_critics_of_another_form():
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    bins = amago2_loss(policy, value_codec=TwoHot(3, num_bins=9), critic_options=CRITIC)
    message = refuse("nothing was changed", weights, policy, bins)
    assert "critic reads 6 numbers (12 here)" in message
    assert "takes_actions" in message
    assert "critic writes 15 numbers (9 here): bins of the value_codec" in message
    loss = loss_of(policy, num_critics=3)
    message = refuse("nothing was changed", weights, policy, loss)
    assert "critic_options: num_critics=4 (it is 3)" in message


def test_numbers_of_heads_that_no_shape_shows():
    policy = transformer_policy()
    ones = {
        name: torch.ones_like(value) if "head_scaler" in name else value
        for name, value in shuffled(policy, loss_of(policy)).items()
    }
    other = transformer_policy(num_heads=4, head_scaling=False)
    message = refuse("numbers of heads that differ", ones, other)
    assert "seq_model_options: num_heads=2 (it is 4)" in message


def test_discounts_whose_number_no_shape_shows():
    policy = policy_of(discounts=DISCOUNTS[:1])
    weights = shuffled(policy, loss_of(policy))
    weights["popart.mu"] = torch.zeros(5, 1)  # five discounts of one parameter would fit
    refuse(r"numbers of discounts that differ:\n    5 -> 1", weights, policy)


@pytest.mark.parametrize(
    ("theirs", "ours", "message"),
    [
        ({}, {"seq_model": "feedforward", "seq_model_options": {}}, "seq_model='gru'"),
        ({}, {"seq_model": LSTMEncoder}, "the policy has LSTMEncoder.*seq_model='gru'"),
        ({}, {"seq_model": "identity", "seq_model_options": {}}, "seq_model='gru'"),
        (
            {"seq_model": "identity", "seq_model_options": {}},
            {},
            "has GRUEncoder.*seq_model='identity'",
        ),
        ({}, {"actor": "residual", "actor_options": {}}, "actor='mlp'"),
        (
            {},
            {"timestep_encoder": "combined", "timestep_options": {}},
            "has CombinedTimestepEncoder.*timestep_encoder='mlp'",
        ),
    ],
)
def test_another_kind_of_network(theirs, ours, message):
    policy = policy_of(**theirs)
    refuse(message, shuffled(policy, loss_of(policy)), policy_of(**ours))


def test_a_loss_around_another_policy():
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    refuse("the loss must train this policy", weights, policy, loss_of(policy_of()))


def test_counts_of_popart_that_differ():
    policy = policy_of()
    loss = loss_of(policy)
    weights = shuffled(policy, loss)
    weights["popart._t"] = torch.tensor([[1.0], [2.0], [1.0]])
    refuse("PopArt counts its updates once", weights, policy, loss)


def test_a_projection_that_no_number_of_heads_divides():
    policy = transformer_policy()
    weights = shuffled(policy, loss_of(policy))
    name = "traj_encoder.tformer.layers.0.attention_layer.qkv_projection.weight"
    weights[name] = torch.zeros(23, 8)
    message = refuse("not a shape that AMAGO writes", weights, policy)
    assert f"{name} (23, 8)" in message


def test_a_transformer_without_scales_of_heads():
    policy = transformer_policy()
    weights = shuffled(policy, loss_of(policy))
    cut = {name: value for name, value in weights.items() if "head_scaler" not in name}
    refuse("shows its number of heads", cut, policy)


# --- what is read, in which order ---


class _Reading(Policy):
    """A policy whose timestep encoder reads what a test says."""

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
def test_another_order_of_inputs_is_refused(order):
    policy = policy_of()
    weights = shuffled(policy, loss_of(policy))
    sizes = {"prev_reward": 1, "prev_action": 5}
    shapes = {key: (sizes.get(key, 16),) for key in order}
    encoder = MLPTimestepEncoder(shapes, hidden_size=7, output_size=4)
    refuse("sorted by name, then the previous reward and action", weights, _Reading(encoder))


def test_vectors_beside_an_image_must_be_on_a_log_scale():
    shapes = {"pixels": (48, 48, 3), "prev_reward": (1,), "prev_action": (5,)}
    encoder = CNNTimestepEncoder(shapes, output_size=4, vector_scale="none")
    policy = _Reading(encoder)
    weights = shuffled(policy_of(), loss_of(policy_of()))
    refuse("vector_scale='none'", weights, policy)
