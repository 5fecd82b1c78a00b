"""Hindsight: stored trials shown with other goals, rewards and endings as they are drawn.

``Relabel`` is what a buffer takes and a base for one's own; ``GoalSequenceRelabel`` is AMAGO's
relabelling of sequences of goals, ``HindsightRelabel`` HER for single goals.
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
