"""Hindsight: stored trials shown with other goals, rewards and endings as they are drawn.

``Relabel`` is the base of all relabellers, a TorchRL transform of whole trials. ``GoalSequenceRelabel``
is AMAGO's relabelling of sequences of goals, ``HindsightRelabel`` HER for single goals.
"""

from torchrl_amago.data.relabel.base import Relabel
from torchrl_amago.data.relabel.goal_sequence import GoalSequenceRelabel
from torchrl_amago.data.relabel.goals import GoalRelabel, exact_match
from torchrl_amago.data.relabel.hindsight import HindsightRelabel

__all__ = [
    "GoalRelabel",
    "GoalSequenceRelabel",
    "HindsightRelabel",
    "Relabel",
    "exact_match",
]
