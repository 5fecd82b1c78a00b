"""Settings hold what shapes of weights don't tell; every parameter can be drawn anew."""

from __future__ import annotations

import inspect
import json

import numpy as np
import pytest
import torch
from torch import nn
from torchrl.data import Binary, Bounded, Categorical, MultiCategorical

from tests.toy_env import Toy
from torchrl_amago import modules
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.envs import make_trial_env
from torchrl_amago.modules import HLGauss, Policy, TwoHot, make_critic, make_policy
from torchrl_amago.modules._settings import Configurable, flatten, plain

SIZES = {"d_model": 16, "num_layers": 1}
HEADS = {**SIZES, "num_heads": 2}
WINDOW = {**HEADS, "window": 4, "num_sinks": 1}
LEARNED = {**HEADS, "positions": "learned", "max_positions": 40}
DROPOUT = {"dropout_ff": 0.2, "dropout_emb": 0.2}
PIXELS = Bounded(0, 255, shape=(16, 16, 3), dtype=torch.uint8)
NUMBERS, CHOICES = Bounded(-1.0, 1.0, shape=(2,)), Categorical(4)

# For each part: what stays the same, then arguments that change it without any weight's shape.
TRAJECTORIES = [
    ("transformer", HEADS, {**DROPOUT, "dropout_attn": 0.1, "dropout_qkv": 0.1, "window": 4}),
    ("transformer", HEADS, {"activation": "gelu", "positions": "rotary", "logit_clip": 5.0}),
    ("transformer", HEADS, {"segments": "never", "on_weight_update": "restart"}),
    ("transformer", {**HEADS, "head_scaling": False}, {"num_heads": 4}),
    ("transformer", {**HEADS, "norm": "unit_ball"}, {"norm": "hypersphere", "normformer": False}),
    ("transformer", WINDOW, {"window": 5, "num_sinks": 2, "sink_bias": 0.5}),
    ("transformer", LEARNED, {"beyond_positions": "clip"}),
    (
        "gru",
        {**SIZES, "out_norm": "none"},
        {"out_norm": "unit_ball", "on_weight_update": "restart"},
    ),
    ("lstm", {**SIZES, "out_norm": "none"}, {"out_norm": "unit_ball"}),
    ("mamba", {**SIZES, "norm": "none"}, {"norm": "unit_ball"}),
    ("linear_attention", HEADS, {**DROPOUT, "activation": "gelu"}),
    ("feedforward", SIZES, {"dropout": 0.2, "activation": "gelu", "norm": "unit_ball"}),
]
TIMESTEPS = [
    ("mlp", {}, {"activation": "gelu", "norm": "unit_ball", "hide_prev_reward": True}),
    ("mlp", {"out_norm": "none"}, {"out_norm": "unit_ball", "hide_prev_step": True}),
    (
        "cnn",
        {"trunk": "grid"},
        {"random_shift": 2, "random_shift_fraction": 0.5, "activation": "gelu"},
    ),
    ("cnn", {"trunk": "grid"}, {"vector_scale": "none", "norm": "unit_ball"}),
    (
        "combined",
        {"entries": {"pixels": {"trunk": "grid"}, "cell": {"kind": "tokens"}}},
        {"entries": {"pixels": {"trunk": "grid"}, "cell": {"kind": "tokens", "padding_token": 0}}},
    ),
    (
        "combined",
        {"entries": {"pixels": {"trunk": "grid"}}},
        {"entries": {"pixels": {"trunk": "grid", "random_shift": 1}}},
    ),
]
DISTRIBUTIONS = [
    (CHOICES, "discrete", {}, {"clip_low": 0.1, "clip_high": 0.9, "temperature": 1.0}),
    (NUMBERS, "tanh_gaussian", {}, {"std_low": 0.1, "std_high": 1.0, "clip_actions": (-0.9, 0.9)}),
    (NUMBERS, "tanh_gaussian", {}, {"std_bound": "softplus"}),
    (NUMBERS, "tanh_mixture", {}, {"std_low": 0.1, "std_high": 1.0}),
    (NUMBERS, "beta", {}, {"alpha_low": 2.0, "alpha_high": 9.0, "beta_low": 2.0, "beta_high": 9.0}),
    (NUMBERS, "beta", {"alpha_high": 9.0, "beta_high": 9.0}, {"concentration_bound": "tanh"}),
    (Binary(3), "bernoulli", {}, {"reduce": "sum"}),
]
OTHERS = [
    {"discounts": (0.5, 0.9)},
    {"context_length": 13},
    {"obs_keys": ["cell", "observation"]},
    {"actor_options": {"activation": "gelu"}},
    {"actor_options": {"dropout": 0.5}},
    *({"exploration": {name: value}} for name, value in {
        "horizon": 7, "anneal_frames": 9, "start_of_trial": (0.5, 0.1), "end_of_trial": (0.5, 0.1),
        "power": 2.0, "scale_power": 0.0,
    }.items()),
]  # fmt: skip


ENVS = {}


def build(action=CHOICES, **options) -> Policy:
    if id(action) not in ENVS:  # the spec stays alive beside its environment, and so does its id
        ENVS[id(action)] = action, make_trial_env(Looks(action), horizon=12)
    env = ENVS[id(action)][1]
    small = {"timestep_options": {"output_size": 16}, "seq_model_options": HEADS}
    defaults = {"context_length": 12, "exploration": {}, "discounts": (0.8, 0.9), **small}
    return make_policy(env, **{**defaults, **options})


class Looks(Toy):
    """With an image and a sequence of categories to look at."""

    def __init__(self, action):
        super().__init__(action)
        extra = {"pixels": PIXELS, "cell": MultiCategorical([3, 3, 3])}
        for key, spec in extra.items():
            self.observation_spec[key] = spec.expand(*self.batch_size, *spec.shape)

    def _reset(self, tensordict):
        return super()._reset(tensordict).update(self._look())

    def _step(self, tensordict):
        return super()._step(tensordict).update(self._look())

    def _look(self):
        return {key: self.observation_spec[key].zero() for key in ("pixels", "cell")}


def each_change():
    for seq_model, same, changes in TRAJECTORIES:
        for name, value in changes.items():
            first = {"seq_model": seq_model, "seq_model_options": same}
            yield first, {**first, "seq_model_options": {**same, name: value}}, f"trajectory.{name}"
    for encoder, same, changes in TIMESTEPS:
        for name, value in changes.items():
            keys = {"obs_keys": ["observation"]} if encoder == "mlp" else {}
            keys = {"obs_keys": ["pixels", "observation"]} if encoder == "cnn" else keys
            first = {"timestep_encoder": encoder, "timestep_options": same, **keys}
            other = {**first, "timestep_options": {**same, name: value}}
            part = "timestep.embeddings.pixels." if name.startswith("random") else "timestep."
            yield first, other, part if name == "entries" else part + name
    for action, kind, same, changes in DISTRIBUTIONS:
        for name, value in changes.items():
            first = {"action": action, "distribution": kind, "distribution_options": same}
            other = {**first, "distribution_options": {**same, name: value}}
            yield first, other, f"distribution.{name}"
    for other in OTHERS:
        named = {"timestep_encoder": "mlp"} if "obs_keys" in other else {}
        first = {"obs_keys": ["observation", "cell"], **named} if named else {}
        yield first, {**other, **named}, ""


@pytest.mark.parametrize(
    ("first", "other", "name"),
    [pytest.param(*change, id=f"{i} {change[2]}") for i, change in enumerate(each_change())],
)
def test_settings_hold_what_shapes_do_not_tell(first, other, name):
    policies = [build(**options) for options in (first, other)]
    shapes = [{key: x.shape for key, x in p.state_dict().items()} for p in policies]
    assert shapes[0] == shapes[1]
    settings = [policy.settings for policy in policies]
    assert settings == [json.loads(json.dumps(found)) for found in settings]
    assert build(**first).settings == settings[0]
    keys = settings[0].keys() | settings[1].keys()
    differing = {key for key in keys if settings[0].get(key) != settings[1].get(key)}
    assert differing
    assert any(key.startswith(name) for key in differing), differing


def test_the_discount_acted_with():
    policy = build()
    assert policy.settings["discount"] == 0.9
    assert policy.act_with(0.8).settings["discount"] == 0.8


def test_what_is_set_anew_counts():
    policy = build()
    policy.exploration.power = 3.0
    assert policy.settings["exploration.power"] == 3.0


def classes(base):
    return {base} | {c for sub in base.__subclasses__() for c in classes(sub)}


def test_every_argument_is_a_setting_or_named_as_none():
    parts = [c for c in classes(Configurable) if c.__module__.startswith("torchrl_amago")]
    assert len(parts) > 20
    policy, mixture = (
        build(),
        build(NUMBERS, distribution="tanh_mixture", seq_model="mamba", seq_model_options=SIZES),
    )
    found = {}
    for module in (*policy.modules(), *mixture.modules()):
        if isinstance(module, Configurable):
            names = inspect.signature(type(module).__init__).parameters.values()
            named = {n.name for n in names if n.kind not in (n.VAR_KEYWORD, n.VAR_POSITIONAL)}
            missing = named - {"self"} - set(module.settings) - module.not_settings
            assert not missing
            found[type(module)] = 1
    assert len(found) >= 5
    assert {"attention", "max_streams"} <= policy.encoder.trajectory.not_settings


def test_plain_values():
    values = [float("nan"), float("-inf"), torch.float32, nn.ReLU(), np.int64(3), np.float32(0.5)]
    assert plain(values) == ["nan", "-inf", "torch.float32", "ReLU", 3, 0.5]
    assert flatten(plain({"a": {("b", "c"): (1,)}, "d": {}})) == {"a.b.c": [1]}


def test_encoders_of_ones_own_say_their_arguments():
    class Mine(modules.IdentityEncoder):
        def __init__(self, input_size, *, keep=0.9, **options):
            super().__init__(input_size, **options)

    settings = build(seq_model=Mine, seq_model_options={"keep": 0.5}).settings
    assert settings["trajectory.type"] == "Mine"
    assert settings["trajectory.keep"] == 0.5
    assert settings["trajectory.context_length"] == 12


# --- parameters ---


def reset(module: nn.Module) -> None:
    """Children first, as TorchRL's losses do."""
    for child in module.children():
        reset(child)
        if hasattr(child, "reset_parameters"):
            child.reset_parameters()


SPACE = ActionSpace.from_spec(NUMBERS)
NETWORKS = {
    **{
        name: lambda name=name: build(
            seq_model=name, seq_model_options={} if name == "identity" else SIZES
        )
        for name in modules.SEQ_MODELS
        if name != "transformer"
    },
    "transformer": lambda: build(seq_model_options={**LEARNED, "norm": "rms"}),
    "chrono": lambda: build(seq_model="lstm", seq_model_options={**SIZES, "longest_memory": 500}),
    "residual": lambda: build(actor="residual"),
    "impala": lambda: build(timestep_encoder="cnn", timestep_options={"trunk": "impala"},
                            obs_keys=["pixels"]),
    "combined": lambda: build(timestep_encoder="combined", timestep_options={
        "entries": {"pixels": {"trunk": "grid"}, "cell": {"kind": "tokens"}}}),
    "categories": lambda: build(timestep_encoder="combined", obs_keys=["cell"]),
    "critic": lambda: make_critic(build()),
    "critic of bins": lambda: make_critic(
        build(), value_codec=TwoHot(2, num_bins=9, init_value=3.0)),
    "sloping critic": lambda: make_critic(
        build(), takes_actions=True, value_codec=HLGauss(2, num_bins=9, init_slope=10.0),
        action_gain=8.0),
}  # fmt: skip


@pytest.mark.parametrize("network", NETWORKS)
def test_every_parameter_is_drawn_anew(network):
    fresh, used = NETWORKS[network](), NETWORKS[network]()
    with torch.no_grad():
        for x in (*used.parameters(), *(b for b in used.buffers() if b.is_floating_point())):
            x.fill_(7.0)
    reset(nn.ModuleList([used]))
    expected = dict(fresh.named_parameters())
    for name, p in used.named_parameters():
        like = expected[name]
        assert not (p == 7.0).any(), name
        if p.numel() > 1 and like.std() == 0:
            assert torch.equal(p, like), name
        elif p.numel() >= 64:  # drawn from the same distribution
            torch.testing.assert_close(p.std(), like.std(), rtol=0.4, atol=1e-3)
    for name, x in used.named_buffers():
        if name.endswith(("mu", "nu", ".t")):
            assert torch.equal(x, dict(fresh.named_buffers())[name]), name
