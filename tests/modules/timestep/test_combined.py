"""The combined encoder: embeddings chosen by specs, and errors."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tensordict import TensorDict
from torch import nn
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    MultiCategorical,
    NonTensor,
    OneHot,
    Unbounded,
)

from tests.modules.timestep.entries import SPECS, make_batch, make_combined
from torchrl_amago.modules import (
    CategoryEmbedding,
    CNNTimestepEncoder,
    CombinedTimestepEncoder,
    EntryEmbedding,
    GoalEmbedding,
    ImageEmbedding,
    TokenEmbedding,
)


def build(spec, **options):
    return CombinedTimestepEncoder.from_specs({"x": spec}, entries={"x": options})


def test_what_becomes_of_each_spec():
    encoder = make_combined()
    kinds = [type(embedding) for embedding in encoder.embeddings]
    assert kinds == [
        ImageEmbedding,
        CategoryEmbedding,
        CategoryEmbedding,
        TokenEmbedding,
        GoalEmbedding,
    ]
    assert list(encoder.vector_shapes) == [
        "hot",
        "hots",
        "bits",
        ("body", "position"),
        "speed",
        "soft_reset",
        "prev_reward",
        "prev_action",
    ]
    assert encoder.in_keys[-1] == "goal_mask"
    assert sorted(map(str, encoder.in_keys)) == sorted(map(str, SPECS))
    assert encoder.vectors.in_features == 4 + 5 + 3 + 2 + 1 + 1 + 1 + 5


@given(sizes=st.lists(st.integers(1, 9), min_size=1, max_size=4))
def test_tables_have_the_sizes_of_the_spec(sizes):
    multi = build(MultiCategorical(sizes)).embeddings[0]
    assert multi.sizes.tolist() == sizes
    assert multi.table.num_embeddings == sum(sizes)
    assert build(Categorical(sizes[0])).embeddings[0].sizes.tolist() == sizes[:1]
    # Gymnasium's MultiDiscrete([n, n, ...]) arrives as this.
    alike = build(Categorical(sizes[0], shape=(3,))).embeddings[0]
    assert alike.sizes.tolist() == sizes[:1] * 3
    tokens = build(MultiCategorical(sizes), kind="tokens").embeddings[0]
    assert tokens.table.num_embeddings == max(sizes)
    goals = build(Categorical(sizes[0], shape=(3, 2)), kind="goals").embeddings[0]
    assert goals.table.num_embeddings == sizes[0]
    cells = torch.tensor(sizes).expand(4, 5, len(sizes))
    grid = build(MultiCategorical(cells)).embeddings[0]
    assert grid.categories.sizes.tolist() == sizes
    assert build(Categorical(sizes[0], shape=(4, 5, 1))).embeddings[0].categories.sizes == sizes[0]
    ids = Bounded(0, 255, shape=(4, 5, len(sizes)), dtype=torch.uint8)
    grid = build(ids, kind="grid", sizes=sizes).embeddings[0]
    assert grid.categories.sizes.tolist() == sizes


@pytest.mark.parametrize("norm", ["none", "layer", "rms", "unit_ball", "hypersphere", "simplicial"])
@pytest.mark.parametrize("scale", ["normalize", "symlog", "none"])
@pytest.mark.parametrize("num_layers", [0, 2])
def test_every_option_trains(norm, scale, num_layers):
    encoder = make_combined(
        norm=norm,
        out_norm=norm,
        vector_scale=scale,
        num_layers=num_layers,
        output_size=8,
        vector_features=56 + 5 * 8 + 8,
    )
    out = encoder(make_batch(3, 2))["timestep"]
    assert out.shape == (3, 2, 8)
    out.square().sum().backward()
    for name, parameter in encoder.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name


def test_every_entry_has_influence():
    encoder, td = make_combined().eval(), make_batch(1)
    td["goal_mask"].fill_(True)
    td["instruction"].fill_(3)
    out = encoder(td.clone())["timestep"]
    for key in SPECS:
        changed = td.clone()
        value = changed[key]
        if value.dtype == torch.bool:
            value = ~value
        elif value.is_floating_point():
            value = value + 1.5
        else:
            value = 1 - value.clamp(max=1)
        assert not torch.allclose(encoder(changed.set(key, value))["timestep"], out), key


def test_ones_own_embedding():
    class Thermometer(EntryEmbedding):
        def forward(self, value):
            return (value.unsqueeze(-1) > torch.linspace(-1, 1, self.output_size)).float()

    encoder = CombinedTimestepEncoder({"heat": Thermometer((), 5)}, {}, output_size=4)
    td = TensorDict(heat=torch.randn(3), batch_size=[3])
    assert encoder(td)["timestep"].shape == (3, 4)


def test_the_cnn_encoder_is_the_combined_one_with_one_image():
    cnn = CNNTimestepEncoder({"pixels": (9, 9, 3), "prev_reward": (1,)}, trunk="grid")
    image = ImageEmbedding((9, 9, 3), trunk="grid")
    combined = CombinedTimestepEncoder(
        {"pixels": image},
        {"prev_reward": (1,)},
        vector_features=12,
        vector_scale="symlog",
        num_layers=0,
    )
    combined.load_state_dict(cnn.state_dict())
    td = make_batch(4)
    assert torch.equal(cnn(td.clone())["timestep"], combined(td)["timestep"])
    assert isinstance(combined.merge, nn.Linear)


def test_errors_name_the_entry():
    for spec, options, got in (
        (Categorical(3), {"kind": "text"}, r"'text': kinds are .* Got Categorical"),
        (NonTensor(shape=()), {}, "None: .*Got NonTensor.*obs_keys"),
        (Unbounded(shape=(4,)), {"kind": "tokens"}, r"'tokens': .*Got Unbounded"),
        (Categorical(3, shape=(2, 2)), {"kind": "tokens"}, r"'tokens': .*Got Categorical \(2, 2\)"),
        (Unbounded(shape=(4,)), {"kind": "goals"}, r"'goals': .*Got UnboundedContinuous \(4,\)"),
        (OneHot(3), {"output_size": 4}, r"'vector': .*\(3,\) and \{'output_size': 4\}"),
    ):
        with pytest.raises(ValueError, match=f"entry 'x' can't be embedded as kind {got}"):
            build(spec, **options)
    with pytest.raises(ValueError, match=r"entries names \['y'\], but what is embedded is \['x'\]"):
        CombinedTimestepEncoder.from_specs({"x": OneHot(3)}, entries={"y": {}})
    with pytest.raises(ValueError, match=r"names \['m'\], .* is \['x'\] \(masks are not\)"):
        CombinedTimestepEncoder.from_specs(
            {"x": Categorical(3, shape=(4,)), "m": Binary(4)},
            entries={"x": {"kind": "tokens", "mask_key": "m"}, "m": {"kind": "vector"}},
        )
    with pytest.raises(ValueError, match="vector_scale must be one of 'normalize', .* got 'log'"):
        make_combined(vector_scale="log")
    with pytest.raises(ValueError, match=r"but \['cell'\] are categories.*combined"):
        CNNTimestepEncoder.from_specs({"cell": Categorical(3), "pixels": Bounded(0, 1, (9, 9, 3))})


def test_an_entry_may_be_embedded_and_a_vector():
    both = CombinedTimestepEncoder({"x": CategoryEmbedding([3])}, {"x": (1,)}, vector_features=4)
    assert both.in_keys == ["x"]
    assert both.merge.hidden[0].in_features == 16 + 4
    assert both(TensorDict(x=torch.tensor([[2]]), batch_size=[1]))["timestep"].shape == (1, 256)


def test_simplicial_names_the_size():
    with pytest.raises(ValueError, match="multiple of 8, got 268"):
        CNNTimestepEncoder({"pixels": (9, 9, 3), "speed": (2,)}, trunk="grid", norm="simplicial")
