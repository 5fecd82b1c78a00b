"""What the recorded numbers need that the loss does otherwise on purpose."""

from __future__ import annotations

import pytest
from torchrl.modules import recurrent_mode

from torchrl_amago.modules.layers import InputNorm
from torchrl_amago.objectives import AMAGOLoss


@pytest.fixture(autouse=True)
def statistics_of_the_reference(request, monkeypatch):
    """The public code moves PopArt's statistics in evaluation too, and inputs' ones without gradient."""
    if not request.path.name.endswith("_golden.py"):
        return
    monkeypatch.setattr(AMAGOLoss, "_moves_statistics", True)
    moves = property(lambda norm: norm.training and recurrent_mode())
    monkeypatch.setattr(InputNorm, "follows_inputs", moves)
