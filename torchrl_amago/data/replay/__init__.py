"""Replay of whole trials on TorchRL's storages: what is stored, drawn, saved and loaded."""

from torchrl_amago.data.replay.buffer import (
    TrialReplayBuffer,
    load_replay,
    make_trial_buffer,
    save_replay,
)
from torchrl_amago.data.replay.sampler import TrialSliceSampler

__all__ = [
    "TrialReplayBuffer", "TrialSliceSampler", "load_replay", "make_trial_buffer", "save_replay",
]  # fmt: skip
