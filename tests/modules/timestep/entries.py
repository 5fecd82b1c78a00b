"""Observations of every kind, for tests of encoders."""

from __future__ import annotations

import torch
from tensordict import NestedKey, TensorDict
from torchrl.data import (
    Binary,
    Bounded,
    Categorical,
    Composite,
    MultiCategorical,
    MultiOneHot,
    OneHot,
    TensorSpec,
    Unbounded,
)

from torchrl_amago.modules import CNNTimestepEncoder, CombinedTimestepEncoder, MLPTimestepEncoder

SPECS: dict[NestedKey, TensorSpec] = {
    "pixels": Bounded(0, 255, shape=(9, 9, 3), dtype=torch.uint8),
    "cell": Categorical(7),
    "cards": MultiCategorical([13, 4]),
    "instruction": Categorical(20, shape=(5,)),
    "goals": Unbounded(shape=(3, 2)),
    "goal_mask": Binary(3, dtype=torch.bool),
    "hot": OneHot(4),
    "hots": MultiOneHot([2, 3]),
    "bits": Binary(3),
    ("body", "position"): Bounded(-1.0, 1.0, shape=(2,), dtype=torch.float64),
    "speed": Unbounded(shape=()),
    "soft_reset": Categorical(2, shape=(1,), dtype=torch.bool),
    "prev_reward": Unbounded(shape=(1,)),
    "prev_action": Bounded(0.0, 1.0, shape=(5,)),
}
ENTRIES = {
    "pixels": {"trunk": "grid", "output_size": 8, "random_shift": 1},
    "instruction": {"kind": "tokens", "padding_token": 0},
    "goals": {"kind": "goals", "mask_key": "goal_mask"},
}


def make_batch(*batch: int) -> TensorDict:
    return Composite(SPECS).expand(batch).rand() if batch else Composite(SPECS).rand()


def make_combined(**options) -> CombinedTimestepEncoder:
    options = {"hidden_size": 16, "output_size": 6, **options}
    return CombinedTimestepEncoder.from_specs(SPECS, entries=ENTRIES, **options)


def make_mlp(**options) -> MLPTimestepEncoder:
    specs = {key: SPECS[key] for key in ("goals", "speed", "prev_reward", "prev_action")}
    return MLPTimestepEncoder.from_specs(specs, hidden_size=8, output_size=6, **options)


def make_cnn(**options) -> CNNTimestepEncoder:
    specs = {key: SPECS[key] for key in ("pixels", "speed", "prev_reward", "prev_action")}
    options = {"trunk": "grid", "image_features": 8, "output_size": 6, **options}
    return CNNTimestepEncoder.from_specs(specs, **options)


MAKERS = {"mlp": make_mlp, "cnn": make_cnn, "combined": make_combined}
