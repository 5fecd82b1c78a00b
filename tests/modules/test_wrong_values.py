"""Wrong numbers raise in every public constructor, by the argument's name."""

from __future__ import annotations

import math

import pytest
from torchrl.data import Binary, Bounded, Categorical

from torchrl_amago import modules
from torchrl_amago.action_space import ActionSpace
from torchrl_amago.modules import distributions
from torchrl_amago.modules._input_norm import InputNorm
from torchrl_amago.modules._layers import MLP

COUNTS = (0, -4, 2.5, math.nan)
NUMBERS = (0.0, -1.0, math.nan, math.inf)
SHAPES = {"observation": (4,)}
DISCRETE = ActionSpace.from_spec(Categorical(3))
NUMERIC = ActionSpace.from_spec(Bounded(-1.0, 1.0, shape=(2,)))
TRAJECTORY = {"input_size": 4, "d_model": 16, "num_layers": 1}
HEADS = {"state_size": 8, "num_params": 5, "num_discounts": 2}
EXPLORE = {"horizon": 9}

# Class, arguments that are fine, those that count, those that are positive numbers.
CONSTRUCTORS = [
    (MLP, dict(input_size=4, hidden_size=8, num_layers=1, output_size=2), "all", ""),
    (InputNorm, dict(size=4), "all", "beta initial_nu"),
    (modules.MLPTimestepEncoder, dict(shapes=SHAPES), "hidden_size num_layers output_size", ""),
    (
        modules.CNNTimestepEncoder,
        dict(shapes={"pixels": (16, 16, 3), **SHAPES}, trunk="grid"),
        "image_features vector_features output_size",
        "",
    ),
    (
        modules.CombinedTimestepEncoder,
        dict(embeddings={}, vectors=SHAPES),
        "vector_features hidden_size output_size",
        "",
    ),
    (modules.CategoryEmbedding, dict(sizes=[3, 5]), "embedding_size", ""),
    (
        modules.TokenEmbedding,
        dict(length=5, num_tokens=9),
        "length num_tokens embedding_size hidden_size output_size",
        "",
    ),
    (
        modules.GoalEmbedding,
        dict(num_goals=3, goal_size=2),
        "num_goals goal_size num_tokens embedding_size hidden_size output_size",
        "",
    ),
    (modules.ImageEmbedding, dict(shape=(16, 16, 3), trunk="grid"), "output_size", ""),
    (
        modules.TransformerEncoder,
        dict(**TRAJECTORY, context_length=8, num_heads=2),
        "all d_ff window max_positions max_streams",
        "logit_clip",
    ),
    (modules.GRUEncoder, TRAJECTORY, "all hidden_size max_streams", "longest_memory"),
    (modules.LSTMEncoder, TRAJECTORY, "all hidden_size context_length", "longest_memory"),
    (modules.MambaEncoder, TRAJECTORY, "all d_state d_conv expand", ""),
    (modules.GatedLinearAttentionEncoder, dict(**TRAJECTORY, num_heads=2), "all d_ff", ""),
    (modules.FeedForwardEncoder, dict(input_size=4, d_model=16), "all d_ff", ""),
    (modules.IdentityEncoder, dict(input_size=4), "all context_length max_streams", ""),
    (modules.Actor, HEADS, "all hidden_size num_layers", ""),
    (modules.ResidualActor, HEADS, "all feature_size residual_size num_blocks", ""),
    (
        modules.DiscreteCritic,
        dict(state_size=8, num_actions=5, num_discounts=2),
        "all num_critics num_outputs hidden_size num_layers",
        "",
    ),
    (
        modules.ActionCritic,
        dict(state_size=8, action_size=2, discounts=[0.9]),
        "state_size action_size num_critics num_outputs hidden_size num_layers",
        "action_gain",
    ),
    (modules.EnsembleLinear, dict(num_members=2, in_features=3, out_features=4), "all", ""),
    (distributions.Discrete, dict(space=DISCRETE), "", "temperature"),
    (distributions.TanhGaussian, dict(space=NUMERIC), "", "std_low std_high"),
    (distributions.TanhMixture, dict(space=NUMERIC), "num_modes", "std_low std_high"),
    (distributions.Beta, dict(space=NUMERIC), "", "alpha_low alpha_high beta_low beta_high"),
    (modules.BilevelGaussian, EXPLORE, "", "horizon anneal_frames power"),
    (modules.BilevelEpsilonGreedy, dict(num_actions=3, **EXPLORE), "num_actions", "power"),
]


def cases():
    for build, fine, counts, numbers in CONSTRUCTORS:
        sized = [name for name, value in fine.items() if isinstance(value, int)]
        names = [n for word in counts.split() for n in (sized if word == "all" else [word])]
        for values, arguments in ((COUNTS, names), (NUMBERS, numbers.split())):
            for name in arguments:
                yield pytest.param(build, fine, name, values, id=f"{build.__name__} {name}")


@pytest.mark.parametrize(("build", "fine", "name", "values"), list(cases()))
def test_numbers_out_of_range_raise(build, fine, name, values):
    learned = {"positions": "learned"} if name == "max_positions" else {}
    build(**fine)
    for value in values:
        with pytest.raises(ValueError, match=name):
            build(**{**fine, **learned, name: value})


OTHERS = [
    (modules.Actor, HEADS, "dropout", (-0.1, 1.0, math.nan)),
    (modules.ResidualActor, HEADS, "dropout", (-0.1, 1.0, math.nan)),
    (modules.Actor, HEADS, "observation_sizes", ([0], [3, -1], [math.nan])),
    (modules.FeedForwardEncoder, dict(input_size=4), "num_layers", (-1, 1.5, math.nan)),
    (modules.FeedForwardEncoder, dict(input_size=4), "dropout", (-0.1, 1.0, math.nan)),
    (
        modules.TransformerEncoder,
        dict(**TRAJECTORY, context_length=8, num_heads=2, window=4, num_sinks=1),
        "sink_bias",
        (math.nan, math.inf, -math.inf),
    ),
    (
        modules.TransformerEncoder,
        dict(**TRAJECTORY, context_length=8, num_heads=2, window=4),
        "num_sinks",
        (-1, 1.5, math.nan),
    ),
    (
        modules.ImageEmbedding,
        dict(shape=(16, 16, 3), trunk="grid"),
        "random_shift",
        (-1, 1.5, math.nan),
    ),
    (
        modules.ImageEmbedding,
        dict(shape=(16, 16, 3), trunk="grid"),
        "random_shift_fraction",
        (-0.1, 1.5, math.nan),
    ),
    (distributions.Discrete, dict(space=DISCRETE), "clip_low", (-0.1, 0.5, math.nan)),
    (distributions.Discrete, dict(space=DISCRETE), "clip_high", (0.0, 1.5, math.nan)),
    (
        distributions.TanhGaussian,
        dict(space=NUMERIC),
        "clip_actions",
        ((-1.0, 0.9), (0.5, 0.1), (math.nan, 0.9), (-0.9, math.nan)),
    ),
    (distributions.TanhGaussian, dict(space=NUMERIC), "std_high", (1e-9, -1.0)),
    (
        distributions.Bernoulli,
        dict(space=ActionSpace.from_spec(Binary(3))),
        "reduce",
        ("max", None),
    ),
    (
        modules.ActionCritic,
        dict(state_size=8, action_size=2, discounts=[0.9]),
        "clip_actions",
        (0.0, -1.0, math.nan),
    ),
    (
        modules.ActionCritic,
        dict(state_size=8, action_size=2),
        "discounts",
        ([], [1.1], [-0.1], [math.nan]),
    ),
    (modules.BilevelGaussian, EXPLORE, "start_of_trial", ((-1.0, 0.0), (math.nan, 0.0))),
    (modules.BilevelGaussian, EXPLORE, "end_of_trial", ((0.0, math.inf), (0.0, math.nan))),
    (modules.MambaEncoder, TRAJECTORY, "on_weight_update", ("forget", None)),
    (modules.MLPTimestepEncoder, dict(shapes=SHAPES), "norm", ("batch", "")),
    (modules.MLPTimestepEncoder, dict(shapes=SHAPES), "activation", ("sin", "")),
]


@pytest.mark.parametrize(("build", "fine", "name", "values"), OTHERS)
def test_other_wrong_values_raise(build, fine, name, values):
    for value in values:
        with pytest.raises(ValueError, match=name):
            build(**{**fine, name: value})
