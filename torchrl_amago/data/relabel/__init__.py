"""Hindsight: stored trials shown with other goals, rewards and endings as they are drawn."""

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
