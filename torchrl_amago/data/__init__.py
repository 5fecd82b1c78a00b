"""Replay of whole trials: crash-safe storage, padded slices, collection, saving and loading.

`make_trial_buffer` makes a TorchRL replay buffer of whole trials; `TrialSliceSampler` also serves
TorchRL's own buffers. `relabel` changes the goals of drawn trials, `TrialMixture` samples from
several buffers, and `offline` reads data from elsewhere.
"""

from torchrl_amago.data.collector import TrialCollector
from torchrl_amago.data.mixture import TrialMixture
from torchrl_amago.data.relabel import GoalSequenceRelabel, HindsightRelabel, Relabel
from torchrl_amago.data.replay import TrialReplayBuffer, TrialSliceSampler, make_trial_buffer

__all__ = [
    "GoalSequenceRelabel", "HindsightRelabel", "Relabel", "TrialCollector", "TrialMixture",
    "TrialReplayBuffer", "TrialSliceSampler", "make_trial_buffer",
]  # fmt: skip
