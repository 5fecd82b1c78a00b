"""Replay of whole trials on TorchRL's storages: what is stored, drawn, saved and loaded."""

from torchrl_amago.data.replay.buffer import TrialReplayBuffer, make_trial_buffer
from torchrl_amago.data.replay.sampler import TrialSliceSampler

__all__ = ["TrialReplayBuffer", "TrialSliceSampler", "make_trial_buffer"]
