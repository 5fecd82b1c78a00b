"""Hindsight: drawn trials with other goals, rewards and ends than were stored."""

from torchrl_amago.data.relabel.base import Relabel
from torchrl_amago.data.relabel.goal_sequence import GoalSequenceRelabel
from torchrl_amago.data.relabel.goals import GoalRelabel, exact_match
from torchrl_amago.data.relabel.hindsight import HindsightRelabel

__all__ = ["GoalRelabel", "GoalSequenceRelabel", "HindsightRelabel", "Relabel", "exact_match"]
