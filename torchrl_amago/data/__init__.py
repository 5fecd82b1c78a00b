"""Replay of whole trials: the storage's trial table, the padded slice sampler, saving and loading.

`make_trial_buffer` assembles them into a TorchRL replay buffer; each part works alone in any other.
"""

from torchrl_amago.data.buffer import make_trial_buffer
from torchrl_amago.data.collector import TrialCollector
from torchrl_amago.data.saving import FilledPartCheckpointer, load_replay, save_replay
from torchrl_amago.data.slices import TrialSliceSampler
from torchrl_amago.data.trial_table import TrialTable

__all__ = [
    "FilledPartCheckpointer",
    "TrialCollector",
    "TrialSliceSampler",
    "TrialTable",
    "load_replay",
    "make_trial_buffer",
    "save_replay",
]
