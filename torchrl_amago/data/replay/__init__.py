"""Replay of whole trials on TorchRL's storages: what is stored, drawn, saved and loaded."""

from torchrl_amago.data.replay.buffer import TrialReplayBuffer, make_trial_buffer
from torchrl_amago.data.replay.sampler import TrialSliceSampler
from torchrl_amago.data.replay.saving import load_replay, save_replay

__all__ = [
    "TrialReplayBuffer",
    "TrialSliceSampler",
    "load_replay",
    "make_trial_buffer",
    "save_replay",
]
