"""Replay of whole trials: storage that survives, draws of padded slices, collection, saving and loading.

`make_trial_buffer` gives a TorchRL replay buffer of whole trials, and `TrialSliceSampler` serves TorchRL's own, too.
`relabel` shows trials with other goals as they are drawn, `TrialMixture` draws from several buffers, and
`offline`, which knows environments too, brings data from elsewhere.
"""

from torchrl_amago.data.collector import TrialCollector
from torchrl_amago.data.mixture import TrialMixture
from torchrl_amago.data.relabel import GoalSequenceRelabel, HindsightRelabel, Relabel
from torchrl_amago.data.replay import (
    TrialReplayBuffer,
    TrialSliceSampler,
    load_replay,
    make_trial_buffer,
    save_replay,
)

__all__ = [
    "GoalSequenceRelabel",
    "HindsightRelabel",
    "Relabel",
    "TrialCollector",
    "TrialMixture",
    "TrialReplayBuffer",
    "TrialSliceSampler",
    "load_replay",
    "make_trial_buffer",
    "save_replay",
]
